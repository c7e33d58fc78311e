"""Between images and a network's samples: decoding with gradients, and encoding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedPipeline
from ..noise import wide
from .host import Host

__all__ = ["decoder_of", "encoder_of"]


def decoder_of(host: Host) -> Callable[[Tensor], Tensor] | None:
    """Returns what makes images (B, 3, H, W) in [-1, 1] of samples (B, C, h, w); None where they are images.

    Raises:
        UnsupportedPipeline: If samples are packed, or the autoencoder is of another kind than AutoencoderKL.
    """
    vae: Any = getattr(host.pipe, "vae", None)
    if vae is None:
        return None
    scale, shift = _scaling(host, vae)

    def decode(samples: Tensor) -> Tensor:
        dtype = next(vae.parameters()).dtype
        return wide(vae.decode((samples / scale + shift).to(dtype), return_dict=False)[0])

    return decode


def encoder_of(host: Host) -> Callable[[Tensor], Tensor]:
    """Returns what makes samples (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: means of the posterior.

    Raises:
        UnsupportedPipeline: If samples are packed, or the autoencoder is of another kind than AutoencoderKL.
    """
    vae: Any = getattr(host.pipe, "vae", None)
    if vae is None:
        return wide
    scale, shift = _scaling(host, vae)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        first = next(vae.parameters())
        posterior = vae.encode(images.to(first)).latent_dist
        return (wide(posterior.mean) - shift) * scale

    return encode


def _scaling(host: Host, vae: Any) -> tuple[float, float]:
    """Returns the factor and the shift from the autoencoder's latents to samples, and freezes it."""
    channels = getattr(vae.config, "latent_channels", None)
    plain = len(host.shape) == 3 and channels == host.shape[0]
    standardized = getattr(vae.config, "latents_mean", None) is not None
    if standardized or not plain or getattr(vae.config, "scaling_factor", None) is None:
        raise UnsupportedPipeline(
            f"the way between samples {host.shape} of {type(host.pipe).__name__} and images, through "
            f"{type(vae).__name__}, is not known here"
        )
    vae.requires_grad_(False)
    return float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
