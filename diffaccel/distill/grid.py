"""The times at which a student was trained, and the stock scheduler that has exactly these, if there is one.

A scheduler fits if, called as the pipeline calls it, it gives the network the trained times and makes the
trained updates; both are found out by running it against `FixedGridScheduler`, which is right by
construction. Names of settings prove nothing: the stock grid of flow matching for two steps is (1, 0.001),
and DDIM's three trailing steps go to levels that are not those of its next timesteps.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch

from ..errors import OptionError, UnsupportedScheduler
from ..noise import is_stochastic, path_of, probe
from ..samplers import FixedGridScheduler

__all__ = ["Calls", "Grid", "Kind", "agrees", "fixed_grid", "scheduler_for", "shift_of"]

Kind = Literal["flow", "vp-ode", "x0-jump"]

_KINDS = ("flow", "vp-ode", "x0-jump")
_TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
          "rescale_betas_zero_snr", "prediction_type")  # fmt: skip
_REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError, NotImplementedError, KeyError,
             AssertionError)  # fmt: skip


@dataclass(frozen=True)
class Calls:
    """How a pipeline calls its scheduler.

    Arguments:
        arguments: What it gives ``set_timesteps``, by the number of steps.
        scales: Whether it calls ``scale_model_input``, which some schedulers of flow matching have not.
    """

    arguments: Mapping[int, Mapping[str, Any]]
    scales: bool


@dataclass(frozen=True)
class Grid:
    """The times of the steps of a student.

    Arguments:
        times: Falling times t in (0, 1] of the straight path x_t = (1 - t) x0 + t eps, one for each step. A
            model with a table of betas has the level with sigma / alpha = t / (1 - t); its noisiest level is
            below 1, and a first time of 1 is pure noise, for which the network is asked at that level.
        kind: "flow": Euler's method on a network that predicts velocities; "vp-ode": the deterministic steps
            of DDIM on a table of betas; "x0-jump": a jump to x0, and fresh noise, on either path.

    Raises:
        OptionError: If the times do not fall from at most 1 to above 0, or the kind is unknown.
    """

    times: tuple[float, ...]
    kind: Kind = "flow"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise OptionError(f"no kind of grid {self.kind!r}; known: {', '.join(_KINDS)}")
        FixedGridScheduler([self.times])

    def __len__(self) -> int:
        return len(self.times)

    @classmethod
    def uniform(cls, steps: int, kind: Kind = "flow", shift: float = 1.0) -> "Grid":
        """Returns the times k u / (1 + (k - 1) u) of u = 1, 1 - 1 / N, .., 1 / N for a shift k."""
        even = [1 - n / steps for n in range(steps)]
        return cls(tuple(shift * u / (1 + (shift - 1) * u) for u in even), kind)

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> "Grid":
        """Returns the grid that a scheduler has for a number of steps; the scheduler is left as it is.

        A student that is trained at these times can leave with this scheduler.

        Raises:
            OptionError: If its steps are ancestral, or it solves a stochastic equation.
            UnsupportedScheduler: If its levels are not known, or not those of one of these paths.
        """
        trial = copy.deepcopy(scheduler)
        trial.set_timesteps(steps)
        path, noisy = path_of(trial), is_stochastic(trial)
        if path.kind == "edm":
            raise UnsupportedScheduler(f"{type(scheduler).__name__} has neither a table of betas nor a flow")
        if noisy and "adds noise to its x0" not in noisy and "stochastic_sampling" not in noisy:
            raise OptionError(f"no grid of a scheduler that takes noise in another way: {noisy}")
        kind: Kind = "x0-jump" if noisy else "flow" if path.kind == "flow" else "vp-ode"
        return cls(tuple(level.sigma / (level.alpha + level.sigma) for level in path.levels[:-1]), kind)

    @classmethod
    def stock(cls, teacher: Any, steps: int, jump: bool = False) -> "Grid":
        """Returns the grid to train at if a student is to leave with a stock scheduler.

        Arguments:
            teacher: The scheduler of the teacher's pipeline.
            steps: The number of steps.
            jump: Whether steps jump to x0 and take fresh noise.

        Raises:
            UnsupportedScheduler: If the teacher's path is neither straight nor variance-preserving.
        """
        if probe(teacher).kind == "flow":
            return cls.uniform(steps, "x0-jump" if jump else "flow", shift_of(teacher))
        settings = {key: teacher.config[key] for key in _TABLE if key in teacher.config}
        kind = diffusers.LCMScheduler if jump else diffusers.DDIMScheduler
        return cls.of(kind(**settings, timestep_spacing="trailing", set_alpha_to_one=True), steps)


def scheduler_for(teacher: Any, grids: Grid | Sequence[Grid], calls: Calls | None = None) -> Any:
    """Returns a scheduler for a student: a stock one that has all of its grids, or a `FixedGridScheduler`.

    Arguments:
        teacher: The scheduler of the teacher's pipeline.
        grids: The grids of all numbers of steps that were trained, of one kind.
        calls: How the pipeline calls it; None for ``set_timesteps`` with the number of steps alone, and then
            schedulers that every pipeline can call come first.

    Raises:
        OptionError: If the kinds differ, or do not go with the teacher's path.
        UnsupportedScheduler: If the teacher's path is neither straight nor variance-preserving.
    """
    grids = (grids,) if isinstance(grids, Grid) else tuple(grids)
    reference = fixed_grid(teacher, grids)
    candidates = list(_candidates(reference, teacher, grids))
    if calls is None:
        candidates.sort(key=lambda candidate: not hasattr(candidate, "scale_model_input"))
    for candidate in candidates:
        if agrees(candidate, reference, calls):
            return type(candidate).from_config(candidate.config)
    return fixed_grid(teacher, grids)


def fixed_grid(
    teacher: Any, grids: Sequence[Grid], kind: type[FixedGridScheduler] = FixedGridScheduler
) -> Any:
    """Returns our own scheduler with the grids, on the teacher's path.

    Arguments:
        teacher: The scheduler of the teacher's pipeline.
        grids: The grids.
        kind: The class.

    Raises:
        OptionError: If the kinds differ, or do not go with the teacher's path.
        UnsupportedScheduler: If the teacher's path is neither straight nor variance-preserving.
    """
    kinds, path, name = {grid.kind for grid in grids}, probe(teacher), type(teacher).__name__
    if len(kinds) != 1:
        raise OptionError(f"grids of the kinds {sorted(kinds)}; expected some, of one kind")
    if path.kind == "edm":
        raise UnsupportedScheduler(f"{name} has neither a table of betas nor a straight path")
    expected = "flow" if path.kind == "flow" else "vp-ode"
    if not kinds <= {expected, "x0-jump"}:
        raise OptionError(f"{name} has a path for the kinds {expected} and x0-jump, not for {kinds.pop()}")
    settings = {key: teacher.config[key] for key in _TABLE if key in teacher.config}
    if path.kind == "flow":  # pipelines of Flux would keep their levels from one with use_flow_sigmas
        settings = {"num_train_timesteps": teacher.config.num_train_timesteps}
        settings["use_flow_sigmas"] = path.prediction_type != "flow_prediction"
    settings["prediction_type"] = path.prediction_type
    times = [list(grid.times) for grid in grids]
    return kind(times, stochastic_sampling="x0-jump" in kinds, **settings)


def agrees(candidate: Any, reference: FixedGridScheduler, calls: Calls | None = None) -> bool:
    """Returns whether a scheduler has the times and updates of another one, for all of its numbers of steps.

    Arguments:
        candidate: The scheduler in question; it is left ready for the last of the numbers.
        reference: The scheduler with the trained grids.
        calls: How the pipeline calls it; None for ``set_timesteps`` with the number of steps alone.
    """
    if getattr(candidate, "init_noise_sigma", 1.0) != 1 or candidate.order != 1:
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            return all(_same_loop(candidate, reference, count, calls) for count in reference.grids)
    except _REFUSALS:  # it does not take these arguments
        return False


def _same_loop(candidate: Any, reference: Any, count: int, calls: Calls | None) -> bool:
    """Returns whether both give a network that predicts anything the same samples at the same times."""
    candidate.set_timesteps(**({"num_inference_steps": count} if calls is None else calls.arguments[count]))
    reference.set_timesteps(count)
    own, trained = candidate.timesteps.double(), reference.timesteps.double()
    if own.shape != trained.shape or float((own - trained).abs().max()) > 1e-5 * len(reference):
        return False
    scales = hasattr(candidate, "scale_model_input") or (calls is not None and calls.scales)
    generator = torch.Generator().manual_seed(count)
    x = y = torch.randn(1, 2, 8, 8, generator=generator)
    for place in range(count):
        output = torch.randn(x.shape, generator=generator)
        if scales and not torch.equal(candidate.scale_model_input(x, candidate.timesteps[place]), x):
            return False
        x = _step(candidate, output, place, x)
        y = _step(reference, output, place, y)
        if not torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max())):
            return False
    return True


def _step(scheduler: Any, output: torch.Tensor, place: int, sample: torch.Tensor) -> torch.Tensor:
    """Makes one step, whose noise depends on nothing but its place."""
    torch.manual_seed(place)
    stepped: torch.Tensor = scheduler.step(output, scheduler.timesteps[place], sample, return_dict=False)[0]
    return stepped


def _candidates(reference: FixedGridScheduler, teacher: Any, grids: Sequence[Grid]) -> Iterator[Any]:
    """Yields the stock schedulers that may fit, the most usual first."""
    config, jump = reference.config, reference.config.stochastic_sampling
    if reference.path.is_flow:
        for shift in dict.fromkeys((1.0, shift_of(teacher), *_shifts(grids))):
            yield from _flow_candidates(config, shift, grids, jump)
        return
    settings = {key: config[key] for key in _TABLE}
    settings["steps_offset"] = teacher.config.get("steps_offset", 0)  # Stable Diffusion's pipelines want 1
    if jump:
        for steps in (50, *_divisors(config.num_train_timesteps)):
            yield diffusers.LCMScheduler(**settings, original_inference_steps=steps)
        return
    for spacing in ("trailing", "linspace", "leading"):
        yield diffusers.DDIMScheduler(**settings, timestep_spacing=spacing, clip_sample=False)
        yield diffusers.DPMSolverMultistepScheduler(**settings, timestep_spacing=spacing, solver_order=1)


def _flow_candidates(config: Any, shift: float, grids: Sequence[Grid], jump: bool) -> Iterator[Any]:
    euler, common = diffusers.FlowMatchEulerDiscreteScheduler, {"shift": shift}
    common["num_train_timesteps"] = config.num_train_timesteps
    yield euler(**common, stochastic_sampling=jump)
    if not jump:
        yield diffusers.FlowMapEulerDiscreteScheduler(**common)
    if len(grids) == 1 and len(grids[0]) > 1:
        yield euler(**common, stochastic_sampling=jump, shift_terminal=grids[0].times[-1])
    if not jump:
        yield diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps, flow_shift=shift, use_flow_sigmas=True,
            prediction_type=config.prediction_type, solver_order=1,
        )  # fmt: skip


def shift_of(teacher: Any) -> float:
    """Returns the shift of the own grids of a teacher's scheduler, where it is fixed; else 1."""
    if teacher.config.get("use_dynamic_shifting"):
        return 1.0
    return float(teacher.config.get("shift", teacher.config.get("flow_shift", 1.0)))


def _shifts(grids: Sequence[Grid]) -> list[float]:
    """Returns the shift that makes equal steps have the second time of the longest grid."""
    times = max((grid.times for grid in grids), key=len)
    if len(times) == 1 or times[1] == 1:
        return []
    even = 1 - 1 / len(times)
    shift = times[1] * (1 - even) / (even * (1 - times[1]))
    return [round(shift, 6)] if math.isfinite(shift) else []


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
