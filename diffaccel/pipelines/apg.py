"""APG: guidance at high scales without saturated colors, for the pipelines of diffusers as they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipeline, UnsupportedScheduler
from ..guidance import Trajectory, apg, combination_scale, take_apart
from ..noise import NoiseLevel, probe, wide
from .accelerator import Accelerator, Proceed, option
from .branches import Layout, convention_of, is_guiding, leading, samples_of, scale_of, why_unguided
from .run import AUXILIARY, Evaluation, Run, Update

__all__ = ["APG"]

SINGULAR = 1e-6


class _Pair(NamedTuple):
    """The two predictions of a step, and how the pipeline gets them."""

    network: str
    cond: Tensor
    uncond: Tensor
    cond_first: bool
    is_late: bool
    """Whether the solver seam has to replace their combination."""


@dataclass
class APG(Accelerator):
    """Adaptive projected guidance: less of what is parallel to the prediction, with a clip and a momentum.

    It costs no evaluation and needs no change of a pipeline: the unconditional output u of the network is
    replaced by u' = c - Dapg / B, where Dapg is what the paper makes of the difference of both predictions
    of x0, and B = d x0 / d output.  The pipeline's own u' + w (c - u') then is c + (w - 1) Dapg / B, which
    is the paper's result, whatever w is.  The conditional output c stays as it is: guidance_rescale and
    skip-layer guidance need it.  Guidance that is renormalized afterwards (Qwen-Image) is replaced as a
    whole where the solver receives it.

    Reduces to the pipeline's own guidance, bit for bit, for ``eta=1, rescale=0, momentum=0``.  Calls without
    guidance pass through.  Steps that another accelerator skips advance the momentum by the difference that
    was computed last.

    References:
        Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (2024),
        arXiv 2410.02416, Algorithm 1.

    Arguments:
        eta: The part that stays of the component parallel to the conditional x0: 1 is all of it.
        rescale: The largest norm of the difference of the predictions of x0; 0 for no limit.
        rescale_unit: ``"rms"`` for a norm divided by the square root of the number of elements, which serves
            every resolution; ``"norm"`` for that of the paper.
        momentum: The beta of the momentum, usually -0.5 to -0.75; 0 for none.  It weakens guidance, by up to
            1 / (1 - momentum).
        dims: What norms and products are taken of: ``"all"`` of a sample, or each ``"frame"`` of a video.
        origin: Where the parallel component starts: at ``"zero"`` as in the paper, or at the ``"mean"`` of
            each channel, which leaves the average color alone.
        order: The order of the predictions: ``"auto"``, ``"cond_first"`` or ``"uncond_first"``.  It is known
            for the pipelines of diffusers, and checked in the first step of every loop.
    """

    name: ClassVar[str] = "apg"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sdxl": {"rescale": 0.0586, "momentum": -0.5},  # a norm of 15 for 4 x 128 x 128
        "waver": {"rescale": 27.0, "rescale_unit": "norm", "dims": "frame"},
    }
    exclusive: ClassVar[str] = "guidance"

    eta: float = option(0.0, low=0.0, high=1.0)
    rescale: float = option(0.0, low=0.0)
    rescale_unit: str = option("rms", choices=("rms", "norm"))
    momentum: float = option(0.0, low=-0.95, high=0.95)
    dims: str = option("all", choices=("all", "frame"))
    origin: str = option("zero", choices=("zero", "mean"))
    order: str = option("auto", choices=("auto", "cond_first", "uncond_first"))

    @property
    def is_plain(self) -> bool:
        """Whether the options are those of plain guidance."""
        return self.eta == 1 and self.rescale == 0 and self.momentum == 0

    def step(
        self,
        level: NoiseLevel,
        cond: Tensor,
        uncond: Tensor,
        sample: Tensor,
        trajectory: Trajectory,
        layout: Layout,
    ) -> Tensor | None:
        """Returns what takes the place of ``cond - uncond``, which is Dapg / B, with shape (B, *).

        None means that nothing does: x0 does not depend on the output here, or is not determined by it.

        Arguments:
            level: The noise level.
            cond: The conditional output as the scheduler takes it, with shape (B, *).
            uncond: The unconditional output, with shape (B, *).
            sample: The noisy sample in the scheduler's coordinates, with shape (B, *).
            trajectory: The memory of the momentum.
            layout: Where channels and frames are.

        Raises:
            UnsupportedPipeline: If norms are to be those of frames, and the sample has none.
        """
        gain = level.x0_per_output if level.q == 0 or abs(level.jacobian) >= SINGULAR else 0.0
        if abs(gain) < SINGULAR:
            return None
        delta = gain * (wide(cond) - wide(uncond))
        dims = self._dims(delta.ndim, layout)
        size = math.prod(delta.shape[axis] for axis in dims)
        others = tuple(axis for axis in dims if axis != layout.channel_axis(delta.ndim))
        update, running = apg(
            delta,
            level.x0(cond, sample),
            trajectory.previous(level.log_snr, delta) if self.momentum else None,
            momentum=self.momentum,
            radius=self.rescale * (math.sqrt(size) if self.rescale_unit == "rms" else 1),
            eta=self.eta,
            dims=dims,
            center=others if self.origin == "mean" else (),
        )
        if self.momentum:
            trajectory.keep(running)
        return update / gain

    def _dims(self, ndim: int, layout: Layout) -> tuple[int, ...]:
        if self.dims == "frame" and ndim != 5:
            raise UnsupportedPipeline(
                "apg: dims='frame' needs latents with frames, (B, C, T, H, W); these have "
                f"{ndim} dimensions, use dims='all'"
            )
        left_out = layout.frame if self.dims == "frame" else 0
        return tuple(axis for axis in range(1, ndim) if axis != left_out)

    def check(self, pipe: Any) -> str | None:
        """Refuses pipelines that never guide, guide in ways of their own, or have an unknown scheduler."""
        if reason := why_unguided(pipe):
            return reason
        try:
            probe(pipe.scheduler)
        except UnsupportedScheduler as error:
            return str(error)
        return None

    def start(self, run: Run) -> None:
        """Forgets the last loop."""
        self.convention = convention_of(run.pipe)
        self.samples = samples_of(run.pipe, run.arguments)
        self.trajectories: dict[str, Trajectory] = {}
        self.conds: dict[str, tuple[Tensor, Tensor]] = {}
        self.equal: dict[tuple[str, str, int, int], bool] = {}
        self.pair: _Pair | None = None
        self.checked = False
        self.rows = 0

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Replaces the unconditional output, which is half of a batch or the second of two calls.

        Raises:
            UnsupportedPipeline: If the network's output is packed in a way that is not known.
        """
        output = proceed(call)
        if self.is_plain or call.network in AUXILIARY or not is_guiding(call.run.pipe, call.run.arguments):
            return output
        self.rows = max(self.rows, call.rows)
        prediction, sample = self._latents(call, output)
        if self._is_stacked(call, sample):
            return self._rewrite_half(call, output, prediction, sample)
        if call.branch == 0:
            self.conds[call.network] = prediction, sample
        elif call.branch == 1 and call.network in self.conds:
            first, same = self.conds[call.network]
            if self._is_equal("calls", call, same, sample):
                return self._rewrite_second(call, output, first, prediction, sample)
        return output

    def update(self, call: Update, proceed: Proceed) -> Any:
        """Replaces a combination that could not be left to the pipeline; in the first step, checks the order.

        Raises:
            UnsupportedPipeline: If the pipeline does not do what was assumed of it.
        """
        pair, self.pair = self.pair, None
        self.conds.clear()
        if not self.checked and not self.is_plain:
            self._check_pair(call, pair)
        self.checked = True
        return proceed(replace(call, output=self._guided(call, pair)) if pair and pair.is_late else call)

    # ---------------------------------------------------------------- what a network gets and gives

    def _latents(self, call: Evaluation, output: Any) -> tuple[Tensor, Tensor]:
        """Returns the prediction and the input of a network, in their common channels: those of the latents.

        Some networks predict a variance too, and some are given masks or pictures in further channels.
        """
        leaves, sample = pytree.tree_leaves(output), call.sample
        if isinstance(sample, list) and len({item.shape for item in [*sample, *leaves]}) == 1:
            prediction, sample = torch.stack(leaves), torch.stack(sample)
        elif isinstance(sample, Tensor) and len(leaves) == 1 and leaves[0].ndim == sample.ndim:
            prediction = leaves[0]
        else:
            name = type(call.run.pipe).__name__
            raise UnsupportedPipeline(
                f"apg cannot tell the prediction in the outputs of the network of {name}"
            )
        axis = self.convention.layout.channel_axis(prediction.ndim)
        channels = min(prediction.shape[axis], sample.shape[axis])
        return prediction.narrow(axis, 0, channels), sample.narrow(axis, 0, channels)

    def _is_stacked(self, call: Evaluation, sample: Tensor) -> bool:
        """Whether the rows are those of two branches: the halves of the network's input are equal."""
        if self.samples:
            possible = call.rows == 2 * self.samples
        else:
            possible = call.rows % 2 == 0 and call.rows > call.run.batch  # 0 before the first update
        return possible and self._is_equal("halves", call, *sample.chunk(2))

    def _is_equal(self, what: str, call: Evaluation, one: Tensor, other: Tensor) -> bool:
        """Whether two inputs are equal; compared once a loop, since the comparison waits for the device."""
        key = what, call.network, call.branch, call.rows
        if key not in self.equal:
            self.equal[key] = torch.equal(one, other)
        return self.equal[key]

    # ---------------------------------------------------------------- what the pipeline gets

    def _unconditional(self, call: Evaluation, cond: Tensor, uncond: Tensor, sample: Tensor) -> Tensor | None:
        """Returns the output u' = c - Dapg / B, with shape (B, *); None if u may stay."""
        sign, path = self.convention.sign, call.run.path
        trajectory = self.trajectories.setdefault(call.network, Trajectory())
        noisy = wide(sample) / path.input_scale(call.index)
        step = self.step(
            path[call.index], sign * cond, sign * uncond, noisy, trajectory, self.convention.layout
        )
        return None if step is None else (wide(cond) - sign * step).to(uncond.dtype)

    def _rewrite_half(self, call: Evaluation, output: Any, prediction: Tensor, sample: Tensor) -> Any:
        first, second = prediction.chunk(2)
        cond_first = self.convention.cond_first if self.order == "auto" else self.order == "cond_first"
        cond, old = (first, second) if cond_first else (second, first)
        new = self._unconditional(call, cond, old, sample.chunk(2)[0])
        uncond = old if new is None else new
        self.pair = _Pair(call.network, cond, uncond, cond_first, is_late=False)
        return output if new is None else self._packed(output, new, len(cond) if cond_first else 0)

    def _rewrite_second(
        self, call: Evaluation, output: Any, first: Tensor, second: Tensor, sample: Tensor
    ) -> Any:
        if self.order == "uncond_first":
            self.pair = _Pair(call.network, second, first, cond_first=False, is_late=True)
            return output
        late = bool(self.convention.scale)
        new = None if late else self._unconditional(call, first, second, sample)
        self.pair = _Pair(call.network, first, second if new is None else new, True, late)
        return output if new is None else self._packed(output, new, 0)

    def _packed(self, output: Any, new: Tensor, start: int) -> Any:
        """Returns an output like another one, which stays as it is, but for some rows of the latents."""
        leaves, structure = pytree.tree_flatten(output)
        if len(leaves) > 1:  # one a row
            leaves[start : start + len(new)] = list(new)
        else:
            axis = self.convention.layout.channel_axis(new.ndim)
            leaves = [leaves[0].clone()]
            leaves[0][start : start + len(new)].narrow(axis, 0, new.shape[axis]).copy_(new)
        return pytree.tree_unflatten(leaves, structure)

    # ---------------------------------------------------------------- what the solver gets

    def _guided(self, call: Update, pair: _Pair) -> Tensor:
        """Returns c + (w - 1) Dapg / B, with shape (B, *)."""
        sign, convention = self.convention.sign, self.convention
        cond, uncond = (sign * leading(part, call.sample) for part in (pair.cond, pair.uncond))
        trajectory = self.trajectories.setdefault(pair.network, Trajectory())
        level = call.run.path[call.index]
        step = self.step(level, cond, uncond, call.sample, trajectory, convention.layout)
        if step is None:
            return call.output
        if convention.scale:
            scale: float | Tensor = scale_of(call.run.pipe, call.run.arguments, convention.scale)
        else:
            scale = combination_scale(uncond, cond, call.output).to(step.dtype)
        return (wide(cond) + (scale - 1) * step).to(call.output.dtype)

    def _check_pair(self, call: Update, pair: _Pair | None) -> None:
        """Compares the order and the sign that were assumed with what the solver gets.

        Where the pipeline does more than to combine linearly (guidance_rescale), nothing can be said.
        """
        name = type(call.run.pipe).__name__
        if pair is None:
            guided = getattr(call.run.pipe, "do_classifier_free_guidance", False) is True
            if guided or self.rows > len(call.sample):  # branches, but of another kind
                raise UnsupportedPipeline(f"apg found no pair of predictions in the first step of {name}")
            return
        first, second = (pair.cond, pair.uncond) if pair.cond_first else (pair.uncond, pair.cond)
        if self.convention.scale or call.options.get("per_token_timesteps") is not None:
            return
        output = self._comparable(call, first)
        if output is None:
            return
        parts = take_apart(first, second, output)
        if parts is None and take_apart(first, second, -output) is not None:
            raise UnsupportedPipeline(
                f"apg: {name} gives its scheduler the negative prediction, unexpectedly"
            )
        if parts is not None and parts.cond is not pair.cond:
            found = "uncond_first" if pair.cond_first else "cond_first"
            raise UnsupportedPipeline(
                f"apg: {name} computes its predictions in the other order; set order={found!r}"
            )

    def _comparable(self, call: Update, prediction: Tensor) -> Tensor | None:
        """Returns the solver's input in the network's terms and shape, or None if it is packed otherwise.

        Raises:
            UnsupportedPipeline: If the network's prediction has other dimensions than the sample.
        """
        output, sample = call.output[: len(prediction)], call.sample[: len(prediction)]
        axis = self.convention.layout.channel_axis(output.ndim)
        channels = min(output.shape[axis], sample.shape[axis])  # the output may have a variance
        output = self.convention.sign * output.narrow(axis, 0, channels)
        if output.numel() == prediction.numel():
            return output.reshape(prediction.shape)
        if output.ndim == prediction.ndim:
            raise UnsupportedPipeline(
                f"apg cannot tell the latents in the prediction of {type(call.run.pipe).__name__}: its shape "
                f"is {tuple(prediction.shape)}, that of the sample {tuple(sample.shape)}"
            )
        return None
