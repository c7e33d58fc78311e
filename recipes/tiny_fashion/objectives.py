r"""What is minimised, and what is measured on held-out images, on PyTorch's default device.

Denoisers see :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` of latents :math:`x_0`.

References:
    | Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023)
    | https://arxiv.org/abs/2303.09556

    | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024)
    | https://arxiv.org/abs/2403.03206
"""

from abc import ABC, abstractmethod

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffaccel.zoo.fashion import CAPTIONS, NULL_LABEL, TEMPLATES
from recipes.tiny_fashion.config import Config
from recipes.tiny_fashion.data import Batch
from recipes.tiny_fashion.models import Networks, ddim, load_vae, tokenizer

__all__ = ["Denoising", "Epsilon", "Latents", "Objective", "Reconstruction", "Velocity", "build"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # times of the held-out loss, noise at 1


class Objective(ABC):
    """A training loss and a held-out measurement."""

    @abstractmethod
    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the loss of a batch, of shape ()."""

    @abstractmethod
    def held_out(self, networks: Networks, batch: Batch) -> dict[str, float]:
        """Returns named measurements that depend on nothing but the networks and the batch."""


class Latents(Objective):
    """An objective on scaled latents of an autoencoder.

    Arguments:
        vae: The autoencoder of the latents.
        null: The part of the images without a condition.
        bf16: Whether to compute in bfloat16.
    """

    def __init__(self, vae: AutoencoderKL, null: float, bf16: bool) -> None:
        self.vae = vae.requires_grad_(False).to(torch.get_default_device())
        self.null, self.bf16 = null, bf16

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns scaled latents: a sample of the posterior, or its mean without a generator."""
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bf16):
            posterior = self.vae.encode(images).latent_dist
        x0 = posterior.mean.float()
        if generator is not None:
            x0 = x0 + posterior.std.float() * torch.randn(x0.shape, generator=generator)
        return self.vae.config.scaling_factor * x0


class Denoising(Latents):
    """The squared error of a prediction from latents with noise."""

    @abstractmethod
    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``n`` times in [0, 1)."""

    @abstractmethod
    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha_t and sigma_t of times of shape (B)."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Returns what the network shall predict, of shape (B, 4, 16, 16)."""

    @abstractmethod
    def condition(self, batch: Batch, null: Tensor, wording: Tensor) -> Tensor:
        """Returns token or label numbers, the unconditional ones where ``null``."""

    @abstractmethod
    def predict(self, networks: Networks, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluates the network, with output of shape (B, 4, 16, 16)."""

    def weight(self, t: Tensor) -> Tensor:
        """Returns the weights of the squared errors at times of shape (B)."""
        return torch.ones_like(t)

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the weighted squared error at random times."""
        n = len(batch.images)
        null = torch.rand(n, generator=generator) < self.null
        wording = torch.randint(len(TEMPLATES), (n,), generator=generator)
        x0 = self.encode(batch.images, generator)
        t = self.times(n, generator)
        noise = torch.randn(x0.shape, generator=generator)
        errors = self._errors(networks, x0, noise, t, self.condition(batch, null, wording))
        return (self.weight(t) * errors).mean()

    @torch.no_grad()
    def held_out(self, networks: Networks, batch: Batch) -> dict[str, float]:
        """Returns the unweighted squared error at each of ``LEVELS``, with fixed noise, and their mean."""
        n = len(batch.images)
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        wording = torch.full((n,), len(TEMPLATES) - 1)
        condition = self.condition(batch, torch.zeros(n, dtype=torch.bool), wording)
        x0 = self.encode(batch.images)
        result = {}
        for level in LEVELS:
            noise = torch.randn(x0.shape, generator=generator)
            errors = self._errors(networks, x0, noise, torch.full((n,), level), condition)
            result[f"t={level}"] = errors.mean().item()
        return {**result, "mean": sum(result.values()) / len(result)}

    def _errors(self, networks: Networks, x0: Tensor, noise: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha_t, sigma_t = (part[:, None, None, None] for part in self.path(t))
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bf16):
            output = self.predict(networks, alpha_t * x0 + sigma_t * noise, t, condition)
        return (output.float() - self.target(x0, noise)).square().mean((1, 2, 3))


class Epsilon(Denoising):
    """Prediction of the noise, with the min-SNR weight min(5, SNR) / SNR."""

    def __init__(self, vae: AutoencoderKL, null: float, bf16: bool) -> None:
        super().__init__(vae, null, bf16)
        self.alpha2 = ddim().alphas_cumprod.to(torch.get_default_device())
        words = tokenizer()([*CAPTIONS, ""], padding="max_length", truncation=True)
        self.tokens = torch.tensor(words.input_ids)

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws uniform times on the grid of 1000."""
        return torch.randint(1000, (n,), generator=generator) / 1000

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the variance-preserving path of the scheduler."""
        alpha2 = self.alpha2[self._timestep(t)]
        return alpha2.sqrt(), (1 - alpha2).sqrt()

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Returns the noise."""
        return noise

    def weight(self, t: Tensor) -> Tensor:
        """Returns min(5, SNR) / SNR."""
        alpha_t, sigma_t = self.path(t)
        snr = (alpha_t / sigma_t).square()
        return snr.clamp(max=5.0) / snr

    def condition(self, batch: Batch, null: Tensor, wording: Tensor) -> Tensor:
        """Returns the tokens of the captions, of shape (B, 16)."""
        rows = (len(TEMPLATES) * batch.labels + wording).masked_fill(null, len(CAPTIONS))
        return self.tokens[rows]

    def predict(self, networks: Networks, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluates the text encoder and the UNet."""
        states = networks["text_encoder"](condition).last_hidden_state
        return networks["unet"](x_t, self._timestep(t), states, return_dict=False)[0]

    @staticmethod
    def _timestep(t: Tensor) -> Tensor:
        return (1000 * t).round().long()


class Velocity(Denoising):
    """Prediction of noise - x0 on the straight path, at times with a standard normal logit."""

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws logit-normal times."""
        return torch.randn(n, generator=generator).sigmoid().clamp(1e-4, 1 - 1e-4)

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1 - t and t."""
        return 1 - t, t

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Returns the velocity."""
        return noise - x0

    def condition(self, batch: Batch, null: Tensor, wording: Tensor) -> Tensor:
        """Returns the labels, of shape (B)."""
        return batch.labels.masked_fill(null, NULL_LABEL)

    def predict(self, networks: Networks, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluates the transformer."""
        return networks["transformer"](x_t, timestep=1000 * t, class_labels=condition, return_dict=False)[0]


class Reconstruction(Objective):
    """L1 + MSE of the decoded posterior sample, and with a trained encoder 1e-4 of the KL per latent value.

    Arguments:
        bf16: Whether to compute in bfloat16.
    """

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the loss; the KL is a constant where the encoder is fixed."""
        output, kl = self._autoencode(networks, batch.images, generator)
        difference = output - batch.images
        return difference.abs().mean() + difference.square().mean() + 1e-4 * kl

    @torch.no_grad()
    def held_out(self, networks: Networks, batch: Batch) -> dict[str, float]:
        """Returns L1, MSE, PSNR (in decibel, of the clamped image) and KL at the mean of the posterior."""
        output, kl = self._autoencode(networks, batch.images)
        difference = output.clamp(-1, 1) - batch.images
        mse = difference.square().mean()
        values = {"l1": difference.abs().mean(), "mse": mse, "psnr": -10 * torch.log10(mse / 4), "kl": kl}
        return {name: value.item() for name, value in values.items()}

    def _autoencode(
        self, networks: Networks, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        vae = networks["vae"]
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bf16):
            posterior = vae.encode(images).latent_dist
            latents = posterior.mean.float()
            if generator is not None:
                latents = latents + posterior.std.float() * torch.randn(latents.shape, generator=generator)
            output = vae.decode(latents, return_dict=False)[0]
        return output.float(), posterior.kl().float().mean() / latents[0].numel()


def build(config: Config) -> Objective:
    """Returns the objective of ``config.target``."""
    if config.target == "unet":
        return Epsilon(load_vae(config.vae), config.null, config.bf16)
    if config.target == "dit":
        return Velocity(load_vae(config.vae), config.null, config.bf16)
    if config.target == "mar":
        from recipes.tiny_fashion.masked import MaskedTokens  # it needs this module

        return MaskedTokens(load_vae(config.vae), config.null, config.bf16)
    if config.target == "classifier":
        from recipes.tiny_fashion.classification import Classification  # it needs this module

        return Classification(load_vae(config.vae), config.bf16)
    return Reconstruction(config.bf16)
