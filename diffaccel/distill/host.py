"""How a pipeline uses its network: what it makes of conditions, and in which units the network counts noise.

Nothing is known about single architectures: the pipeline itself is called, up to the evaluation of its
network, whose arguments are kept.  Text encoders, pooled embeddings, image ids and sizes are whatever the
pipeline makes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipeline
from ..noise import probe
from ..pipelines import NoiseExperts
from ..pipelines.branches import convention_of
from ..pipelines.capturing import first_evaluation, sibling
from ..pipelines.rows import join_rows, take_rows
from ..pipelines.run import denoisers_of
from ..pipelines.unguided import arguments_of, check_pipeline, condition_of, kind_of, unconditional, unguided
from .units import Units, units_of

__all__ = ["Host", "Inputs"]

_LIMIT = 4096
"""Conditions that are kept encoded; text embeddings of a large model are about 1 MB each."""


@dataclass(frozen=True)
class Inputs:
    """What a network is given besides the sample and the time, for B rows.

    Arguments:
        args: The positional arguments from the third on.
        kwargs: The other arguments by name.
        rows: The number of rows B.
        keys: The names of the sample and of the time, or None where they are positional.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int
    keys: tuple[str | None, str | None]

    def take(self, index: Sequence[int]) -> "Inputs":
        """Returns the inputs of some of the rows."""
        args = tuple(take_rows(value, index, self.rows) for value in self.args)
        kwargs = {name: take_rows(value, index, self.rows, name) for name, value in self.kwargs.items()}
        return Inputs(args, kwargs, len(index), self.keys)

    def to(self, device: torch.device) -> "Inputs":
        """Returns the inputs on a device."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs, self.rows, self.keys)

    def call(self, network: nn.Module, sample: Tensor, timestep: Tensor) -> Any:
        """Calls a network with these inputs."""
        first, second = self.keys
        named = {name: value for name, value in ((first, sample), (second, timestep)) if name}
        leading = [value for name, value in ((first, sample), (second, timestep)) if not name]
        return network(*leading, *self.args, **named, **self.kwargs)


class Host:
    """What a pipeline knows about its network; the pipeline is left as it is.

    Arguments:
        pipe: A pipeline that goes from noise and conditions to samples.
        options: Further arguments of its call that shape the network's input, such as height and width.

    Raises:
        UnsupportedPipeline: If the pipeline does not evaluate one network once a sample, or one of two by the
            noise level.
        OptionError: If it takes no such option.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any] | None = None) -> None:
        check_pipeline(pipe)
        self.pipe, self.kind = sibling(pipe), kind_of(pipe)
        self.pipe.set_progress_bar_config(disable=True)
        steps = max(getattr(pipe.scheduler, "grids", {4}))  # a student takes the numbers it was trained for
        self.options = {"num_inference_steps": steps, **arguments_of(pipe, options or {})}
        if steps < 2:
            raise UnsupportedPipeline(f"this {type(pipe).__name__} makes one step only")
        self._values: dict[tuple[type, Any], Any] = {}
        self._numbers: dict[Any, int] = {}
        self._known: Inputs | None = None
        call = unguided(self.pipe, [self.any_condition] * 2, self.options)
        early, late = first_evaluation(self.pipe, call), first_evaluation(self.pipe, call, step=1)
        self.component = early.call.network
        if early.call.rows != 2:
            raise UnsupportedPipeline(f"{type(pipe).__name__} evaluates {early.call.rows} rows for 2 samples")
        if not isinstance(early.call.sample, Tensor):
            raise UnsupportedPipeline(f"the network of {type(pipe).__name__} takes lists of samples")
        self._split = _split_over_noise(self.pipe)
        self.shape = tuple(early.call.sample.shape[1:])
        """The shape of a sample, without the batch."""
        places = [
            (found.path[found.call.index].sigma, _number(found.call.timestep)) for found in (early, late)
        ]
        scheduler = early.call.run.scheduler
        self.units: Units = units_of(scheduler, places[0], places[1], convention_of(pipe).sign)
        self.path_kind = probe(pipe.scheduler).kind

    @property
    def network(self) -> nn.Module:
        """The pipeline's own network: the teacher's; two by noise level are one that chooses by the time."""
        network = getattr(self.pipe, self.component) if self._split is None else self._split
        assert isinstance(network, nn.Module)
        return network

    def encode(self, conditions: Sequence[Any]) -> Inputs:
        """Returns the network's inputs for prompts, labels (by name or number) or Nones, encoded once each.

        Raises:
            OptionError: If the pipeline does not take such a condition.
        """
        for condition in conditions:
            if (key := (type(condition), condition)) not in self._values:
                self._values[key] = condition_of(self.pipe, condition)
        wanted = [self._values[type(condition), condition] for condition in conditions]
        fresh = [condition for condition in dict.fromkeys(wanted) if condition not in self._numbers]
        if fresh:
            if len(self._numbers) + len(fresh) > _LIMIT:
                self._numbers, self._known, fresh = {}, None, list(dict.fromkeys(wanted))
            self._learn(fresh, self._captured(fresh, {}))
        assert self._known is not None
        return self._known.take([self._numbers[condition] for condition in wanted])

    def encode_unconditional(self, count: int, negative: Any = None) -> Inputs:
        """Returns the inputs of guidance's unconditional branch, for some rows.

        Raises:
            OptionError: If the pipeline is unconditional.
            UnsupportedPipeline: If it has no such branch that could be called by itself.
        """
        condition, options, blank = unconditional(self.pipe, negative)
        inputs = self._captured([condition], options)
        if blank:
            kwargs = dict(inputs.kwargs)
            added = dict(kwargs["added_cond_kwargs"])
            kwargs["encoder_hidden_states"] = torch.zeros_like(kwargs["encoder_hidden_states"])
            added["text_embeds"] = torch.zeros_like(added["text_embeds"])
            inputs = Inputs(inputs.args, {**kwargs, "added_cond_kwargs": added}, inputs.rows, inputs.keys)
        return inputs.take([0] * count)

    @torch.no_grad()
    def _captured(self, conditions: Sequence[Any], options: Mapping[str, Any]) -> Inputs:
        """Returns the inputs for at least two rows, so that rows can be told from what they share."""
        rows = list(conditions) * 2 if len(conditions) == 1 else list(conditions)
        call = first_evaluation(self.pipe, unguided(self.pipe, rows, {**self.options, **options})).call
        args, kwargs = call.args, dict(call.kwargs)
        first = None if args else next(name for name, value in kwargs.items() if value is call.sample)
        second = None if len(args) > 1 else "timestep"
        for name in (first, second):
            if name is not None:
                del kwargs[name]
        return Inputs(args[2:], kwargs, len(rows), (first, second)).to(torch.device("cpu"))

    def _learn(self, fresh: Sequence[Any], inputs: Inputs) -> None:
        known = self._known
        before = 0 if known is None else known.rows
        self._known = inputs if known is None else _joined(known, inputs)
        for place, condition in enumerate(fresh):
            self._numbers[condition] = before + place

    @property
    def any_condition(self) -> Any:
        """A condition that the pipeline takes."""
        return {"prompt": "", "class_labels": 0, "batch_size": None}[self.kind]


def _joined(first: Inputs, second: Inputs) -> Inputs:
    """Returns the rows of two inputs, one after the other."""
    sizes = (first.rows, second.rows)
    try:
        args = join_rows(first.args, second.args, sizes)
        kwargs = join_rows(dict(first.kwargs), dict(second.kwargs), sizes)
    except RuntimeError as error:
        raise UnsupportedPipeline(f"conditions of different lengths, which do not stack: {error}") from error
    return Inputs(args, kwargs, sum(sizes), first.keys)


def _split_over_noise(pipe: Any) -> nn.Module | None:
    """Returns the two networks of a pipeline such as that of Wan 2.2 as one, or None if it has one.

    Raises:
        UnsupportedPipeline: If it has several that are not known to be for ranges of noise.
    """
    networks, ratio = denoisers_of(pipe), pipe.config.get("boundary_ratio")
    if len(networks) == 1:
        return None
    if set(networks) != {"transformer", "transformer_2"} or ratio is None:
        raise UnsupportedPipeline(f"{type(pipe).__name__} has several networks: {', '.join(networks)}")
    limit = ratio * pipe.scheduler.config.num_train_timesteps
    pair = [(networks["transformer"], None), (networks["transformer_2"], None)]
    return NoiseExperts.of(pair, boundaries=[limit])


def _number(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).flatten()[0])
