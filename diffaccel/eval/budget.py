"""Budgets: how far an accelerated image may be from the plain one of its noise, or the least speed-up."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, closest
from .fidelity import Pairs
from .perceptual import feature_distances, load_lpips, lpips_values
from .protocols import Extractor, protocol

__all__ = ["QUALITY", "SPEED", "Budget", "Judge"]

QUALITY: Mapping[str, str] = {
    "rms": "<=", "psnr": ">=", "relative": "<=", "ssim": ">=", "lpips": "<=", "feature_distance": "<=",
}  # fmt: skip
"""The metrics of single images, as `Fidelity` names them, and on which side of a limit they are good."""

SPEED = "speedup"

_BUDGET = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([-+.\w]+)\s*")


@dataclass(frozen=True)
class Budget:
    """A limit.

    Arguments:
        metric: One of ``QUALITY``, met image by image; or "speedup", of the wall-clock time.
        limit: The largest value; for "psnr" (dB), "ssim" and "speedup" the least.

    Raises:
        OptionError: If there is no such metric, or no such limit.
    """

    metric: str
    limit: float

    def __post_init__(self) -> None:
        """Checks the limit."""
        if self.metric != SPEED and self.metric not in QUALITY:
            raise OptionError(f"no budget {self.metric!r}; {closest(self.metric, (*QUALITY, SPEED))}")
        low, high = {SPEED: (1.0, math.inf), "psnr": (0.0, math.inf)}.get(
            self.metric, (0.0, 1.0 if self.metric == "ssim" else math.inf)
        )
        if not low < self.limit < high:
            raise OptionError(f"budget {self}: expected a limit within ({low:g}, {high:g})")

    @classmethod
    def read(cls, text: str) -> "Budget":
        """Reads a budget such as "lpips<=0.05", "psnr>=30" or "speedup>=2".

        Raises:
            OptionError: If it is none.
        """
        found = _BUDGET.fullmatch(text)
        try:
            metric, side, limit = found.groups() if found else ("", "", "")
            budget = cls(metric, float(limit)) if metric else None
        except ValueError as error:
            if isinstance(error, OptionError):
                raise
            budget = None
        if budget is None:
            raise OptionError(f"budget {text!r} is not of the form metric<=limit or metric>=limit")
        if side != budget.side:
            raise OptionError(f"budget {text!r}: {budget.metric} has a limit on the other side: {budget}")
        return budget

    @property
    def side(self) -> str:
        """The sign between metric and limit."""
        return QUALITY.get(self.metric, ">=")

    @property
    def quality(self) -> str:
        """The metric of single images; relative errors where the budget is a speed-up."""
        return self.metric if self.metric != SPEED else "relative"

    def __str__(self) -> str:
        return f"{self.metric}{self.side}{self.limit:g}"

    def losses(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the loss of each image (N): 0 for identical images, doubled by errors twice as large.

        Arguments:
            values: What a `Judge` returns.
        """
        if self.quality == "psnr":
            return values["rms"]
        return 1 - values["ssim"] if self.quality == "ssim" else values[self.quality]

    @property
    def largest(self) -> float:
        """The largest loss; infinite where the budget is a speed-up."""
        if self.metric == SPEED:
            return math.inf
        return float(self.loss_of(self.limit))

    def loss_of(self, value: float) -> float:
        """Returns the loss of an image with this value of the metric."""
        if self.quality == "psnr":
            return 10 ** (-value / 20)
        return 1 - value if self.quality == "ssim" else value

    def value_of(self, loss: float) -> float:
        """Returns the value of the metric of an image with this loss."""
        if self.quality == "psnr":
            return -20 * math.log10(loss) if loss else math.inf
        return 1 - loss if self.quality == "ssim" else loss


class Judge:
    """Compares images with reference images, one by one, as far as a budget asks for it.

    Arguments:
        metric: One of ``QUALITY``; the networks of others are not needed.
        device: Where networks run.
        name: The protocol of "feature_distance", which is the mean of 1 - cos there.

    Raises:
        MissingWeights: If the metric's network is not on this machine.
        OptionError: If there is no such protocol.
    """

    def __init__(self, metric: str, device: torch.device | str = "cpu", name: str = "offline") -> None:
        self.metric = metric
        self.lpips = load_lpips(device) if metric == "lpips" else None
        self.extractor = Extractor(protocol(name), device) if metric == "feature_distance" else None
        self.record: dict[str, Any] = {"metric": metric} if self.lpips else {}
        """What the numbers depend on beside the images, as plain data."""
        if self.extractor is not None:
            self.record = {"metric": metric, "features": self.extractor.record}

    def __call__(self, images: Tensor, reference: Tensor) -> dict[str, np.ndarray]:
        """Returns the values of each pair (N) by name: "rms", "relative", "ssim", and that of a network.

        Arguments:
            images: With shape (N, 3, H, W), in [0, 1].
            reference: What they are compared with, likewise.

        Raises:
            OptionError: If they are no such pairs, or too small for the metric.
        """
        pairs = Pairs()
        pairs.update(images, reference)
        state = pairs.state_dict()
        found = {"rms": state["squares"].sqrt(), "relative": state["relative"]}
        if len(state["similar"]):
            found["ssim"] = state["similar"]
        elif self.metric == "ssim":
            raise OptionError(f"images {tuple(images.shape)} are too small for ssim; its window is 11")
        if self.lpips is not None:
            found["lpips"] = lpips_values(images, reference, self.lpips)
        if self.extractor is not None:
            found["feature_distance"] = feature_distances(images, reference, self.extractor)
        return {name: values.double().numpy() for name, values in found.items()}
