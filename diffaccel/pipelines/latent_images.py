"""The way between images and the latents of a pipeline, through its VAE."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..errors import UnsupportedPipeline
from ..noise import wide

__all__ = ["LatentImages"]


class LatentImages:
    """Encodes and decodes the images of a text-to-image pipeline as its latents.

    Known are VAEs of images, and of videos with one frame (Qwen-Image), whose latents the pipeline scales,
    shifts or standardizes by its VAE's ``scaling_factor``, ``shift_factor``, ``latents_mean`` and
    ``latents_std``; and latents packed as those of Flux: tokens of 2 x 2.  Whether a pipeline is of this kind
    can be seen from its own images, see `explains`.

    Arguments:
        pipe: The pipeline.

    Raises:
        UnsupportedPipeline: If it has no VAE that encodes and decodes.
    """

    def __init__(self, pipe: Any) -> None:
        vae: Any = getattr(pipe, "vae", None)
        self.vae, self.name = vae, type(pipe).__name__
        if not all(callable(getattr(vae, name, None)) for name in ("encode", "decode")):
            raise UnsupportedPipeline(f"{self.name} has no VAE between images and latents")
        self.config = vae.config
        self.is_packed = callable(getattr(pipe, "_pack_latents", None))
        self.has_frames = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        widths = getattr(self.config, "block_out_channels", None) or (1,)
        self.factor: int = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(widths) - 1)
        """The pixels along a side of an entry of the latents."""

    def encode(self, images: Tensor) -> Tensor:
        """Returns the latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]: modes of the posterior.

        Raises:
            UnsupportedPipeline: If the VAE does not give them.
        """
        with self._precise() as vae:
            found = vae.encode(self._framed(2 * images - 1).to(vae.dtype))
        posterior = getattr(found, "latent_dist", None)
        latents = getattr(found, "latent", None) if posterior is None else posterior.mode()
        if latents is None:
            raise UnsupportedPipeline(
                f"the {type(self.vae).__name__} of {self.name} encodes in an unknown way"
            )
        latents = wide(self._unframed(latents))
        factor, mean = self._statistics(latents)
        return (latents - mean) / factor

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images (B, 3, H, W) in [0, 1] of latents (B, C, h, w)."""
        factor, mean = self._statistics(latents)
        with self._precise() as vae:
            found = vae.decode(self._framed(latents * factor + mean).to(vae.dtype), return_dict=False)[0]
        return (wide(self._unframed(found)) / 2 + 0.5).clamp(0, 1)

    def pack(self, latents: Tensor) -> Tensor:
        """Returns latents (B, C, h, w) as the scheduler has them: those, or tokens (B, h w / 4, 4 C)."""
        return pixel_unshuffle(latents, 2).flatten(2).mT if self.is_packed else latents

    def unpack(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns latents of the scheduler as (B, C, h, w).

        Arguments:
            latents: The latents.
            size: The height and width of the images.

        Raises:
            UnsupportedPipeline: If they are not of the shape that images of this size have.
        """
        height, width = (side // self.factor for side in size)
        if self.is_packed and latents.ndim == 3 and 4 * latents.shape[1] == height * width:
            return pixel_shuffle(latents.mT.unflatten(2, (height // 2, width // 2)), 2)
        if self.is_packed or latents.ndim != 4 or latents.shape[-2:] != (height, width):
            raise UnsupportedPipeline(
                f"the latents of {self.name} for {size[0]} x {size[1]} images are {tuple(latents.shape)}, "
                "which are packed in an unknown way"
            )
        return latents

    def explains(self, latents: Tensor, images: Tensor) -> bool:
        """Returns whether images are what is decoded here: on average to a part in 50 of the range.

        This leaves room for a watermark and low precision. An image that is all zero is a safety checker's.

        Arguments:
            latents: Final latents of the scheduler.
            images: The images that the pipeline made of them, (B, 3, H, W) in [0, 1].
        """
        decoded = self.decode(self.unpack(latents, (images.shape[-2], images.shape[-1])))
        if decoded.shape != images.shape:
            return False
        gaps = (decoded - images.to(decoded)).abs().flatten(1).mean(1)
        return bool(((gaps < 0.02) | (images.flatten(1).amax(1) == 0).to(gaps.device)).all())

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factor and the mean that lead from the pipeline's latents to the VAE's."""
        config = self.config
        std, mean = getattr(config, "latents_std", None), getattr(config, "latents_mean", None)
        if mean is None:
            std, mean = None, getattr(config, "shift_factor", None) or 0.0
        scale = getattr(config, "scaling_factor", None) or 1.0
        factors = (torch.tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
                   for value in (1.0 if std is None else std, mean))  # fmt: skip
        factor, shift = factors
        return factor / scale, shift

    @contextmanager
    def _precise(self) -> Iterator[Any]:
        """Gives the VAE, in float32 for as long if it would overflow in float16."""
        upcast = self.vae.dtype == torch.float16 and getattr(self.config, "force_upcast", False)
        if not upcast:
            yield self.vae
            return
        self.vae.to(torch.float32)
        try:
            yield self.vae
        finally:
            self.vae.to(torch.float16)

    def _framed(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, None] if self.has_frames else tensor

    def _unframed(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, 0] if self.has_frames else tensor
