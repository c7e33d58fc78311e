r"""Distances and agreements that networks see: LPIPS, CLIP score, and a distance of any features.

Only `lpips_distance` is LPIPS. `feature_distance` is a number of its own, which depends on the extractor, and
is to be printed as such.

References:
    | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018)
    | https://arxiv.org/abs/1801.03924

    | CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al., 2021)
    | https://arxiv.org/abs/2104.08718
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MissingWeights, OptionError, closest
from . import weights
from .estimate import Estimate
from .fidelity import as_bytes, check_pairs, mean_estimate, to_floats

__all__ = [
    "CLIP",
    "DISTANCES",
    "Clip",
    "clip_available",
    "clip_score",
    "feature_distance",
    "feature_distances",
    "load_clip",
    "load_lpips",
    "lpips_available",
    "lpips_distance",
    "lpips_values",
]

CLIP = "openai/clip-vit-large-patch14"
"""The CLIP model that scores are computed with by default."""
SMALLEST = 31
"""The smallest side that AlexNet's strides leave a pixel of."""


def lpips_available() -> bool:
    """Returns whether `load_lpips` needs nothing that is not on this machine; nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None:
        return False
    return any(place.is_file() for place in weights.places(weights.WEIGHTS["alexnet"]))


def load_lpips(device: torch.device | str = "cpu") -> nn.Module:
    """Returns the LPIPS network 0.1 on AlexNet: two batches (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1).

    The heads come with the package "lpips"; the trunk is torchvision's file ``alexnet-owt-7be5be79.pth``,
    verified, and not downloaded where the environment forbids it.

    Arguments:
        device: Where it is to run.

    Raises:
        MissingWeights: If the package or the file is not on this machine, or is another file.
    """
    if importlib.util.find_spec("lpips") is None:
        raise MissingWeights("LPIPS needs the package lpips: pip install lpips")
    path, _ = weights.find("alexnet")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = _untrained_lpips()
    for part in network.net.children():
        held = {f"features.{name}.": f"{name}." for name, _ in part.named_children()}
        part.load_state_dict({held[head] + name.removeprefix(head): value
                              for name, value in state.items() for head in held
                              if name.startswith(head)})  # fmt: skip
    return network.to(device)


def _untrained_lpips() -> Any:
    """Returns LPIPS with its heads, and a random trunk, without a download."""
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of torchvision's old names of arguments
        return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def lpips_distance(
    images: Tensor, reference: Tensor, network: nn.Module | None = None, batch: int = 16
) -> Estimate:
    """Returns the mean LPIPS of pairs (arXiv 1801.03924), AlexNet 0.1; 0 for identical images.

    Arguments:
        images: With shape (N, C, H, W), C 1 or 3, and sides of at least 31: bytes, or floats in [0, 1]. The
            network was fitted to 64 pixels.
        reference: The images that they are compared with, with the same shape.
        network: What `load_lpips` returns, which is called if it is None; it decides the device.
        batch: Pairs at once.

    Raises:
        MissingWeights: If the network is not on this machine.
        OptionError: If the images are not pairs of such images.
    """
    return mean_estimate(lpips_values(images, reference, network or load_lpips(), batch).tolist())


@torch.inference_mode()
def lpips_values(images: Tensor, reference: Tensor, network: nn.Module, batch: int = 16) -> Tensor:
    """Returns the LPIPS of each pair (N), float64; the arguments are those of `lpips_distance`."""
    check_pairs(images, reference)
    if images.shape[1] not in (1, 3) or min(images.shape[-2:]) < SMALLEST:
        raise OptionError(
            f"images of shape {tuple(images.shape)}; LPIPS takes 1 or 3 channels, sides from {SMALLEST}"
        )
    device = next(network.parameters()).device
    distances: list[float] = []
    for ours, theirs in _batches(batch, images, reference):
        pair = [2 * to_floats(part).float().expand(-1, 3, -1, -1).to(device) - 1 for part in (ours, theirs)]
        distances += network(*pair).double().flatten().tolist()
    return torch.tensor(distances, dtype=torch.float64)


@dataclass(frozen=True)
class Clip:
    """A CLIP model and how its inputs are made.

    Arguments:
        model: A ``transformers.CLIPModel``.
        processor: Its ``transformers.CLIPProcessor``.
    """

    model: Any
    processor: Any

    @torch.inference_mode()
    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the cosines of images and their prompts, with shape (B), in float64.

        Arguments:
            images: Bytes (B, 3, H, W).
            prompts: B texts, of which the tokens past the model's length are cut off.
        """
        inputs = self.processor(
            images=list(images), text=list(prompts), return_tensors="pt", padding=True, truncation=True
        ).to(self.model.device)
        pixels = inputs.pop("pixel_values").to(self.model.dtype)
        seen = _embedding(self.model.get_image_features(pixel_values=pixels))
        read = _embedding(self.model.get_text_features(**inputs))
        return F.cosine_similarity(seen, read)


def _embedding(output: Any) -> Tensor:
    """Returns the projected vectors; transformers 5 has them in an output object."""
    value: Tensor = getattr(output, "pooler_output", output)
    return value.double()


def clip_available(name: str | Path = CLIP) -> bool:
    """Returns whether `load_clip` finds a model on this machine; nothing is downloaded.

    Arguments:
        name: A folder, or a name on the hub.
    """
    groups = (
        ("config.json",),
        ("model.safetensors", "pytorch_model.bin"),
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "vocab.json"),
    )
    return all(any(_is_here(name, file) for file in group) for group in groups)


def _is_here(name: str | Path, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    try:
        return isinstance(try_to_load_from_cache(str(name), file), str)
    except HFValidationError:
        return False


@functools.lru_cache(maxsize=1)
def load_clip(name: str | Path = CLIP, device: torch.device | str = "cpu") -> Clip:
    """Loads a CLIP model in float32, and keeps the last one.

    Arguments:
        name: A folder, or a name on the hub, which is not asked where the environment forbids downloads.
        device: Where it is to run.

    Raises:
        MissingWeights: If it is not on this machine and cannot be downloaded.
    """
    from transformers import CLIPModel, CLIPProcessor

    options = {"local_files_only": weights.is_offline() or Path(name).is_dir()}
    try:
        model = CLIPModel.from_pretrained(name, dtype=torch.float32, **options)
        processor = CLIPProcessor.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        raise MissingWeights(
            f"no CLIP model {str(name)!r}; looked for its config.json, weights, preprocessor and tokenizer "
            f"there and in {HF_HUB_CACHE}: {str(error).splitlines()[0]}"
        ) from None
    return Clip(model.eval().requires_grad_(False).to(device), processor)


def clip_score(
    images: Tensor, prompts: Sequence[str], model: Clip | str | Path = CLIP, batch: int = 32
) -> Estimate:
    """Returns the mean of ``100 max(cos, 0)`` of images and their prompts, as torchmetrics prints it.

    The published CLIPScore (arXiv 2104.08718) is ``2.5 max(cos, 0)`` with "A photo depicts" before each
    prompt; here nothing is added. The standard error takes images as independent, prompts too.

    Arguments:
        images: With shape (N, C, H, W), C 1 or 3: bytes, or floats in [0, 1], which are rounded to bytes.
        prompts: What each image is to show; N texts.
        model: A model, or the name of one, for `load_clip`.
        batch: Images at once.

    Raises:
        MissingWeights: If the model is not on this machine and cannot be downloaded.
        OptionError: If there is not one prompt for each image, or they are no images.
    """
    to_floats(images)  # checks them
    pixels = as_bytes(images)
    if pixels.shape[1] not in (1, 3) or len(prompts) != len(pixels) or isinstance(prompts, str):
        raise OptionError(
            f"{len(prompts)} prompts and images {tuple(pixels.shape)}; expected one for each, 1 or 3 channels"
        )
    clip = model if isinstance(model, Clip) else load_clip(model)
    scores: list[float] = []
    for start in range(0, len(pixels), batch):
        stop = start + batch
        cosines = clip.cosines(pixels[start:stop].expand(-1, 3, -1, -1), prompts[start:stop])
        scores += (100 * cosines.clamp_min(0)).tolist()
    return mean_estimate(scores)


DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda squared: squared / 2,
    "l2": lambda squared: squared.sqrt(),
}
"""From the squared distance of unit vectors to 1 - cos, in [0, 2], and to their distance, in [0, 2]."""


def feature_distance(images: Tensor, reference: Tensor, extractor: Callable[[Tensor], Any],
                     distance: str = "cosine", batch: int = 32) -> Estimate:  # fmt: skip
    """Returns the mean distance of the features of pairs, each scaled to length 1.

    This is no LPIPS, which has fitted weights, and compares with numbers of the same extractor only.

    Arguments:
        images: With shape (N, C, H, W): bytes, or floats in [0, 1], which are rounded to bytes.
        reference: The images that they are compared with, with the same shape.
        extractor: From bytes (B, C, H, W) to features (B, d), or to an object with those as ``features``.
        distance: One of ``DISTANCES``: "cosine" for 1 - cos, or "l2" for the length of the difference.
        batch: Pairs at once.

    Raises:
        OptionError: If the images are not pairs of images, the distance is unknown, or the features have the
            wrong shape or are not finite.
    """
    values = feature_distances(images, reference, extractor, distance, batch)
    return mean_estimate(values.tolist())


def feature_distances(images: Tensor, reference: Tensor, extractor: Callable[[Tensor], Any],
                      distance: str = "cosine", batch: int = 32) -> Tensor:  # fmt: skip
    """Returns the distance of each pair (N), float64; the arguments are those of `feature_distance`."""
    if distance not in DISTANCES:
        raise OptionError(f"no distance {distance!r}; {closest(distance, DISTANCES)}")
    check_pairs(images, reference)
    found: list[float] = []
    for ours, theirs in _batches(batch, images, reference):
        difference = _directions(extractor, as_bytes(ours)) - _directions(extractor, as_bytes(theirs))
        found += DISTANCES[distance](difference.pow(2).sum(1)).tolist()  # near 0, 1 - cos would cancel
    return torch.tensor(found, dtype=torch.float64)


@torch.inference_mode()
def _directions(extractor: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
    """Returns the features as float64 vectors of length 1; vectors of 0 stay."""
    output = extractor(pixels)
    features: Tensor = torch.as_tensor(getattr(output, "features", output))
    if features.ndim != 2 or len(features) != len(pixels):
        raise OptionError(f"the extractor returns {tuple(features.shape)}; expected ({len(pixels)}, d)")
    if not bool(features.isfinite().all()):
        raise OptionError("the extractor returns features that are not finite")
    return F.normalize(features.double(), dim=1)


def _batches(size: int, images: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(size), reference.split(size), strict=True)
