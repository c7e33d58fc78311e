"""A step of training as one CUDA graph: for small networks the launches of single kernels take longer."""

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.tiny_fashion.data import Batch

if TYPE_CHECKING:
    from recipes.tiny_fashion.train import Trainer

__all__ = ["StepGraph"]

WARM = 3


class StepGraph:
    """Captures the update of a trainer, and replays it; the trainer is left as it was.

    Arguments:
        trainer: The trainer, on a CUDA device, with learning rate and averaging weight in tensors.
        batch: A batch, of the size that all others have.
    """

    def __init__(self, trainer: "Trainer", batch: Batch) -> None:
        self.batch = Batch(*(part.clone() for part in self._parts(batch)))
        before, begun = copy.deepcopy(trainer.state_dict()), bool(trainer.optimizer.state)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # libraries and the optimizer allocate what they keep
            for _ in range(WARM):
                trainer.update(self.batch)
        main.wait_stream(side)
        optimizer = before.pop("optimizer")
        trainer.load_state_dict(
            {**before, "optimizer": optimizer if begun else trainer.optimizer.state_dict()}
        )
        if not begun:
            for state in trainer.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        trainer.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(trainer.generator)
        with torch.cuda.graph(self.graph):
            self.loss = trainer.update(self.batch)

    def __call__(self, batch: Batch) -> Tensor:
        """Makes the update with a batch, and returns the loss, of shape ()."""
        for kept, given in zip(self._parts(self.batch), self._parts(batch), strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.loss.clone()

    @staticmethod
    def _parts(batch: Batch) -> list[Tensor]:
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
