"""The experts of a product: conditions of the pipeline itself, and of other pipelines that share its latents.

The rows of the pipeline's batch are (expert, particle), expert by expert.  The rows of another pipeline's
experts are evaluated by its own network, with its own conditioning: that pipeline is called once up to its
first evaluation, whose arguments are kept, and which is given new samples and timesteps from then on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedPipeline
from ..noise import Path
from .accelerator import Proceed
from .capturing import Captured, first_evaluation, sibling, with_inputs
from .rows import gather_rows
from .run import Evaluation
from .unguided import arguments_of, unguided

__all__ = ["Expert", "Experts"]


@dataclass(frozen=True)
class Expert:
    """One density of the product.

    Arguments:
        condition: A prompt, a class label, or None for an unconditional pipeline.
        exponent: Its exponent.
        pipe: Another pipeline, or None for the one that is driven.
        options: What else its call is given, other than that of the pipeline that is driven.
        blank: Whether its text embeddings are zeros, as those of an empty prompt in some pipelines.
    """

    condition: Any
    exponent: float
    pipe: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    blank: bool = False

    @property
    def apart(self) -> bool:
        """Whether it is evaluated apart from the pipeline's own batch."""
        return self.pipe is not None or bool(self.options) or self.blank


class Experts:
    """All experts, and the evaluation of a batch that has a row for each of them and each particle.

    Arguments:
        experts: The experts; at least one must be of the pipeline itself.
        count: The number n of particles.
    """

    def __init__(self, experts: Sequence[Expert], count: int) -> None:
        self.experts, self.count = tuple(experts), count
        self._captured: dict[int, Captured] = {}

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def conditions(self) -> list[Any]:
        """The condition of every row."""
        return [expert.condition for expert in self.experts for _ in range(self.count)]

    def capture(self, pipe: Any, options: Mapping[str, Any]) -> None:
        """Gets the conditioning of the experts that are evaluated apart.

        Arguments:
            pipe: The pipeline that is driven.
            options: The further arguments of its call.

        Raises:
            UnsupportedPipeline: If a pipeline does not evaluate its network once a sample.
        """
        for number, expert in enumerate(self.experts):
            if expert.apart:
                owner = sibling(expert.pipe or pipe)
                own = options if expert.pipe is None else arguments_of(owner, options)
                call = unguided(owner, [expert.condition] * self.count, {**own, **expert.options})
                captured = first_evaluation(owner, call)
                if (rows := captured.call.rows) != self.count:
                    raise UnsupportedPipeline(
                        f"{type(owner).__name__} evaluates {rows} rows for {self.count} samples: it still "
                        "guides itself"
                    )
                self._captured[number] = _blanked(captured) if expert.blank else captured

    def paths(self, path: Path) -> list[Path]:
        """Returns the path of each expert: the levels of the pipeline's, and its own kind of output.

        Raises:
            UnsupportedPipeline: If the levels differ.
        """
        found = [path] * len(self)
        for number, captured in self._captured.items():
            own = captured.path
            same = len(own) == len(path) and all(
                math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
                for one, other in zip(own.levels, path.levels, strict=True)
                for a, b in zip(one[:2], other[:2], strict=True)
            )
            if not same:
                name = type(captured.call.run.pipe).__name__
                raise UnsupportedPipeline(f"the noise levels of expert {number} ({name}) are others")
            found[number] = own
        return found

    def evaluate(self, call: Evaluation, proceed: Proceed) -> Any:
        """Returns the output for all rows, as the pipeline's own network packs it."""
        if not self._captured:
            return proceed(call)
        size, order, parts = call.rows, [], []
        own = [number for number in range(len(self)) if number not in self._captured]
        for numbers in (own, *([number] for number in self._captured)):
            rows = [number * self.count + row for number in numbers for row in range(self.count)]
            part = call.select(rows, size)
            captured = self._captured.get(numbers[0])
            parts.append(proceed(part) if captured is None else _evaluate(captured.call, part, proceed))
            order += rows
        return gather_rows(parts, order)


def _blanked(captured: Captured) -> Captured:
    """Returns an evaluation of Stable Diffusion XL with zeros for the text, as its unconditional one."""
    kwargs = dict(captured.call.kwargs)
    added = dict(kwargs["added_cond_kwargs"])
    kwargs["encoder_hidden_states"] = torch.zeros_like(kwargs["encoder_hidden_states"])
    added["text_embeds"] = torch.zeros_like(added["text_embeds"])
    call = replace(captured.call, kwargs={**kwargs, "added_cond_kwargs": added})
    return Captured(call, captured.path)


def _evaluate(captured: Evaluation, part: Evaluation, proceed: Proceed) -> Any:
    """Evaluates a captured network on the samples of a part of the pipeline's batch."""
    like: Tensor = captured.sample
    call = with_inputs(captured, part.sample.to(like), _moved(part.timestep, like))
    module: Any = getattr(captured.run.pipe, part.network, None)
    if module is None:
        raise UnsupportedPipeline(f"{type(captured.run.pipe).__name__} has no {part.network!r}")
    if module is part.module:  # the gate stands on it; and the report counts it
        return proceed(replace(part, args=call.args, kwargs=call.kwargs))
    return module(*call.args, **call.kwargs)


def _moved(timestep: Any, like: Tensor) -> Any:
    return timestep.to(like.device) if isinstance(timestep, Tensor) else timestep
