"""Known solvers as decisions: DDIM, DPM-Solver++, DEIS, UniPC, iPNDM with the weights of its grid, and theta.

References:
    | Denoising Diffusion Implicit Models (2020), https://arxiv.org/abs/2010.02502
    | DPM-Solver++ (2022), https://arxiv.org/abs/2211.01095
    | Fast Sampling of Diffusion Models with Exponential Integrator (2022), https://arxiv.org/abs/2204.13902
    | UniPC (2023), https://arxiv.org/abs/2302.04867
"""

from collections.abc import Mapping
from dataclasses import replace

from ..errors import OptionError, closest
from .schedule import Schedule, Step

__all__ = ["SOLVERS", "solver_schedule"]

SOLVERS: Mapping[str, Step] = {
    "ddim": Step(1, "epsilon"),
    "dpm++1": Step(1),
    "dpm++2m": Step(2, scaling="bh2"),
    "dpm++2m-heun": Step(2),
    "dpm++3m": Step(3, scaling="bh2"),
    "dpm++3m-damped": Step(3, scaling="bh2", damping=0.5),
    "deis2": Step(2, "epsilon"),
    "deis3": Step(3, "epsilon"),
    "unip2": Step(2, scaling="bh2"),
    "unip3": Step(3, scaling="bh2"),
    "unip4": Step(4, scaling="bh2"),
    "unipc1": Step(1, scaling="bh2", corrector=True),
    "unipc2": Step(2, scaling="bh2", corrector=True),
    "unipc3": Step(3, scaling="bh2", corrector=True),
    "ipndm4": Step(4, "theta"),
    "theta2": Step(2, "theta"),
    "theta3": Step(3, "theta"),
}
"""The step that a solver repeats, at the beginning with a lower order.

DPM-Solver++ of order 3 has the whole second derivative, of which diffusers' has half ("dpm++3m-damped", order
2, and smaller errors below some 20 evaluations). "ipndm4" is Adams-Bashforth in the angle with the weights of
the actual grid and data of standard deviation 1; diffusers' has those of equal steps.
"""

STD = {"ipndm4": 1.0}


def solver_schedule(name: str, sigmas: tuple[float, ...]) -> Schedule:
    """Returns the schedule of a known solver on a grid.

    Arguments:
        name: One of ``SOLVERS``.
        sigmas: The ratios of the nodes.

    Raises:
        OptionError: If there is no such solver.
        ScheduleError: If the nodes do not fall.
    """
    if name not in SOLVERS:
        raise OptionError(f"no solver {name!r}; {closest(name, SOLVERS)}")
    step, count = SOLVERS[name], len(sigmas) - 1
    steps = []
    for number in range(count):
        possible = step.at(number, to_zero=sigmas[number + 1] == 0, last=number == count - 1)
        if possible.order > 2:  # a scaling is for one node that estimates the derivative
            possible = replace(possible, scaling="none")
        steps.append(possible)
    return Schedule(sigmas, tuple(steps), std=STD.get(name, 0.5))
