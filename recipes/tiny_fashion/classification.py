"""The objective of the classifier: the class and the color of an image, however softly it was decoded."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import gaussian_blur

from diffaccel.eval.classifier import color_targets, predict
from recipes.tiny_fashion.data import PADDING, Batch
from recipes.tiny_fashion.models import Networks
from recipes.tiny_fashion.objectives import Objective

__all__ = ["Classification"]

SMOOTHING = 0.05  # of the labels
COLOR_WEIGHT = 0.3  # of the color's cross-entropy; it is learned soon
PART = 8  # one image in so many is decoded from its latents, blurred, or made noisy
BLUR, NOISE = (0.3, 1.0), 0.1  # range of the standard deviation in pixels; largest one of the values


class Classification(Objective):
    """The cross-entropies of class and color on images that are shifted, and some of them damaged.

    Arguments:
        vae: The autoencoder whose reconstructions must be recognized, too.
        bf16: Whether to compute in bfloat16.
    """

    def __init__(self, vae: AutoencoderKL, bf16: bool) -> None:
        self.vae, self.bf16 = vae.requires_grad_(False).to(torch.get_default_device()), bf16

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the loss, by the batch normalization of the batch."""
        images = self._damage(_shift(batch.images / 2 + 0.5, generator), generator)
        with self._autocast():
            prediction = networks["classifier"].train()(images)
        colors = color_targets(batch.colors)
        of_class = cross_entropy(prediction.class_logits.float(), batch.kinds, label_smoothing=SMOOTHING)
        of_color = cross_entropy(prediction.color_logits.float(), colors, label_smoothing=SMOOTHING)
        return of_class + COLOR_WEIGHT * of_color

    @torch.no_grad()
    def held_out(self, networks: Networks, batch: Batch) -> dict[str, float]:
        """Returns the cross-entropy of the class, the accuracies, and that of the class after the VAE."""
        images = batch.images / 2 + 0.5
        with self._autocast():
            real = predict(images, networks["classifier"])
            decoded = predict(torch.cat([*map(self._decoded, images.split(100))]), networks["classifier"])
        right = {
            "class": real.class_logits.argmax(1) == batch.kinds,
            "color": real.color_logits.argmax(1) == color_targets(batch.colors),
            "class_vae": decoded.class_logits.argmax(1) == batch.kinds,
        }
        loss = cross_entropy(real.class_logits, batch.kinds).item()
        return {"loss": loss, **{name: hits.float().mean().item() for name, hits in right.items()}}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def _decoded(self, images: Tensor) -> Tensor:
        """Returns the autoencoder's reconstructions of images in [0, 1]."""
        with self._autocast():
            latents = self.vae.encode(2 * images - 1).latent_dist.mode()
            output = self.vae.decode(latents, return_dict=False)[0]
        return (output.float() / 2 + 0.5).clamp(0, 1)

    def _damage(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Damages three parts of a batch, each in its way, and leaves the rest."""
        n = len(images)
        part = min(-(-n // PART), n // 3)
        if not part:
            return images
        decoded, blurred, noisy, rest = images.split([part, part, part, n - 3 * part])
        low, high = BLUR
        sd = low + (high - low) * torch.rand((), generator=generator).item()
        level = NOISE * torch.rand((part, 1, 1, 1), generator=generator)
        noise = torch.randn(noisy.shape, generator=generator)
        noisy = (noisy + level * noise).clamp(0, 1)
        return torch.cat([self._decoded(decoded), gaussian_blur(blurred, [5, 5], [sd, sd]), noisy, rest])


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image by up to the width of its black frame; what leaves on one side is black anyway."""
    n, _, height, width = images.shape
    by = torch.randint(-PADDING, PADDING + 1, (2, n, 1), generator=generator)
    rows, columns = (torch.arange(height) + by[0]) % height, (torch.arange(width) + by[1]) % width
    number = torch.arange(n)[:, None, None]
    return images[number, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
