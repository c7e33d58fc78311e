"""Sampling products, powers and tilts of what diffusion pipelines know, with weighted particles.

::

    fkc = FeynmanKacPipeline.from_pipe(pipe)
    image = fkc(["a red bag", "a sneaker"], weights=[1, 1], num_particles=8).images[0]
    image = fkc("a bag", guidance_scale=3.0).images[0]  # q(x)^{-2} q(x | bag)^3, and not its heuristic
    image = fkc("a bag", temperature=0.9).images[0]  # q(x | bag)^{1 / 0.9}
    image = fkc("a bag", reward=brightness, reward_scale=5.0).images[0]

References:
    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts (2025), arXiv 2503.02819.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline
from .capturing import sibling
from .experts import Expert, Experts
from .feynman_kac_accelerator import FeynmanKac
from .feynman_kac_report import FeynmanKacReport
from .particles import Particles, Rules
from .rewards import Reward, Tilt
from .run import Run
from .unguided import arguments_of, check_pipeline, condition_of, kind_of, unconditional, unguided

__all__ = ["FeynmanKacOutput", "FeynmanKacPipeline"]


@dataclass(frozen=True)
class FeynmanKacOutput:
    """What a call returns; G groups of K particles each.

    Arguments:
        images: What the pipeline makes of the drawn particles (or of all, group by group): a list of
            pictures, or an array or tensor.
        drawn: The row of each image's particle in ``latents``, (G) or (G K).
        log_weights: The final log-weights, (G, K).
        ancestors: The initial particle of its group that each descends from, (G, K).
        latents: All final particles in the scheduler's coordinates, (G K, *).
        report: What happened.
    """

    images: Any
    drawn: Tensor
    log_weights: Tensor
    ancestors: Tensor
    latents: Tensor
    report: FeynmanKacReport


class FeynmanKacPipeline:
    """Drives a pipeline with particles; make it with `from_pipe`.

    Any pipeline from noise to samples will do, with any scheduler of one evaluation a step whose noise levels
    are known: the scheduler gives the levels, and the particles make their own steps.

    Arguments:
        pipe: The pipeline, which is left as it is; calls are made by a sibling with the same components.

    Raises:
        UnsupportedPipeline: If it does not start from noise, or its scheduler makes two evaluations a step.
    """

    def __init__(self, pipe: Any) -> None:
        check_pipeline(pipe)
        self._origin, self.pipe = pipe, sibling(pipe)

    @classmethod
    def from_pipe(cls, pipe: Any) -> Self:
        """Returns the corrected pipeline of a pipeline, which is left as it is."""
        return cls(pipe)

    def __call__(
        self,
        conditions: str | int | Sequence[str | int] | None = None,
        weights: Sequence[float] | None = None,
        *,
        num_particles: int = 8,
        num_images_per_prompt: int = 1,
        temperature: float = 1.0,
        guidance_scale: float | None = None,
        negative_prompt: str | int | None = None,
        models: Sequence[Any] | None = None,
        reward: Reward | None = None,
        reward_scale: float = 1.0,
        reward_gradient: bool = False,
        zeta: float = 1.0,
        resampling: str = "systematic",
        ess_threshold: float = 0.5,
        interval: tuple[float, float] | None = None,
        data_std: float = 0.0,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        output: str = "draw",
        **call: Any,
    ) -> FeynmanKacOutput:
        """Samples the product of q(x | condition_i)^{weight_i / temperature}.

        Arguments:
            conditions: Prompts; class labels, by number or name; or None for an unconditional pipeline.
            weights: The exponents, negative ones too; 1 each by default.
            num_particles: The number K of particles of each image; the network evaluates K rows an expert.
            num_images_per_prompt: The number G of images: groups of particles that know nothing of each
                other.
            temperature: What all exponents are divided by.
            guidance_scale: The scale b: every condition stands for q^{1-b} q(. | condition)^b, the geometric
                average that guidance is meant to be.
            negative_prompt: The condition of the q of guidance; the pipeline's own by default.
            models: For each condition the pipeline that it is for: None, or another one whose latents and
                noise levels are the same and whose network is of the same kind.
            reward: A function from x0 in the scheduler's coordinates, (n, *), to n numbers, by whose
                exponential the density is multiplied; see `rewards.image_reward` for one of pictures.
            reward_scale: What it is multiplied by.
            reward_gradient: Whether the particles follow its gradient, too.
            zeta: The noise scale; above 1 it mixes better, and needs more steps.
            resampling: "systematic", "multinomial", "jump", or "none".
            ess_threshold: A group is resampled where its effective size, at least 1, is below this share of
                K: two particles need more than 0.5.
            interval: The range (lambda_min, lambda_max) of lambda = log(alpha / sigma) in which weights grow.
            data_std: 0 for pictures; large for densities without fine structure, see `feynman_kac`.
            num_inference_steps: The number of steps; the pipeline's own by default.
            generator: The source of all randomness.
            output: "draw" for one image a group, drawn from the final weights, or "all".
            call: Further arguments of the pipeline's call.

        Raises:
            OptionError: If an argument is out of range, unknown, or contradicts another.
            UnsupportedPipeline: If the pipeline cannot be driven, with the reason.
        """
        if output not in ("draw", "all"):
            raise OptionError(f"output is {output!r}; expected 'draw' or 'all'")
        if not isinstance(generator, torch.Generator | None):
            raise OptionError("generator must be one torch.Generator, for all particles move together")
        self.pipe = sibling(self._origin)  # as it is now
        check_pipeline(self.pipe)
        options = arguments_of(self.pipe, call)
        if num_inference_steps is not None:
            options["num_inference_steps"] = num_inference_steps
        chosen = self._experts(conditions, weights, models, guidance_scale, negative_prompt, temperature)
        tilt = Tilt(reward, reward_scale, reward_gradient) if reward is not None else None
        rules = Rules(
            tuple(expert.exponent for expert in chosen), num_images_per_prompt, num_particles, zeta,
            resampling, ess_threshold, interval, data_std, tilt,
        )  # fmt: skip
        experts = Experts(chosen, rules.count)
        experts.capture(self.pipe, options)
        return self._run(FeynmanKac(rules, experts, generator, output == "draw"), options)

    def _run(self, plan: FeynmanKac, options: dict[str, Any]) -> FeynmanKacOutput:
        begin = time.perf_counter()
        arguments = unguided(self.pipe, plan.experts.conditions, options)
        with Run(self.pipe, [plan], {}) as run:
            driver = run.stack[0]
            images = self.pipe(**arguments, generator=plan.generator)[0]
        assert isinstance(driver, FeynmanKac)
        particles, drawn = driver.particles, driver.drawn
        if particles is None or drawn is None:
            raise UnsupportedPipeline(f"{type(self.pipe).__name__} has left its loop before the last update")
        report = _report(particles, driver.evaluations, time.perf_counter() - begin)
        return FeynmanKacOutput(images, drawn, particles.log_weights, particles.ancestors, particles.samples,
                                report)  # fmt: skip

    def _experts(
        self,
        conditions: Any,
        weights: Sequence[float] | None,
        models: Sequence[Any] | None,
        guidance: float | None,
        negative: Any,
        temperature: float,
    ) -> list[Expert]:
        """Returns the experts, those of guidance first."""
        listed = list(conditions) if isinstance(conditions, (list, tuple)) else [conditions]
        values = [condition_of(self.pipe, condition) for condition in listed]
        if kind_of(self.pipe) == "batch_size" and models is not None and len(values) == 1:
            values = values * len(models)
        own = [None] * len(values) if models is None else [None if m is self._origin else m for m in models]
        if not isinstance(weights, (list, tuple, type(None))):
            raise OptionError(f"weights are {weights!r}; expected a list of numbers, one a condition")
        given = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
        if not len(given) == len(own) == len(values):
            raise OptionError(f"{len(values)} conditions, {len(given)} weights and {len(own)} models")
        for model in own:
            if model is not None:
                check_pipeline(model)
        if None not in own:
            raise OptionError("models must leave at least one condition to this pipeline, as None")
        if not 0 < temperature < math.inf:
            raise OptionError(f"temperature is {temperature}; expected a number above 0")
        experts = [
            Expert(value, weight / temperature, pipe)
            for value, weight, pipe in zip(values, given, own, strict=True)
        ]
        if guidance is None:
            if negative is not None:
                raise OptionError("negative_prompt is the condition of guidance; set guidance_scale, too")
            return experts
        return _guided(self.pipe, experts, guidance, negative)


def _guided(pipe: Any, experts: list[Expert], scale: float, negative: Any) -> list[Expert]:
    """Returns the experts of the geometric averages q^{1-b} q_i^b, which take the place of each q_i."""
    if not math.isfinite(scale):
        raise OptionError(f"guidance_scale is {scale}; expected a finite number")
    nulls = []
    for owner in {id(expert.pipe): expert.pipe for expert in experts}.values():
        total = math.fsum(expert.exponent for expert in experts if expert.pipe is owner)
        if (exponent := (1 - scale) * total) != 0:
            condition, options, blank = unconditional(owner or pipe, negative)
            nulls.append(Expert(condition, exponent, owner, options, blank))
    return [*nulls, *(replace(expert, exponent=scale * expert.exponent) for expert in experts)]


def _report(particles: Particles, evaluations: int, seconds: float) -> FeynmanKacReport:
    rules, history = particles.rules, particles.history
    settings = {
        "zeta": rules.zeta, "resampling": rules.resampling, "ess_threshold": rules.ess_threshold,
        "interval": rules.interval, "data_std": rules.data_std,
        "reward_scale": None if rules.tilt is None else rules.tilt.scale,
        "reward_gradient": rules.tilt is not None and rules.tilt.gradient,
    }  # fmt: skip
    return FeynmanKacReport(
        exponents=rules.exponents,
        groups=rules.groups,
        particles=rules.particles,
        settings=settings,
        log_snr=tuple(moment.log_snr if math.isfinite(moment.log_snr) else None for moment in history),
        effective=tuple(moment.effective for moment in history),
        events=tuple((step, group) for step, moment in enumerate(history)
                     for group, moved in enumerate(moment.resampled) if moved),
        log_normalizer=tuple(particles.log_normalizer.tolist()),
        weights=tuple(map(tuple, particles.log_weights.softmax(-1).tolist())),
        survivors=tuple(len(row.unique()) for row in particles.ancestors),
        evaluations=evaluations,
        seconds=seconds,
    )  # fmt: skip
