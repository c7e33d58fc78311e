"""The Fréchet distance of images, with what paired differences need."""

from typing import Any

import torch
from torch import Tensor

from diffaccel.eval import Extractor, Statistics, collect, open_images

__all__ = ["frechet_of"]


def frechet_of(pixels: Any, extractor: Extractor, reference: Statistics) -> tuple[Any, float, Any]:
    """Returns the features of images, their distance, and the influence of each image on it.

    Arguments:
        pixels: The images (N, 3, H, W), 8 bits, or in [0, 1].
        extractor: What makes features.
        reference: The statistics that the distance is to.
    """
    images = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
    found = collect(open_images(images), extractor, ("features",))
    frechet = found.frechet(reference.reference)
    features = found.features[:]  # the file of them lives as long as ``found``
    return features, frechet.distance, frechet.influence(features)
