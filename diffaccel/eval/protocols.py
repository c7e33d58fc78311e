"""Named protocols: everything between an image and its features that moves a score, frozen under one name.

Scores of different protocols cannot be compared; the name, the version and the weights' SHA-256 go into every
result. The table is that of the published evaluations; `offline` and `fashion` need no network.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, closest
from .networks import Outputs, fold, load_network
from .pixels import resize

__all__ = ["PROTOCOLS", "Extractor", "Protocol", "protocol"]

CPU_BATCH = 8
"""Images at once on a CPU, whose cache the activations of more do not fit in."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf": lambda x: (x - 128) / 128,
    "symmetric": lambda x: x / 127.5 - 1,
    "unit": lambda x: x / 255,
    "imagenet": lambda x: _normalize(x, IMAGENET_MEAN, IMAGENET_STD),
    "clip": lambda x: _normalize(x, CLIP_MEAN, CLIP_STD),
    "none": lambda x: x,
}
"""How pixels in [0, 255] become the input of a network."""


def _normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    center, width = (pixels.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pixels / 255 - center) / width


@dataclass(frozen=True)
class Protocol:
    """One way from images to features.

    Arguments:
        name: Its name.
        network: The network, one of ``NETWORKS``.
        size: The side of the images that the network sees; 0 for their own size.
        resizer: How they come to this size, one of ``RESIZERS``.
        scaling: How pixels become its input, one of ``SCALINGS``.
        quantizer: How floats become bytes, one of ``QUANTIZERS``.
        metrics: What is computed by default.
        neighbors: k of precision and recall.
        images: The published number of generated images; another number is another score.
        splits: The splits of the inception score, of shuffled images if there are several.
        split_size: Or the images of a split, in their order.
        version: Counts changes of this definition.
    """

    name: str
    network: str
    size: int
    resizer: str
    scaling: str
    quantizer: str = "round"
    metrics: tuple[str, ...] = ("fid",)
    neighbors: int = 5
    images: int = 50_000
    splits: int = 1
    split_size: int | None = None
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Returns what features depend on, as plain data."""
        record = asdict(self)
        for name in ("metrics", "neighbors", "images", "splits", "split_size"):
            del record[name]
        return record


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("clean", "inception-torchscript", 299, "clean", "tf", metrics=("fid", "kid")),
        Protocol("legacy_tf", "inception-torchscript", 299, "tf1_bilinear", "tf", "half_up"),
        Protocol("adm", "inception-state", 299, "tf1_bilinear", "tf", "trunc",
                 metrics=("fid", "sfid", "is", "pr"), neighbors=3, split_size=5_000),
        Protocol("pytorch_fid", "inception-state", 299, "bilinear", "symmetric"),
        Protocol("torchmetrics_1_9", "inception-state", 299, "bilinear_antialias", "tf", "trunc",
                 metrics=("fid", "kid", "is"), splits=10),
        Protocol("dgm_dinov2", "dinov2-large", 224, "pil_bicubic", "imagenet",
                 metrics=("fid", "kid", "prdc")),
        Protocol("edm2_dinov2", "dinov2-large", 224, "bicubic_antialias", "imagenet"),
        Protocol("cmmd", "clip-large-336", 336, "bicubic_antialias", "clip",
                 metrics=("cmmd",), images=30_000),
        Protocol("offline", "efficientnet-lite0", 96, "bicubic_antialias", "imagenet",
                 metrics=("fid", "kid", "prdc", "is"), images=5_000),
        Protocol("offline_224", "efficientnet-lite0", 224, "bicubic_antialias", "imagenet",
                 metrics=("fid", "kid", "prdc", "is"), images=5_000),
        Protocol("fashion", "fashion-classifier", 32, "bicubic_antialias", "unit",
                 metrics=("fid", "kid", "prdc"), images=5_000),
    )
}  # fmt: skip
"""The protocols by name."""


def protocol(name: str) -> Protocol:
    """Returns a protocol by its name.

    Raises:
        OptionError: If there is none.
    """
    if name not in PROTOCOLS:
        raise OptionError(f"no protocol {name!r}; {closest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


class Extractor:
    """Computes features of byte images under a protocol.

    TF32 is off meanwhile: it moves scores by more than their error.

    Arguments:
        protocol: The protocol.
        network: A network of one's own instead of the protocol's: images to features (B, d), or to `Outputs`.
        device: Where it runs.
        bf16: Whether to compute in bfloat16, which changes scores and is recorded.
        weights: What to record for a network of one's own; the SHA-256 of its parameters by default.

    The network is loaded when it is needed; `MissingWeights` is raised then, if it is not on this machine.
    """

    def __init__(self, protocol: Protocol, device: torch.device | str = "cpu", bf16: bool = False,
                 network: nn.Module | None = None, weights: str = "") -> None:  # fmt: skip
        self.protocol, self.device, self.bf16 = protocol, torch.device(device), bf16
        self._own, self._own_weights = network, weights

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, str]:
        """The network, and the SHA-256 of its weights."""
        if self._own is not None:
            return fold(self._own).to(self.device), self._own_weights or _digest(self._own)
        return load_network(self.protocol.network, self.device)

    @property
    def record(self) -> dict[str, Any]:
        """What the features depend on, as plain data."""
        return {**self.protocol.to_dict(), "weights": self._loaded[1], "bf16": self.bf16}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Outputs:
        """Returns float32 outputs on the CPU.

        Arguments:
            pixels: Byte images (B, 3, H, W).
        """
        on_cpu = self.device.type == "cpu"
        parts = [self._outputs(part) for part in pixels.split(CPU_BATCH if on_cpu else max(len(pixels), 1))]
        logits, spatial = (
            None if values[0] is None else torch.cat(values) for values in list(zip(*parts, strict=True))[1:]
        )
        return Outputs(torch.cat([part.features for part in parts]), logits, spatial)

    def _outputs(self, pixels: Tensor) -> Outputs:
        protocol = self.protocol
        images, kind = pixels.to(self.device), self.device.type
        with _without_tf32(), torch.autocast(kind, enabled=False):  # resizing multiplies matrices, too
            if protocol.size:
                images = resize(images, protocol.size, protocol.resizer)
            images = SCALINGS[protocol.scaling](images.float()).contiguous(memory_format=torch.channels_last)
            with torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
                outputs = self._loaded[0](images)
        if isinstance(outputs, Tensor):
            outputs = Outputs(outputs.flatten(1))
        features, *others = (None if part is None else part.float().cpu() for part in outputs)
        assert features is not None
        return Outputs(features, *others)


def _digest(network: nn.Module) -> str:
    """Returns the SHA-256 of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _without_tf32:
    """Turns TF32 off in matrix products and convolutions."""

    def __enter__(self) -> None:
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        self.switches: list[tuple[Any, str, Any]] = [
            (matmul, "allow_tf32", False),
            (cudnn, "allow_tf32", False),
        ]
        try:
            self.before = self._read()
        except RuntimeError:  # from torch 2.9 on, once someone has used the switches that are new there
            places = (matmul, cudnn.conv, cudnn.rnn)
            self.switches = [(place, "fp32_precision", "ieee") for place in places]
            self.before = self._read()
        for place, name, off in self.switches:
            setattr(place, name, off)

    def _read(self) -> list[Any]:
        return [getattr(place, name) for place, name, _ in self.switches]

    def __exit__(self, *exc: object) -> None:
        for (place, name, _), value in zip(self.switches, self.before, strict=True):
            setattr(place, name, value)
