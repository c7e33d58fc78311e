"""The formulas of guidance: adaptive projected guidance (APG), and what a guided prediction consists of.

Classifier-free guidance combines two predictions, D_c with and D_u without the condition, by a scale w:

    D = D_c + (w - 1) (D_c - D_u)            (w = 1: no guidance; pipelines write u + w (c - u))

APG replaces the difference.  With Delta_k = D_c - D_u at the k-th step, all D being predictions of x0,

    Dbar_k = Delta_k + beta Dbar_{k-1}                        momentum, beta < 0; not a moving average
    Dclip  = Dbar min(1, r / |Dbar|)                          clip
    Dapg   = Dclip - (1 - eta) <Dclip, D_c> / <D_c, D_c> D_c  project
    D      = D_c + (w - 1) Dapg

in this order.  eta = 1, r = 0 (no clip), beta = 0 is plain guidance.  Norms and products are those of a
sample (or of a frame of it), never of a batch.  A constant Delta makes Dbar = Delta / (1 - beta).

References:
    Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (2024),
    arXiv 2410.02416, Algorithm 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import wide

__all__ = ["Parts", "Trajectory", "apg", "clip_norm", "combination_scale", "project", "take_apart"]

_NO_FLOAT64 = ("mps", "npu")


def apg(
    delta: Tensor,
    cond_x0: Tensor,
    previous: Tensor | None = None,
    *,
    momentum: float = 0.0,
    radius: float = 0.0,
    eta: float = 0.0,
    dims: tuple[int, ...] = (),
    center: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Returns (Dapg, Dbar) of a step: momentum, then clip, then project, as in the formulas of this module.

    Arguments:
        delta: The difference Delta = D_c - D_u of the predictions of x0, with shape (B, *).
        cond_x0: The conditional prediction D_c, with shape (B, *).
        previous: Dbar of the step before, with shape (B, *); None at the first.
        momentum: The beta of the momentum; 0 for none.
        radius: The largest norm r of Dbar; 0 for no clip.
        eta: The part of the parallel component that stays, usually in [0, 1].
        dims: The dimensions that norms and products run over; all but the batch if empty.
        center: The dimensions over which D_c has its mean removed before the projection; none if empty.

    References:
        Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (2024),
        arXiv 2410.02416, Algorithm 1.
    """
    dims = dims or tuple(range(1, delta.ndim))
    running = delta if previous is None or momentum == 0 else delta + momentum * previous
    direction = cond_x0 - cond_x0.mean(center, keepdim=True) if center else cond_x0
    return project(clip_norm(running, radius, dims), direction, eta, dims), running


def clip_norm(tensor: Tensor, radius: float, dims: tuple[int, ...]) -> Tensor:
    """Returns the tensor, (B, *), scaled down to the norm ``radius`` over ``dims`` where that is larger.

    A radius of 0 leaves the tensor as it is, as does a norm of 0.
    """
    if radius == 0:
        return tensor
    norm = torch.linalg.vector_norm(_double(tensor), dim=dims, keepdim=True)
    return tensor * (radius / norm).clamp(max=1).to(tensor.dtype)  # radius / 0 is inf


def project(tensor: Tensor, direction: Tensor, eta: float, dims: tuple[int, ...]) -> Tensor:
    """Returns the tensor with its component parallel to a direction multiplied by ``eta``.

    Computes in float64 where the device has it: the parallel part is a sum over all pixels that nearly
    cancels.  A direction of norm 0 has no parallel part.

    Arguments:
        tensor: What is projected, with shape (B, *).
        direction: The direction, with shape (B, *).
        eta: The factor of the parallel component.
        dims: The dimensions that the products run over.
    """
    if eta == 1:
        return tensor
    one, other = _double(tensor), _double(direction)
    square = (other * other).sum(dims, keepdim=True)
    share = (one * other).sum(dims, keepdim=True) / torch.where(square > 0, square, 1)
    return (one - (1 - eta) * share * other).to(tensor.dtype)


class Trajectory:
    """The running difference Dbar along a trajectory; remembers two, and at which level the last one was.

    Some solvers evaluate twice at one noise level (Heun): both evaluations go on from the level before.
    Where the noise increases or the shape changes, another trajectory begins (a second pass, say).
    """

    def __init__(self) -> None:
        self._log_snr = -math.inf
        self._before: Tensor | None = None
        self._running: Tensor | None = None

    def previous(self, log_snr: float, like: Tensor) -> Tensor | None:
        """Returns Dbar of the level before, or None at the beginning of a trajectory.

        Arguments:
            log_snr: The half log-SNR of the evaluation's noise level; it rises along a trajectory.
            like: A tensor of the shape (B, *) of the samples.
        """
        if log_snr < self._log_snr or (self._running is not None and self._running.shape != like.shape):
            self._before = None
        elif log_snr > self._log_snr:
            self._before = self._running
        self._log_snr = log_snr
        return self._before

    def keep(self, running: Tensor) -> None:
        """Keeps Dbar of the level that `previous` was asked for last."""
        self._running = running


class Parts(NamedTuple):
    """What a guided prediction was made of: ``output = uncond + scale (cond - uncond)``.

    Arguments:
        cond: The conditional prediction, with shape (B, *).
        uncond: The unconditional prediction, with shape (B, *).
        scale: The guidance scale w, larger than 1.
    """

    cond: Tensor
    uncond: Tensor
    scale: float


def combination_scale(first: Tensor, second: Tensor, output: Tensor) -> Tensor:
    """Returns the s of ``output = first + s (second - first)`` by least squares over all entries.

    All have the shape (B, *); the result is a scalar on their device, 0 if first and second are equal.
    """
    start, difference = _double(first), _double(second) - _double(first)
    square = (difference * difference).sum()
    return ((_double(output) - start) * difference).sum() / torch.where(square > 0, square, 1)


def take_apart(first: Tensor, second: Tensor, output: Tensor) -> Parts | None:
    """Tells which of two predictions is the conditional one, and the guidance scale, from their combination.

    In ``output = first + s (second - first)``, s > 1 makes the first one unconditional with the scale s, and
    s < 0 the second one with the scale 1 - s.  Waits for the device.

    Arguments:
        first: A prediction, with shape (B, *).
        second: The other one.
        output: What a pipeline made of both.

    Returns:
        The parts; or None if the output is no such combination (it was rescaled, or has a third part), if
        0 <= s <= 1 (up to rounding), which both orders explain.
    """
    scale = float(combination_scale(first, second, output))
    start, end, difference = _double(first), _double(output), _double(second) - _double(first)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (first, second, output))
    size, length, residual = (
        float(torch.linalg.vector_norm(part)) for part in (end, difference, end - start - scale * difference)
    )
    size += float(torch.linalg.vector_norm(start))
    beyond = max(scale - 1, -scale) * length  # how far the output is from between the two
    if not beyond > eps * size or not residual <= math.sqrt(eps) * size:
        return None
    return Parts(second, first, scale) if scale > 1 else Parts(first, second, 1 - scale)


def _double(tensor: Tensor) -> Tensor:
    return wide(tensor) if tensor.device.type in _NO_FLOAT64 else tensor.double()
