r"""Distances between a predicted velocity and the true one, for training on pairs of noise and sample.

A premetric m(a, b) is 0 where a = b and positive elsewhere. Pairs determine the velocity, so that the optimum
of all premetrics is the same, r = velocity - (noise - x0) = 0; independent noise determines only its mean,
which is the optimum of the squared distance alone. With d elements in a sample, and
x0_hat = x_t - t velocity = x0 - t r:

    l2                 |r|^2 / d
    huber              h(r) = (sqrt(|r|^2 + c^2) - c) / d,    c = 0.00054 d
    lpips-huber        (1 - t) h(r) + LPIPS(x0_hat, x0)
    lpips-huber-1/t    (1 - t) h(r) + LPIPS(x0_hat, x0) / t

References:
    | Improving the Training of Rectified Flows (2024), arXiv 2405.20320, section 4
    | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (2018), arXiv 1801.03924 (LPIPS)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError, closest
from ..eval.networks import NETWORKS
from ..eval.perceptual import load_lpips
from ..eval.protocols import SCALINGS
from .densities import SMALLEST

__all__ = ["L2", "PERCEPTUALS", "PREMETRICS", "PerceptualDistance", "PerceptualHuber", "Premetric",
           "PseudoHuber", "load_perceptual", "premetric_of"]  # fmt: skip

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two batches (B, *) to their distances (B), differentiable."""

PREMETRICS = ("l2", "huber", "lpips-huber", "lpips-huber-1/t")
"""The premetrics by the names that options have."""

PERCEPTUALS = {"offline": 96, "lpips": 224}
"""The perceptual distances by name, and the side of the images that they see."""


class Premetric(ABC):
    """A distance of velocities."""

    finds_mean: ClassVar[bool] = False
    """Whether the mean velocity is optimal where the velocity is random."""

    @abstractmethod
    def __call__(self, residual: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Returns the distance for each sample, with shape (B).

        Arguments:
            residual: The velocity less the true one, with shape (B, *).
            x0: The data, with shape (B, *).
            t: The times, with shape (B).
        """


@dataclass(frozen=True)
class L2(Premetric):
    """The mean of the squared elements."""

    finds_mean: ClassVar[bool] = True

    def __call__(self, residual: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Returns |r|^2 / d, with shape (B)."""
        return residual.flatten(1).square().mean(1)


@dataclass(frozen=True)
class PseudoHuber(Premetric):
    """The length of the residual, rounded at 0: h(r) = (sqrt(|r|^2 + c^2) - c) / d.

    Arguments:
        c: The length up to which it is a parabola; 0.00054 d if it is None, which is in proportion to d, not
            to its root as for consistency training.

    Raises:
        OptionError: If c is not above 0.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and not self.c > 0:
            raise OptionError(f"pseudo-Huber with c={self.c}; expected a number above 0")

    def __call__(self, residual: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Returns h(r), with shape (B)."""
        squared, size = residual.flatten(1).square().sum(1), residual[0].numel()
        c = 0.00054 * size if self.c is None else self.c
        return squared / ((squared + c * c).sqrt() + c) / size  # the same, without a difference


@dataclass(frozen=True)
class PerceptualHuber(Premetric):
    """The pseudo-Huber distance of velocities where t is small, and one of images: (1 - t) h + LPIPS.

    Arguments:
        perceptual: The distance of predicted and true samples, such as `load_perceptual` returns.
        per_time: Whether it is divided by t, of which 1e-5 is the smallest then.
        huber: The distance of velocities.
    """

    perceptual: Perceptual
    per_time: bool = False
    huber: PseudoHuber = PseudoHuber()

    def __call__(self, residual: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Returns (1 - t) h(r) + LPIPS(x0 - t r, x0), or with its second term divided by t; shape (B)."""
        time = t.to(residual.dtype)
        seen = self.perceptual(x0 - broad(time, residual) * residual, x0)
        weight = 1 / time.clamp_min(SMALLEST) if self.per_time else 1.0
        return (1 - time) * self.huber(residual, x0, t) + weight * seen


def premetric_of(name: str, perceptual: Perceptual | None = None) -> Premetric:
    """Returns a premetric by its name.

    Arguments:
        name: One of ``PREMETRICS``.
        perceptual: The perceptual distance, which those of LPIPS need.

    Raises:
        OptionError: If there is none of that name, or the perceptual distance is missing.
    """
    if name not in PREMETRICS:
        raise OptionError(f"no premetric {name!r}; {closest(name, PREMETRICS)}")
    if name in ("l2", "huber"):
        return L2() if name == "l2" else PseudoHuber()
    if perceptual is None:
        raise OptionError(f"the premetric {name!r} needs a perceptual distance; see load_perceptual")
    return PerceptualHuber(perceptual, per_time=name.endswith("1/t"))


def broad(values: Tensor, like: Tensor) -> Tensor:
    """Returns numbers (B) so that they multiply a tensor (B, *), in its type."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


class PerceptualDistance(nn.Module):
    """A network's distance of two batches of images, or of latents, differentiable.

    Arguments:
        network: From two batches (B, 3, S, S) in [-1, 1] to B distances; it is frozen.
        size: The side S, to which images are resized bilinearly; 0 for their own.
        decode: From latents (B, *) to images (B, C, H, W) in [-1, 1], C 1 or 3; None if they are images.
            Gradients go through it; what it is made of has to be frozen.
    """

    def __init__(
        self, network: nn.Module, size: int = 0, decode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network, self.size, self.decode = network.eval().requires_grad_(False), size, decode

    def forward(self, samples: Tensor, reference: Tensor) -> Tensor:
        """Returns the distances, with shape (B), in the network's type; 0 for equal samples.

        Arguments:
            samples: Images (B, C, H, W), about in [-1, 1], or latents (B, *).
            reference: What they are compared with, with the same shape.

        Raises:
            OptionError: If they are no images of one or three channels.
        """
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(samples.device.type, enabled=False):
            pair = [self._images(part).to(dtype) for part in (samples, reference)]
            found: Tensor = self.network(*(self._resized(part) for part in pair))
        return found.flatten()

    def _images(self, samples: Tensor) -> Tensor:
        images = samples if self.decode is None else self.decode(samples)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise OptionError(
                f"a perceptual distance of {tuple(images.shape)}; expected images (B, 1 or 3, H, W): latents "
                "need decode"
            )
        return images

    def _resized(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        if not self.size or images.shape[-2:] == (self.size, self.size):
            return images
        size = (self.size, self.size)
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


class FeatureMaps(nn.Module):
    """The distance of an EfficientNet's features: as LPIPS, but with equal weights for all channels.

    At the last layer of each resolution, features are scaled to length 1 at each place: the distance is
    1 - cos, in the mean over places and resolutions, in [0, 2].

    Arguments:
        network: The network of efficientnet-lite-pytorch.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Returns the distances of two batches (B, 3, S, S) in [-1, 1], with shape (B)."""
        found = [
            (_directions(ours) - _directions(theirs)).square().sum(1).mean((1, 2)) / 2
            for ours, theirs in zip(self.maps(images), self.maps(reference), strict=True)
        ]
        return torch.stack(found).mean(0)

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the features (B, C, S, S) of each resolution, the finest first."""
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(SCALINGS["imagenet"](127.5 * images + 127.5))))
        for block in net._blocks:
            after = block(x)
            if after.shape[-1] < x.shape[-1]:
                yield x
            x = after
        yield x


def _directions(features: Tensor) -> Tensor:
    """Returns features (B, C, S, S) with length 1 at each place; the derivative at 0 is finite."""
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()


def load_perceptual(name: str = "offline", device: torch.device | str = "cpu", size: int | None = None,
                    decode: Callable[[Tensor], Tensor] | None = None) -> PerceptualDistance:  # fmt: skip
    """Returns a perceptual distance of images in [-1, 1], or of latents that are decoded for it.

    Arguments:
        name: "offline", on an EfficientNet of ImageNet that comes from PyPI: no LPIPS, see `FeatureMaps`; or
            "lpips", on AlexNet, if `diffaccel.eval.perceptual.lpips_available`.
        device: Where it is to run.
        size: The side of the images that it sees, 0 for their own; None for the usual one.
        decode: What makes images of latents.

    Raises:
        OptionError: If there is none of that name.
        MissingWeights: If its weights are not on this machine.
    """
    if name not in PERCEPTUALS:
        raise OptionError(f"no perceptual distance {name!r}; {closest(name, PERCEPTUALS)}")
    network: Any
    if name == "lpips":
        network = load_lpips()
    else:
        found: Any = NETWORKS["efficientnet-lite0"]()[0]
        network = FeatureMaps(found.network)
    return PerceptualDistance(network, PERCEPTUALS[name] if size is None else size, decode).to(device)
