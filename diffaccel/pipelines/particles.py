"""Groups of weighted particles on their way from noise to data: what is known of each, moved as a whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline, closest
from ..noise import NoiseLevel, wide
from .feynman_kac import blend, exposure, moves, per_particle, total_of
from .resampling import RESAMPLERS, effective_size, log_mean, multinomial
from .rewards import Tilt

__all__ = ["Moment", "Particles", "Rules"]


@dataclass(frozen=True)
class Rules:
    """How particles are weighted, moved and resampled.

    Arguments:
        exponents: The exponents b_i of the E experts; their sum must be positive.
        groups: The number G of independent groups.
        particles: The number K of particles in a group.
        zeta: The noise scale: 1 is the reverse SDE, more mixes better and reduces the variance of weights.
        resampling: "systematic", "multinomial", "jump", or "none".
        ess_threshold: A group is resampled where its effective size, at least 1, is below this share of K:
            two particles need more than 0.5.
        interval: The range of lambda = log(alpha / sigma) in which weights grow, or None for all.
        data_std: The tau of `feynman_kac`: 0 for pictures, large for densities without fine structure.
        tilt: A reward, or None.

    Raises:
        OptionError: If one of these is out of range, or they contradict each other.
    """

    exponents: tuple[float, ...]
    groups: int = 1
    particles: int = 8
    zeta: float = 1.0
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    interval: tuple[float, float] | None = None
    data_std: float = 0.0
    tilt: Tilt | None = None

    def __post_init__(self) -> None:
        total_of(self.exponents)
        self._check_numbers()
        if self.resampling not in RESAMPLERS:
            raise OptionError(f"no resampling {self.resampling!r}; {closest(self.resampling, RESAMPLERS)}")
        if self.resampling != "none" and self.particles == 1:
            raise OptionError("one particle cannot be resampled; use more, or resampling='none'")
        if self.resampling != "none" and self.zeta == 0:
            raise OptionError("without noise (zeta=0) copies never part; use zeta=1, or resampling='none'")
        if self.tilt is not None and self.tilt.gradient and self.zeta == 0:
            raise OptionError("reward_gradient shifts the noise, and zeta=0 has none; use zeta=1")

    def _check_numbers(self) -> None:
        for what, number in (("num_particles", self.particles), ("num_images_per_prompt", self.groups)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise OptionError(f"{what} is {number!r}; expected a whole number, at least 1")
        if not 0 <= self.zeta < math.inf:
            raise OptionError(f"zeta is {self.zeta}; expected 0 or more")
        if not 0 <= self.data_std < math.inf:
            raise OptionError(f"data_std is {self.data_std}; expected 0 or more")
        if not 0 <= self.ess_threshold <= 1:
            raise OptionError(f"ess_threshold is {self.ess_threshold}; expected 0 to 1")
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise OptionError(f"interval {self.interval} is empty; expected (lambda_min, lambda_max)")

    @property
    def count(self) -> int:
        """The number n = G K of all particles."""
        return self.groups * self.particles


@dataclass(frozen=True)
class Moment:
    """What happened at one evaluation.

    Arguments:
        log_snr: Its lambda = log(alpha / sigma).
        effective: The effective sizes of the groups, before resampling.
        resampled: Whether the groups were resampled.
    """

    log_snr: float
    effective: tuple[float, ...]
    resampled: tuple[bool, ...]


class Particles:
    """G groups of K particles; the rows of all tensors of samples are (group, particle), group by group.

    A step needs one number of each particle on the CPU, where the weights are kept: one transfer a step.

    Arguments:
        rules: How they are weighted, moved and resampled.
        noise: The initial samples, with shape (n, *): as for a single density, at the first level.
        generator: The source of all randomness, or None for torch's own.
    """

    def __init__(self, rules: Rules, noise: Tensor, generator: torch.Generator | None = None) -> None:
        self.rules, self.generator = rules, generator
        self.total = total_of(rules.exponents)
        self.samples = wide(noise) / math.sqrt(self.total)  # the prior of the target is N(0, I / B)
        shape = (rules.groups, rules.particles)
        self.log_weights = torch.zeros(shape, dtype=torch.float64)
        self.ancestors = torch.arange(rules.particles).expand(shape)
        """The initial particle of its group, (G, K), that each descends from."""
        self.history: list[Moment] = []
        self._normalizer = torch.zeros(rules.groups, dtype=torch.float64)
        self._potential = self._ratio = torch.zeros(len(noise), device=noise.device)
        self._resampler = RESAMPLERS[rules.resampling]

    @property
    def log_normalizer(self) -> Tensor:
        """The estimates, (G), of log Z(now) / Z(first level), Z being the integral of prod q_i^{b_i} over y.

        The coordinates are y = x / alpha.  Where weights grow in an interval only it is their normalizer.
        """
        return self._normalizer + log_mean(self.log_weights)

    def step(self, levels: Sequence[NoiseLevel], outputs: Tensor, target: NoiseLevel) -> Tensor:
        """Weighs, resamples and moves the particles; returns their samples at the target, (n, *).

        The last step (target without noise) ends at the predicted x0, and leaves the weights for `draw`.

        Arguments:
            levels: The level of the samples with the E experts' kinds of output.
            outputs: What the experts predict, with shape (E, n, *).
            target: The level to go to.

        Raises:
            UnsupportedPipeline: If weights are not finite.
        """
        level, rules = levels[0], self.rules
        x = self.samples
        found = blend(torch.stack([one.eps(out, x) for one, out in zip(levels, outputs, strict=True)]),
                      rules.exponents)  # fmt: skip
        x0 = self._x0(levels, outputs, found.mean)
        growth = exposure(level, target, rules.interval, rules.data_std).increment(found)
        gradient = None
        if rules.tilt is not None:
            value, gradient = rules.tilt.values(x0)
            strength = rules.tilt.scale if target.sigma == 0 else rules.tilt.strength(level)
            growth = growth + (strength * value - self._potential + self._ratio)
            self._potential = strength * value
        rows = self._weigh(level, growth, last=target.sigma == 0)
        mean, step = found.mean, moves(level, target, self.total, rules.zeta, rules.data_std)
        if rows is not None:
            rows = rows.to(x0.device)
            x0, mean, self._potential = x0[rows], mean[rows], self._potential[rows]
            gradient = gradient if gradient is None else gradient[rows]
        self.samples = step.move(x0, mean, self._noise(gradient, target, step.noise))
        return self.samples

    def draw(self) -> Tensor:
        """Returns one particle of each group, (G), drawn from the weights."""
        return multinomial(self.log_weights, self._uniforms(1))[:, 0]

    def _x0(self, levels: Sequence[NoiseLevel], outputs: Tensor, mean: Tensor) -> Tensor:
        """Returns x0 = sum b_i x0_i / B, (n, *)."""
        if levels[0].alpha > 0:
            return (self.samples - levels[0].sigma * mean) / levels[0].alpha
        predicted = zip(self.rules.exponents, levels, outputs, strict=True)  # eps says nothing of x0 here
        parts = [b / self.total * one.x0(out, self.samples) for b, one, out in predicted]
        return torch.stack(parts).sum(0)

    def _noise(self, gradient: Tensor | None, target: NoiseLevel, scale: float) -> Tensor:
        """Returns the standard normal noise of a step, (n, *), shifted along a gradient."""
        x = self.samples
        if scale == 0:
            self._ratio = torch.zeros_like(self._ratio)
            return torch.zeros_like(x)
        noise = randn_tensor(tuple(x.shape), generator=self.generator, device=x.device, dtype=x.dtype)
        if gradient is None or self.rules.tilt is None:
            return noise
        shift = self.rules.tilt.shift(gradient, target, scale)
        self._ratio = -per_particle(shift * (shift / 2 + noise))
        return noise + shift

    def _weigh(self, level: NoiseLevel, growth: Tensor, last: bool) -> Tensor | None:
        """Adds to the log-weights and resamples; returns the parents' rows, (n), or None if all stay."""
        count, groups = self.rules.particles, self.rules.groups
        self.log_weights = self.log_weights + growth.reshape(groups, count).to("cpu", torch.float64)
        if not bool(self.log_weights.isfinite().all()):
            raise UnsupportedPipeline(
                f"the weights at log-SNR {level.log_snr:.3g} are not finite: the networks' outputs overflow; "
                "use float32, smaller weights, or an interval"
            )
        effective = effective_size(self.log_weights)
        parents = None if last else self._parents(effective)
        own = torch.arange(count).expand(groups, count)
        moved = torch.zeros(groups, dtype=torch.bool) if parents is None else (parents != own).any(1)
        self.history.append(Moment(level.log_snr, tuple(effective.tolist()), tuple(moved.tolist())))
        if parents is None or not bool(moved.any()):
            return None
        self.ancestors = self.ancestors.gather(1, parents)
        return (parents + count * torch.arange(groups)[:, None]).flatten()

    def _parents(self, effective: Tensor) -> Tensor | None:
        """Returns the parents (G, K), and resets the weights of the groups that are resampled."""
        if self._resampler is None:
            return None
        count = self.rules.particles
        acts = effective < self.rules.ess_threshold * count
        if self._resampler.always:
            acts = torch.ones_like(acts)
        # drawn whether needed or not, so that the random numbers of a group do not depend on the others
        uniforms = self._uniforms(self._resampler.uniforms(count))
        drawn = self._resampler.parents(self.log_weights, uniforms)
        self._normalizer = self._normalizer + torch.where(acts, log_mean(self.log_weights), 0.0)
        self.log_weights = torch.where(acts[:, None], 0.0, self.log_weights)
        return torch.where(acts[:, None], drawn, torch.arange(count))

    def _uniforms(self, count: int) -> Tensor:
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        shape = (self.rules.groups, count)
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=device).cpu()
