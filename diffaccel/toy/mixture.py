r"""An exact Gaussian mixture as an ordinary diffusers model: score, x0, eps and density in closed form.

The data are sum_k w_k N(mu_k, std^2 I), so a sample = alpha x0 + sigma eps has the marginal

    p(x) = sum_k w_k N(x; alpha mu_k, var I),    var = alpha^2 std^2 + sigma^2,

and with the probability r_k(x) of component k behind x and mu(x) = sum_k r_k(x) mu_k

    score = -(x - alpha mu(x)) / var,    eps = -sigma score,    x0 = mu(x) - alpha std^2 score.

References:
    Stochastic Interpolants: A Unifying Framework for Flows and Diffusions (2023), arXiv 2303.08797.
"""

import math
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from ..errors import OptionError

__all__ = ["GaussianMixtureModel", "toy_t"]

Scale = float | Tensor


class GaussianMixtureModel(ModelMixin, ConfigMixin):
    """Creates a mixture of isotropic Gaussians that predicts like a trained, perfect denoiser.

    It serves as ``unet=`` of `diffusers.DDIMPipeline` and others, with any scheduler, and computes in float64
    after ``.double()``.  The means are a buffer, saved with the model; set others with `from_means`.

    Arguments:
        num_components: The number K of components, at least 1.
        in_channels: The channels C of a sample.
        sample_size: The height and width of a sample, or both in one number.
        seed: The seed of the means, drawn from N(0, mean_std^2 I).
        mean_std: The standard deviation of the means.
        std: The standard deviation of every component; 0 makes them points.
        weights: The K weights, normalised here; equal by default.
        num_classes: Component k has the class k modulo this; by default each component is a class.
        prediction_type: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"flow_prediction"``.
        path: ``"vp"`` with the betas below, or ``"flow"`` with t = timestep / num_train_timesteps.
        num_train_timesteps: The number of betas, or the timestep of pure noise of a flow.
        beta_start: The first beta.
        beta_end: The last beta.
        beta_schedule: ``"scaled_linear"``, ``"linear"`` or ``"squaredcos_cap_v2"``, as in diffusers.

    Raises:
        OptionError: If an argument is out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_components: int = 6,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 4,
        seed: int = 0,
        mean_std: float = 1.0,
        std: float = 0.25,
        weights: list[float] | None = None,
        num_classes: int | None = None,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        path: Literal["vp", "flow"] = "vp",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
    ) -> None:
        super().__init__()
        if prediction_type not in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            raise OptionError(f"unknown prediction_type {prediction_type!r}")
        if path not in ("vp", "flow"):
            raise OptionError(f"path must be 'vp' or 'flow', not {path!r}")
        masses = torch.tensor(weights or [1.0] * num_components, dtype=torch.float64)
        if len(masses) != num_components or masses.min() <= 0 or std < 0:
            raise OptionError(f"need {num_components} positive weights and std >= 0, got {weights} and {std}")
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        generator = torch.Generator("cpu").manual_seed(seed)
        means = mean_std * torch.randn(num_components, in_channels, *size, generator=generator)
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (masses / masses.sum()).log().float())
        self.means: Tensor
        self.log_weights: Tensor
        if path == "vp":
            betas = DDIMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule)
            abars = betas.alphas_cumprod.double()
            self._log_ratios = ((1 - abars) / abars).log() / 2  # log(sigma / alpha); no buffer, stays float64

    @classmethod
    def from_means(cls, means: Tensor, **options: Any) -> "GaussianMixtureModel":
        """Returns a mixture with the given means (K, C, H, W); ``options`` are those of the class."""
        count, channels, *size = means.shape
        model = cls(num_components=count, in_channels=channels, sample_size=tuple(size), **options)
        model.means = means.detach().clone()
        return model.to(means.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Scale,
        *conditions: Any,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **more_conditions: Any,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts what ``prediction_type`` says; conditions other than the labels are ignored.

        Arguments:
            sample: The noisy sample in VP or flow form, with shape (B, C, H, W).
            timestep: The timestep, with shape () or (B), possibly fractional.
            conditions: Ignored.
            class_labels: Integers with shape (B), restricting the mixture to a class of components; a label
                outside of 0 .. num_classes - 1 restricts nothing.
            return_dict: Whether to return an output object instead of a tuple.
            more_conditions: Ignored.

        Returns:
            The prediction, with shape (B, C, H, W) and the dtype of the sample.
        """
        alpha, sigma = self.level(timestep)
        x0, score = self._posterior(sample, alpha, sigma, class_labels)
        alpha, sigma = self._column(alpha, x0), self._column(sigma, x0)
        eps = -sigma * score
        output = {
            "epsilon": lambda: eps,
            "sample": lambda: x0,
            "v_prediction": lambda: (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt(),
            "flow_prediction": lambda: eps - x0,
        }[self.config.prediction_type]().to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def level(self, timestep: Scale) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma at timesteps of any shape, in float64 and that shape.

        Between integer timesteps of a VP path log(sigma / alpha) is linear; outside of them it is constant.
        """
        time = torch.as_tensor(timestep, dtype=torch.float64, device=self.means.device)
        if self.config.path == "flow":
            return 1 - time / self.config.num_train_timesteps, time / self.config.num_train_timesteps
        table = self._log_ratios.to(time.device)
        time = time.clamp(0, len(table) - 1)
        low = time.floor().long().clamp(max=len(table) - 2)
        log_ratio = torch.lerp(table[low], table[low + 1], time - low)
        return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()

    def responsibilities(
        self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None = None
    ) -> Tensor:
        """Returns the probability of each component given the sample.

        Arguments:
            sample: The noisy sample, with shape (B, C, H, W).
            alpha: The signal scale, with shape () or (B).
            sigma: The noise scale, with shape () or (B).
            class_labels: As in `forward`.

        Returns:
            The responsibilities, with shape (B, K).
        """
        return self._log_joint(sample, alpha, sigma, class_labels).softmax(1)

    def score(self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None = None) -> Tensor:
        """Returns the gradient of log p, in the sample's shape; arguments as in `responsibilities`."""
        return self._posterior(sample, alpha, sigma, class_labels)[1]

    def eps(self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None = None) -> Tensor:
        """Returns E[eps | sample], in the sample's shape; arguments as in `responsibilities`."""
        score = self.score(sample, alpha, sigma, class_labels)
        return -self._column(sigma, score) * score

    def x0(self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None = None) -> Tensor:
        """Returns E[x0 | sample], in the sample's shape; arguments as in `responsibilities`."""
        return self._posterior(sample, alpha, sigma, class_labels)[0]

    def log_density(
        self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None = None
    ) -> Tensor:
        """Returns the log-density of the marginal, with shape (B); arguments as in `responsibilities`."""
        joint = self._log_joint(sample, alpha, sigma, class_labels)
        mass = self._log_prior(len(joint), joint, class_labels).logsumexp(1)
        variance = self._variance(self._column(alpha, joint), self._column(sigma, joint))
        constant = self.means[0].numel() / 2 * (2 * math.pi * variance).log()
        return joint.logsumexp(1) - mass - constant.flatten()

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns the mean (D) and covariance (D, D) of the marginal, D = C H W; of the data by default."""
        mus, weights = self.means.flatten(1), self.log_weights.exp()
        mean = weights @ mus
        spread = (mus - mean).T * weights @ (mus - mean)
        noise = self._variance(alpha, sigma) * torch.eye(len(mean), dtype=mus.dtype, device=mus.device)
        return alpha * mean, alpha**2 * spread + noise

    def draw(
        self,
        count: int,
        alpha: float = 1.0,
        sigma: float = 0.0,
        generator: torch.Generator | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Draws from the marginal, of the data by default.

        Arguments:
            count: The number B of samples.
            alpha: The signal scale.
            sigma: The noise scale.
            generator: The source of randomness, on the device of the model.
            class_labels: As in `forward`.

        Returns:
            The samples, with shape (B, C, H, W).
        """
        prior = self._log_prior(count, self.means, class_labels).exp()
        means = self.means[prior.multinomial(1, generator=generator).squeeze(1)]
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        return alpha * means + math.sqrt(self._variance(alpha, sigma)) * noise

    def _variance(self, alpha: Any, sigma: Any) -> Any:
        return alpha**2 * self.config.std**2 + sigma**2

    def _column(self, scale: Scale, like: Tensor) -> Tensor:
        """Returns a scale of shape () or (B) so that it multiplies a tensor of shape (B, ...)."""
        column = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
        return column.reshape(-1, *[1] * (like.ndim - 1))

    def _log_prior(self, count: int, like: Tensor, class_labels: Tensor | None) -> Tensor:
        """Returns the log-weights of the components that the labels allow, with shape (B, K)."""
        prior = self.log_weights.to(like.dtype).expand(count, -1)
        if class_labels is None:
            return prior
        classes = self.config.num_classes or self.config.num_components
        labels = torch.as_tensor(class_labels, device=prior.device).reshape(-1, 1)
        own = torch.arange(prior.shape[1], device=prior.device) % classes == labels
        free = (labels < 0) | (labels >= classes)
        return prior.masked_fill(~(own | free), -math.inf)

    def _log_joint(self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None) -> Tensor:
        """Returns log w_k - |x - alpha mu_k|^2 / (2 var), with shape (B, K)."""
        x = self._promoted(sample).flatten(1)
        alpha, sigma = self._column(alpha, x), self._column(sigma, x)
        mus = self.means.to(x.dtype).flatten(1)
        squares = x.square().sum(1, keepdim=True) - 2 * alpha * x @ mus.T + alpha**2 * mus.square().sum(1)
        return self._log_prior(len(x), x, class_labels) - squares / (2 * self._variance(alpha, sigma))

    def _posterior(
        self, sample: Tensor, alpha: Scale, sigma: Scale, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns x0 and the score, both (B, C, H, W) in the dtype of the computation."""
        x = self._promoted(sample)
        weights = self.responsibilities(x, alpha, sigma, class_labels)
        mean = (weights @ self.means.to(x.dtype).flatten(1)).reshape(x.shape)
        alpha, sigma = self._column(alpha, x), self._column(sigma, x)
        score = (alpha * mean - x) / self._variance(alpha, sigma)
        return mean - alpha * self.config.std**2 * score, score

    def _promoted(self, sample: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(sample.dtype, self.means.dtype), torch.float32)
        return sample.to(wide)


def toy_t(**options: Any) -> GaussianMixtureModel:
    """Returns toy T, in float64: 16 dimensions, 6 components of std 0.25 with means from N(0, I), SD's betas.

    Arguments:
        options: Changes to the arguments of `GaussianMixtureModel`.
    """
    return GaussianMixtureModel(**{"num_components": 6, "sample_size": 4, "std": 0.25, **options}).double()
