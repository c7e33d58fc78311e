"""One scheduler for all deterministic exponential integrators: what each step does is data.

References:
    | A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (2024)
    | https://arxiv.org/abs/2312.07243
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError, closest
from ..noise import NoiseLevel, prediction_coefficients, wide
from .exponential import Combination, Level, combine
from .grids import GRIDS, grid
from .paths import LARGEST, TrainingPath, betas_of, flow_settings
from .presets import SOLVERS, solver_schedule
from .schedule import KEPT, Schedule, ScheduleError, Step

__all__ = ["UnifiedSolverScheduler"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclass
class Node:
    """What is known at a node: its level, the model's prediction there in float32, and the sample."""

    level: Level
    x0: Tensor
    eps: Tensor
    sample: Tensor


class UnifiedSolverScheduler(SchedulerMixin, ConfigMixin):
    r"""Exponential integrators with free decisions per step: node, prediction, order, stencil, corrector.

    With ``schedules`` it follows the one that has as many evaluations as ``num_inference_steps``; otherwise a
    known ``solver`` on a known ``grid``. It takes the configurations of DDIM, DPM-Solver, UniPC, Euler and
    the schedulers of flow matching::

        pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, solver="dpm++3m")

    Samples and history are float32 whatever the model's type, coefficients float64; the result has the
    sample's type. The statistics of DPM-Solver-v3 are not supported: they need hours of the model's
    evaluations, and the prediction "theta" takes their place.

    Arguments:
        num_train_timesteps: The number T of training timesteps.
        beta_start: The first beta.
        beta_end: The last beta.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: The betas themselves.
        prediction_type: What the network predicts: "epsilon", "sample", "v_prediction" or "flow_prediction",
            of which the last stands for the straight path.
        rescale_betas_zero_snr: Whether the noisiest level is pure noise.
        clip_sample: Whether x0 is clipped, as DDIM does for models of pixels; eps is that of the clipped x0.
        clip_sample_range: The largest x0 then.
        use_flow_sigmas: Whether the path is straight though the prediction type is another.
        shift: The shift k of the noise levels of flow matching, t' = k t / (1 + (k - 1) t), of grids.
        flow_shift: Another name of ``shift``, as in the configurations of DPM-Solver.
        use_dynamic_shifting: Whether the shift is exp(mu), given to ``set_timesteps``.
        time_shift_type: "exponential"; "linear" if the dynamic shift is mu itself.
        solver: One of ``presets.SOLVERS``.
        grid: One of ``grids.GRIDS``.
        zeta: The noise scale: 0 is the ODE, 1 the reverse SDE; above 0 all steps must predict "sample".
        schedules: Schedules (`Schedule.to_dict`) for several numbers of evaluations; whatever levels a
            pipeline brings then only tell the number.
    """

    order = 1
    _compatibles: list[str] = []
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        solver: str = "dpm++2m",
        grid: str = "trailing",
        zeta: float = 0.0,
        schedules: Any = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise OptionError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        for what, value, table in (("solver", solver, SOLVERS), ("grid", grid, GRIDS)):
            if value not in table:
                raise OptionError(f"no {what} {value!r}; {closest(value, table)}")
        if not 0 <= zeta < math.inf:
            raise OptionError(f"zeta is {zeta}; expected 0 or more")
        if zeta and not schedules and SOLVERS[solver].prediction != "sample" and SOLVERS[solver].order > 1:
            raise OptionError(f"noise (zeta above 0) needs a solver of 'sample'; {solver!r} is none")
        flow = use_flow_sigmas or prediction_type == "flow_prediction"
        alphas = None
        if not flow:
            betas = betas_of(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                             rescale_betas_zero_snr)  # fmt: skip
            self.betas = betas.float()
            self.alphas_cumprod = (1 - betas).cumprod(0).float()
            alphas = (1 - betas).cumprod(0).tolist()
        self.path = TrainingPath(num_train_timesteps, alphas)
        self.known = [Schedule.from_dict(part) for part in schedules or ()]
        for schedule in self.known:
            self._check(schedule)
        counts = [schedule.evaluations for schedule in self.known]
        if len(set(counts)) < len(counts):
            raise ScheduleError(f"schedules of {counts} evaluations; expected one for each number")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self.schedule: Schedule | None = None
        self._begin_index: int | None = None
        self._reset()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Makes the scheduler from another one's configuration, flow matching included.

        Raises:
            UnsupportedScheduler: If the configuration is for another path.
        """
        if isinstance(config, Mapping):
            kwargs = {**flow_settings(config), **kwargs}
            # the defaults of the other class may be other than ours
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step, where a pipeline begins in mid-schedule."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the first step, for image-to-image."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the schedule of the next run.

        Arguments:
            num_inference_steps: The number of the network's evaluations.
            device: Where the timesteps are to be.
            timesteps: Training times of the evaluations, falling, whole or not.
            sigmas: Noise levels of the evaluations: sigma / alpha, or for flow matching the noise's share;
                a last 0 may be given. The equal steps that pipelines of flow matching pass by themselves are
                no more than their number.
            mu: The logarithm of the shift, with ``use_dynamic_shifting``.

        Raises:
            OptionError: If neither is given, or both timesteps and sigmas.
            ScheduleError: If the levels do not fall, or no schedule has this number of evaluations.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            raise OptionError("give num_inference_steps, timesteps or sigmas")
        if timesteps is not None and sigmas is not None:
            raise OptionError("give timesteps or sigmas, not both")
        if sigmas is not None and self.path.is_flow and _are_equal_steps(sigmas):
            num_inference_steps, sigmas = len(sigmas), None
        self.schedule = self._choose(num_inference_steps, timesteps, sigmas, mu)
        self._check(self.schedule)
        self.levels = [self.path.level(sigma) for sigma in self.schedule.sigmas]
        skipped = self.schedule.skipped
        evaluated = self.schedule.sigmas[skipped:-1]
        times = [self.path.time(sigma) for sigma in evaluated]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        shown = [level.sigma if self.path.is_flow else level.ratio for level in self.levels[skipped:]]
        self.sigmas = torch.tensor(shown, dtype=torch.float32)
        self.num_inference_steps = len(times)
        self._begin_index = None
        self._reset()

    def _choose(self, count: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> Schedule:
        solver, grid_name = self.config.solver, self.config.grid
        if self.known:  # Flux and others always bring levels of their own
            given = (
                timesteps if sigmas is None else [sigma for sigma in sigmas if sigma]
            )  # a last 0 is no level
            return self._found(len(given) if count is None else count)
        if timesteps is not None:
            return self._on([self.path.ratio(float(time)) for time in timesteps])
        if sigmas is not None:
            values = [float(sigma) for sigma in sigmas]
            return self._on([self._shifted(s / (1 - s) if s < 1 else LARGEST, mu) for s in values]
                            if self.path.is_flow else values)  # fmt: skip
        assert count is not None
        nodes = grid(grid_name, count, self.path)
        return solver_schedule(solver, tuple(self._shifted(sigma, mu) for sigma in nodes))

    def _found(self, count: int) -> Schedule:
        """Returns the schedule for a number of evaluations."""
        found = {schedule.evaluations: schedule for schedule in self.known}
        if count not in found:
            counts = ", ".join(str(number) for number in sorted(found))
            raise ScheduleError(f"no schedule for {count} evaluations; there are some for {counts}")
        return found[count]

    def _on(self, ratios: list[float]) -> Schedule:
        if not ratios or ratios[-1] != 0:
            ratios = [*ratios, 0.0]
        return solver_schedule(self.config.solver, tuple(ratios))

    def _shifted(self, ratio: float, mu: float | None) -> float:
        """Returns a shifted ratio: flow matching's shift multiplies it."""
        if not self.path.is_flow or ratio >= LARGEST:
            return ratio
        if self.config.use_dynamic_shifting:
            if mu is None:
                raise OptionError("use_dynamic_shifting needs mu in set_timesteps")
            return ratio * (mu if self.config.time_shift_type == "linear" else math.exp(mu))
        return ratio * (self.config.shift if self.config.shift != 1 else self.config.flow_shift)

    def _check(self, schedule: Schedule) -> None:
        """Checks that this model can follow a schedule."""
        if schedule.sigmas[0] > self.path.largest * 1.001:
            raise ScheduleError(
                f"a schedule from sigma / alpha = {schedule.sigmas[0]:.4g} on; this model knows up to "
                f"{self.path.largest:.4g}: it is one of another family of models"
            )
        path = dict(schedule.facts.get("family") or {}).get("path", self.path.name)
        if path != self.path.name:
            raise ScheduleError(
                f"a schedule for the path {path}; this model's is {self.path.name}: "
                "it is one of another family of models"
            )
        evaluated = min(schedule.sigmas[schedule.skipped : -1])
        if evaluated < self.path.smallest * 0.999:
            raise ScheduleError(
                f"a schedule with an evaluation at sigma / alpha = {evaluated:.4g}; this model knows down to "
                f"{self.path.smallest:.4g}"
            )
        if self.config.zeta and any(step.prediction != "sample" for step in schedule.steps):
            raise ScheduleError("noise (zeta above 0) needs the prediction 'sample' in all steps")
        if self.config.zeta and schedule.skipped:
            raise ScheduleError("noise (zeta above 0) needs an evaluation at the first step")
        first = schedule.steps[0]
        if schedule.sigmas[0] > 1e3 and first.prediction == "epsilon":
            raise ScheduleError("the first step leaves pure noise, which 'epsilon' cannot; use 'sample'")

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._nodes: list[Node] = []
        self._pending: tuple[Step, list[Node], int, Tensor | None] | None = None
        self._advanced = self._late = False

    def _index_of(self, timestep: Any) -> int:
        """Returns the place of a timestep, the first step where a pipeline has not said another."""
        if self._begin_index is not None:
            return self._begin_index
        distance = (self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs()
        return int(distance.argmin())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the network's input; only an analytic first step changes it.

        Arguments:
            sample: The sample, with shape (B, *).
            timestep: The timestep.
        """
        if self.schedule is None:
            raise OptionError("call set_timesteps first")
        if self._analytic_pending(timestep):
            self._advanced = True
            return sample * self._advance()
        return sample

    def _analytic_pending(self, timestep: Any) -> bool:
        assert self.schedule is not None
        if not self.schedule.skipped or self._step_index is not None:
            return False
        return self._index_of(timestep) == 0

    def _analytic(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x0 and eps that stand for the first evaluation."""
        assert self.schedule is not None
        level = self.levels[0]
        if self.schedule.analytic_first == "mean":
            return torch.zeros_like(sample), sample / level.sigma
        eps = sample / math.hypot(level.alpha, level.sigma)
        return (sample - level.sigma * eps) / level.alpha, eps

    def _advance(self) -> float:
        """Returns the factor by which the analytic first step multiplies the sample."""
        assert self.schedule is not None
        one = torch.ones((), dtype=torch.float64)
        x0, eps = self._analytic(one)
        step = combine(self.schedule.steps[0], self.levels[:1], self.levels[1], 1, std=self.schedule.std)
        return float(step.sample + step.x0[0] * x0 + step.eps[0] * eps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Makes one step.

        Arguments:
            model_output: The network's prediction, guided, with shape (B, *).
            timestep: The timestep that it was made for.
            sample: The sample, with shape (B, *).
            eta: The noise of DDIM, which pipelines pass on; must be 0, ``zeta`` is the noise of this solver.
            use_clipped_model_output: Another argument of DDIM; must be off.
            generator: The source of noise, where ``zeta`` is above 0.
            return_dict: Whether to return a `SchedulerOutput` instead of a tuple.

        Raises:
            OptionError: If ``set_timesteps`` was not called, or the pipeline does not scale the network's
                input, which an analytic first step needs.
        """
        if self.schedule is None or self.num_inference_steps is None:
            raise OptionError("call set_timesteps first")
        if eta or use_clipped_model_output:
            raise OptionError("eta and use_clipped_model_output are DDIM's; the noise of this solver is zeta")
        x = wide(sample)
        if self._step_index is None:
            x = self._begin(timestep, x)
        assert self._step_index is not None
        place = self._step_index + self.schedule.skipped
        level = self.levels[place]
        x0, eps = self._convert(wide(model_output), x, level)
        x = self._correct(level, x0, eps, x)
        self._nodes = [Node(level, x0, eps, x), *self._nodes][:KEPT]
        result = self._predict(place, generator, sample)
        self._step_index += 1
        prev_sample = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _begin(self, timestep: Any, x: Tensor) -> Tensor:
        """Finds the first step, and makes the analytic one before it."""
        pending = self._analytic_pending(timestep)
        self._step_index = self._index_of(timestep)
        self._late = self._step_index > 0
        if not pending:
            return x
        if not self._advanced:
            raise OptionError(
                "this pipeline does not call scale_model_input, which an analytic first step needs"
            )
        x0, eps = self._analytic(x)
        self._nodes = [Node(self.levels[0], x0, eps, x)]
        return x * self._advance()

    def _convert(self, output: Tensor, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Returns x0 and eps."""
        p, q = prediction_coefficients(self.config.prediction_type, level.alpha, level.sigma)
        known = NoiseLevel(level.alpha, level.sigma, p, q)
        x0 = known.x0(output, x)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0, (x - level.alpha * x0) / level.sigma

    def _correct(self, level: Level, x0: Tensor, eps: Tensor, x: Tensor) -> Tensor:
        """Returns the sample as the new evaluation corrects it; the evaluation itself is kept."""
        if self._pending is None:
            return x
        (step, nodes, order, noise), self._pending = self._pending, None
        points = None if step.points is None else (0, *(j + 1 for j in step.points))
        shifted = replace(step, start=step.start + 1, points=points, estimate=0)
        known = [Node(level, x0, eps, x), *nodes]
        rule = combine(shifted, [node.level for node in known], level, order + 1, self.config.zeta, self._std,
                       scaled=order == 1)  # fmt: skip
        return _apply(rule, known, known[shifted.start].sample, noise)

    @property
    def _std(self) -> float:
        assert self.schedule is not None
        return self.schedule.std

    def _predict(self, place: int, generator: Any, like: Tensor) -> Tensor:
        assert self.schedule is not None
        step, nodes = self.schedule.steps[place], self._nodes
        order = min(step.order, len(nodes))
        step = replace(step, start=min(step.start, len(nodes) - 1))
        if self._late:
            step = replace(step, corrections=())  # they were fitted to a whole run
        rule = combine(step, [node.level for node in nodes], self.levels[place + 1], order, self.config.zeta,
                       self._std)  # fmt: skip
        noise = None
        if rule.noise:
            kind = nodes[0].sample.dtype
            noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=kind)
        if step.corrector:
            self._pending = step, nodes, order, noise
        result = _apply(rule, nodes, nodes[step.start].sample, noise)
        if self.schedule.unit_scale and place == len(self.schedule.steps) - 1:
            result = result / self.levels[-1].alpha
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns noisy samples alpha x0 + sigma eps at some timesteps.

        Before a run with an analytic first step, its first timestep stands for the node that the run starts
        from.

        Arguments:
            original_samples: Clean samples (B, *).
            noise: Noise (B, *).
            timesteps: Training times (B).
        """
        levels = [self._level_of(float(time)) for time in timesteps.flatten().tolist()]
        shape = (-1, *([1] * (original_samples.ndim - 1)))
        alpha = original_samples.new_tensor([level.alpha for level in levels]).reshape(shape)
        sigma = original_samples.new_tensor([level.sigma for level in levels]).reshape(shape)
        return alpha * original_samples + sigma * noise

    def _level_of(self, time: float) -> Level:
        if self._step_index is None and self.schedule and self.schedule.skipped:
            if time == float(self.timesteps[0]):
                return self.levels[0]
        return self.path.level(self.path.ratio(time))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Returns noisy samples, as the pipelines of flow matching ask for them."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        """Returns the number of training timesteps."""
        return int(self.config.num_train_timesteps)


def _are_equal_steps(sigmas: Sequence[float]) -> bool:
    """Returns whether the levels are 1, 1 - 1 / N, .., 1 / N."""
    count = len(sigmas)
    return all(abs(float(sigma) - (1 - n / count)) < 1e-6 for n, sigma in enumerate(sigmas))


def _apply(rule: Combination, nodes: Sequence[Node], start: Tensor, noise: Tensor | None) -> Tensor:
    """Returns the combination of the nodes' tensors and fresh noise."""
    result = rule.sample * start
    for factor_x0, factor_eps, node in zip(rule.x0, rule.eps, nodes, strict=True):
        if factor_x0:
            result = result + factor_x0 * node.x0
        if factor_eps:
            result = result + factor_eps * node.eps
    return result if noise is None else result + rule.noise * noise
