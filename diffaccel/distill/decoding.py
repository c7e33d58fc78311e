"""From a network's latents to images, with gradients: what perceptual distances of latent models need."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedPipeline
from ..noise import wide
from .host import Host

__all__ = ["decoder_of"]


def decoder_of(host: Host) -> Callable[[Tensor], Tensor] | None:
    """Returns what makes images (B, 3, H, W) in [-1, 1] of samples (B, C, h, w); None where they are images.

    Raises:
        UnsupportedPipeline: If samples are packed, or the autoencoder is of another kind than AutoencoderKL.
    """
    vae: Any = getattr(host.pipe, "vae", None)
    if vae is None:
        return None
    channels = getattr(vae.config, "latent_channels", None)
    plain = len(host.shape) == 3 and channels == host.shape[0]
    if not plain or getattr(vae.config, "scaling_factor", None) is None:
        raise UnsupportedPipeline(
            f"no way from samples {host.shape} of {type(host.pipe).__name__} through {type(vae).__name__} to "
            "images is known here; take premetric 'l2' or 'huber'"
        )
    vae.requires_grad_(False)
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)

    def decode(samples: Tensor) -> Tensor:
        dtype = next(vae.parameters()).dtype
        return wide(vae.decode((samples / scale + shift).to(dtype), return_dict=False)[0])

    return decode
