"""The processes that share a command's work, as ``accelerate launch`` starts them."""

import os
from typing import Any

import torch

__all__ = ["own_device", "processes"]


def processes(device: str) -> tuple[int, int, Any]:
    """Returns this process' number, how many there are, and what waits for all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return state.process_index, state.num_processes, state.wait_for_everyone


def own_device(device: str, world: int) -> str:
    """Returns the device of this process, of as many as there are."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and world > 1 else device
