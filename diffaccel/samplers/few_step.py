r"""Few-step recipes: two-stage grids that stop at some noise, which the decoder of a latent model takes away.

Stage 1 is a Karras grid S of M ratios from the noisiest to the cleanest level; the ratio S_q cuts it. Stage 2
puts n + 1 nodes on a Karras grid of the training *times* from the noisiest to that of S_q, with rho = 1.2.
The sample is decoded as y = x / alpha.

References:
    | Hyperparameters are all you need: Using five-step inference for an original diffusion model to generate
    | images comparable to the latest distillation model (2025), https://arxiv.org/abs/2510.02390
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..pipelines.accelerator import option
from .family import SolverAccelerator, solver_of
from .grids import karras
from .paths import TrainingPath
from .schedule import Schedule, Step

__all__ = ["RECIPES", "FewStep", "Recipe", "recipe_schedule"]

RHO_TIME = 1.2
DECODERS = ("vae", "movq", "vqvae")
"""The components that decode latents, by name."""


class Recipe(NamedTuple):
    """One recipe.

    Arguments:
        steps: The evaluations n.
        first: The nodes M of the first stage.
        rho: The exponent of the first stage.
        cut: The node q where it is cut.
        order: The solver's order from the second step on.
    """

    steps: int
    first: int
    rho: float
    cut: int
    order: int


RECIPES: Mapping[str, Recipe] = {
    "4": Recipe(4, 8, 5.0, 5, 1),
    "5": Recipe(5, 8, 5.0, 6, 1),
    "6": Recipe(6, 8, 5.0, 6, 1),
    "7": Recipe(7, 12, 10.0, 7, 2),
    "8": Recipe(8, 12, 7.0, 9, 2),
    "8-plain": Recipe(8, 12, 7.0, 8, 2),
    "xl-4": Recipe(4, 8, 3.25, 6, 1),
    "xl-5": Recipe(5, 8, 5.0, 6, 1),
    "xl-6": Recipe(6, 8, 5.0, 6, 1),
    "xl-7": Recipe(7, 12, 12.0, 7, 2),
    "xl-8": Recipe(8, 12, 12.0, 10, 2),
    "xl-8-plain": Recipe(8, 12, 12.0, 9, 2),
}
"""The recipes by name; "xl" are those of SDXL."""


def recipe_times(recipe: Recipe, path: TrainingPath) -> list[float]:
    """Returns the n + 1 training times of a recipe on a model's path."""
    ratios = karras(recipe.first, path.noisiest, path.smallest, recipe.rho)
    return karras(recipe.steps + 1, path.steps - 1, path.time(ratios[recipe.cut]), RHO_TIME).tolist()


def recipe_ratio(time: float, path: TrainingPath) -> float:
    """Returns sigma / alpha at a time, whole or not; alpha^2 is interpolated linearly, as in the recipe."""
    if path.is_flow:
        return path.ratio(time)
    table = np.asarray(path.alphas_cumprod, dtype=np.float64)
    alpha2 = float(np.interp(time, np.arange(len(table)), table))
    return float(np.sqrt((1 - alpha2) / alpha2))


def recipe_schedule(recipe: Recipe, path: TrainingPath, final_denoise: bool = False) -> Schedule:
    """Returns a recipe's schedule for a model's path.

    Arguments:
        recipe: The recipe.
        path: The model's path.
        final_denoise: Whether one more evaluation takes the last noise away.
    """
    sigmas = [recipe_ratio(time, path) for time in recipe_times(recipe, path)]
    steps = [Step(min(recipe.order, n + 1), scaling="bh2" if recipe.order > 1 and n else "none")
             for n in range(recipe.steps)]  # fmt: skip
    if final_denoise:
        sigmas, steps = [*sigmas, 0.0], [*steps, Step()]
    return Schedule(tuple(sigmas), tuple(steps), unit_scale=True)


@dataclass
class FewStep(SolverAccelerator):
    """Samples by a recipe of 4 to 8 evaluations: ``accel="few-step:8"``.

    The call's num_inference_steps must be the recipe's. The recipes were found for SD 1.5 and SDXL and are
    computed for the model's own path. The first x / alpha is the pipeline's, sqrt(1 + S^2) z, where the
    published code has S z (1.0023 times less for SD). That the noise which is left does no harm is a
    property of the decoder, so that models without one should use ``final_denoise``, which costs one
    evaluation more.

    Left out: FreeU, which the published code switches on in some steps (in none by default, but for SDXL of 5
    and 6 steps), and the learned "golden noise".

    Arguments:
        recipe: One of ``RECIPES``.
        final_denoise: Whether one more evaluation takes the last noise away.
    """

    name: ClassVar[str] = "few-step"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: {"recipe": name} for name in RECIPES}
    trials: ClassVar[Mapping[str, Sequence[Any]]] = {"recipe": ("8", "6", "5", "4")}

    recipe: str = option("8", choices=tuple(RECIPES))
    final_denoise: bool = option(False)

    def check(self, pipe: Any) -> str | None:
        """Returns why the pipeline's path has no such schedule."""
        if reason := super().check(pipe):
            return reason
        decoders = (getattr(pipe, name, None) for name in DECODERS)
        if not self.final_denoise and all(decoder is None for decoder in decoders):
            return "it has no decoder to take the last noise away; use few-step with final_denoise=True"
        return None

    def step_counts(self, pipe: Any) -> Sequence[int]:
        """Returns the recipe's number of steps."""
        return (RECIPES[self.recipe].steps + self.final_denoise,)

    def scheduler(self, pipe: Any, given: Mapping[str, Any]) -> Any:
        """Returns the solver with the recipe's schedule."""
        path = solver_of(pipe.scheduler).path
        schedule = recipe_schedule(RECIPES[self.recipe], path, self.final_denoise)
        return solver_of(pipe.scheduler, schedules=[schedule.to_dict()])
