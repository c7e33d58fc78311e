"""The path: how much signal and noise a scheduler's samples hold, and what its network predicts.

A step index ``i`` of a scheduler stands for the pair

    sample = alpha x0 + sigma eps        (the tensor that ``scheduler.step`` receives)
    output = p x0 + q eps                (the tensor that the network predicts)

and these two equations, solved for ``x0`` and ``eps``, give every conversion between predictions; their
determinant is ``K = alpha q - sigma p``.  `schedulers` alone knows where a scheduler keeps its levels.

| kind | sample                | levels from                         | time t             | velocity dx/dt |
|------|-----------------------|-------------------------------------|--------------------|----------------|
| vp   | alpha^2 + sigma^2 = 1 | alphas_cumprod, or sigmas[i] = S    | (n + 1) / T        | phi'(t) v      |
| ve   | alpha = 1, sigma = S  | sigmas[i] = S                       | as vp, in VP units | as vp          |
| edm  | alpha = 1             | sigmas[i]                           | sigma              | eps            |
| flow | alpha = 1 - sigma     | sigmas[i]                           | sigma              | eps - x0       |

References:
    Stochastic Interpolants: A Unifying Framework for Flows and Diffusions (2023), arXiv 2303.08797.
    Elucidating the Design Space of Diffusion-Based Generative Models (2022), arXiv 2206.00364 (edm).
"""

from .path import Kind, NoiseLevel, Path, Prediction, prediction_coefficients, wide
from .schedulers import family_name, is_stochastic, path_of, probe, trial_of

__all__ = [
    "Kind",
    "NoiseLevel",
    "Path",
    "Prediction",
    "family_name",
    "is_stochastic",
    "path_of",
    "prediction_coefficients",
    "probe",
    "trial_of",
    "wide",
]
