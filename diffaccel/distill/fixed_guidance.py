"""Networks that need no guidance scale from their pipeline, so that its default can do no harm.

A student that was trained without guidance must be called without it, but the default of a pipeline is in
its code and not in its folder. Two networks have a switch in their configuration:

- `UNet2DConditionModel`: pipelines of Stable Diffusion leave guidance to a network that has
  ``time_cond_proj_dim``: they evaluate it once, with an embedding of the scale. Its projection is zero here.
- `FluxTransformer2DModel` with ``guidance_embeds``: the embedding of the one scale that the student was
  trained with is a constant, which is added to the bias of the time's embedding.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from .students import student_like

__all__ = ["fix_guidance", "ignores_guidance"]

_WIDTH = 4
"""The size of the embedding that is not used: the smallest for which its frequencies are finite."""


@torch.no_grad()
def fix_guidance(network: nn.Module, guidance: float | None) -> nn.Module:
    """Returns a network that does, whatever the guidance scale, what this one does with the one given.

    Where that is not possible, it is the network itself.

    Arguments:
        network: The student.
        guidance: The guidance scale that it was trained with; 1 for none.
    """
    config: Any = getattr(network, "config", None)
    if isinstance(network, UNet2DConditionModel):
        if guidance is None or guidance > 1 or config.time_cond_proj_dim is not None:
            return network
        changed: nn.Module = student_like(network, time_cond_proj_dim=_WIDTH)
        state = network.state_dict()
        state["time_embedding.cond_proj.weight"] = torch.zeros(config.block_out_channels[0], _WIDTH)
    elif isinstance(network, FluxTransformer2DModel) and config.guidance_embeds and guidance is not None:
        changed = student_like(network, guidance_embeds=False)
        embed, key = network.time_text_embed, "time_text_embed.timestep_embedder.linear_2.bias"
        scale = torch.tensor([1000 * guidance], device=network.device)  # as the network's forward has it
        constant = embed.guidance_embedder(embed.time_proj(scale).to(network.dtype))[0]
        whole = network.state_dict()
        state = {name: value for name, value in whole.items() if ".guidance_embedder." not in name}
        state[key] = state[key] + constant
    else:
        return network
    changed.load_state_dict(state)
    return nn.Module.to(changed, network.device, network.dtype).eval().requires_grad_(False)


def ignores_guidance(pipe: Any, component: str) -> bool:
    """Returns whether a pipeline makes the same images for every guidance scale, after `fix_guidance`."""
    network = getattr(pipe, component)
    network = getattr(network, "leading", network)
    if isinstance(network, FluxTransformer2DModel):
        return not network.config.guidance_embeds
    if not isinstance(network, UNet2DConditionModel) or network.config.time_cond_proj_dim != _WIDTH:
        return False
    before = getattr(pipe, "_guidance_scale", None)
    pipe._guidance_scale = 7.5
    guiding = getattr(pipe, "do_classifier_free_guidance", True)
    pipe._guidance_scale = before
    return not guiding
