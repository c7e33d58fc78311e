"""DMD2: a student in one or a few steps whose diffused samples have the teacher's distribution."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..options import option
from .data import Batch
from .denoiser import Denoiser, Prediction
from .discriminator import Features, Head
from .distribution_matching import FAKE, DistributionMatching
from .host import Inputs
from .matching import surrogate
from .method import Setup
from .walk import times_like, walk

__all__ = ["DMD2"]


@dataclass
class DMD2(DistributionMatching):
    """Distribution matching with a fake score on a second time scale, and backward simulation.

    In each update the student makes its first j steps from pure noise, as it will in use: to x0, and on with
    fresh noise. j is drawn once for all samples; the gradient goes through the last of them only. What it
    makes there is judged by teacher and fake score. One step is the case N = 1.

    Each network's update has noise, and conditions, of its own; the paper trains the fake score on the very
    samples of the student's update. The regression on pairs is the square of latents, in the first step; that
    of DMD is LPIPS of decoded images, which DMD2 drops. The head of the discriminator is one of single
    positions, which takes features of any size; the paper's is strided convolutions for one size.

    Arguments:
        regression: The weight of the first step's distance from the pairs' samples; 0 for none.
        adversarial: The weight of the discriminator in the student's loss; 0 for none.
        critic: The weight of the discriminator's own loss beside that of the fake score.

    References:
        | Improved Distribution Matching Distillation for Fast Image Synthesis (2024), arXiv 2405.14867
        | One-step Diffusion with Distribution Matching Distillation (2023), arXiv 2311.18828
    """

    name: ClassVar[str] = "dmd2"

    regression: float = option(0.0, low=0.0)
    adversarial: float = option(0.0, low=0.0)
    critic: float = option(0.01, low=0.0)

    def begin(self, setup: Setup) -> None:
        """Makes the networks, and the discriminator's head as a part of the fake score.

        Raises:
            OptionError: If a discriminator is asked for beside adapters, whose base it cannot be a part of.
        """
        super().begin(setup)
        if not self.adversarial:
            return
        if setup.student.adapter is not None:
            raise OptionError(
                "the discriminator is a part of a fake score of its own weights: set lora_rank=0"
            )
        network = self._fake.network
        device = next(network.parameters()).device
        self._features = Features(network)
        noise = torch.randn(2, *setup.host.shape, generator=torch.Generator().manual_seed(setup.seed))
        inputs = setup.host.encode([setup.host.any_condition] * 2).to(device)
        with torch.no_grad():
            self._fake(noise.to(device), times_like(0.5, noise.to(device)), inputs)
        network.add_module("head", Head(self._features.take().shape[1], setup.seed).to(device))

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of a turn, each the mean over the samples."""
        j = self.place(turn, batch, len(self.trained))
        noises, inputs = self.noise(batch, j + 2), batch.inputs
        x, t_j = self._simulated(noises[: j + 1], inputs)
        uniform = batch.draws.uniform()
        if turn == FAKE:
            with torch.no_grad():
                sample = self.setup.student(x, t_j, inputs).x0
            return self._fake_terms(sample, self.law.between(0, 1, uniform), noises[-1], batch)
        sample = self.setup.student(x, t_j, inputs).x0
        t = self.law.between(self.earliest, self.latest, uniform)
        return self._student_terms(sample, t, noises[-1], batch)

    def _simulated(self, noises: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns what the student's last step is given, and its times: one step for each noise."""
        steps, times = len(noises), self.trained.times
        network = self.ask(self.setup.student, inputs)
        x = walk([network] * (steps - 1), self.first(noises[0]), times[:steps], noises[1:])
        return x, times_like(times[steps - 1], x)

    def _student_terms(self, sample: Tensor, t: Tensor, noise: Tensor, batch: Batch) -> dict[str, Tensor]:
        x_t = self.led(sample, 0.0, t, noise)
        said, features = self._judged(x_t if self.adversarial else x_t.detach(), t, batch.inputs)
        real = self.real(x_t.detach(), t, batch.inputs)
        gradient = self.gradient(real, said.x0.detach(), sample.detach(), 0.0, t)
        terms = {"matching": surrogate(gradient, sample)}
        if features is not None:
            terms["adversarial"] = self.adversarial * functional.softplus(-self._head(features)).mean()
        if self.regression:
            pairs = batch.unfiltered
            x, now = self.first(pairs.noise), times_like(self.trained.times[0], pairs.noise)
            distance = (self.setup.student(x, now, pairs.inputs).x0 - pairs.x0).square().mean()
            terms["regression"] = self.regression * distance
        return terms

    def _judged(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> tuple[Prediction, Tensor | None]:
        """Returns what the fake score says, and its features with a gradient if there is a discriminator."""
        if not self.adversarial:
            with torch.no_grad():
                return self._fake(x_t, t, inputs), None
        bare = Denoiser(self._bare, self._fake.units)  # what processes wrap around it waits for its gradients
        return bare(x_t, t, inputs), self._features.take()

    def _fake_terms(self, sample: Tensor, t: Tensor, noise: Tensor, batch: Batch) -> dict[str, Tensor]:
        terms = {"denoising": self.fake_turn(sample, 0.0, t, noise, batch.inputs)}
        if self.adversarial:
            made = self._head(self._features.take())
            self._fake(self.led(batch.x0, 0.0, t, noise), t, batch.inputs)
            real = self._head(self._features.take())
            both = functional.softplus(made).mean() + functional.softplus(-real).mean()
            terms["critic"] = self.critic * both
        return terms

    @property
    def _bare(self) -> nn.Module:
        network = self._fake.network
        bare = getattr(network, "module", network)
        assert isinstance(bare, nn.Module)
        return bare

    def _head(self, features: Tensor) -> Tensor:
        head = self._bare.get_submodule("head")
        judged: Tensor = head(features)
        return judged
