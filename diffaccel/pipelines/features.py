"""What modules have given, in the evaluations of one network for one branch of guidance."""

from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipeline
from .accelerator import Proceed
from .dataflow import Flow, Trace, blank_of
from .layers import skip_path
from .report import Count
from .run import BlockCall

__all__ = ["Features", "signature_of"]


def signature_of(*arguments: Any) -> Any:
    """Returns what must be equal in two evaluations for one to inherit from the other: structure, shapes."""
    leaves, structure = pytree.tree_flatten(arguments)
    shapes = [
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf is None
        for leaf in leaves
    ]
    return shapes, structure


class Features:
    """The features of one network and branch, from the last steps at which they were computed.

    Arguments:
        signature: See `signature_of`.
        wanted: The modules that inherit at some step.
        changes: Those of which it is not the output that is inherited, but what they add to their input.
        order: 0 to inherit the last features, 1 to extrapolate the last two linearly.
    """

    def __init__(
        self, signature: Any, wanted: Collection[str], changes: Collection[str], order: int = 0
    ) -> None:
        self.signature, self.wanted, self.changes, self.order = signature, wanted, changes, order
        self.flow: Flow | None = None
        """Known when the evaluation was watched to its end."""
        self.thinned = -1
        """The last step at which modules inherited or were left out."""
        self._values: dict[str, deque[tuple[int, Any]]] = {}
        self._absent: dict[frozenset[str], frozenset[str]] = {}

    def watch(
        self, trace: Trace, holding: Collection[str], name: str, call: BlockCall, proceed: Proceed
    ) -> Any:
        """Runs a module under the eyes of a trace, and keeps its features.

        Arguments:
            trace: The trace.
            holding: The names of modules that hold others which go through here.
            name: The module's name.
            call: The call.
            proceed: What runs it.
        """

        def run() -> Any:
            return self._kept(name, call, proceed) if name in self.wanted else proceed(call)

        return trace.module(name, name in holding, call.args, call.kwargs, run)

    def learn(self, flow: Flow, sets: Collection[frozenset[str]]) -> None:
        """Takes the graph of the evaluation, and forgets the features that will not be asked for.

        Arguments:
            flow: The graph.
            sets: The modules that are going to inherit together.

        Raises:
            UnsupportedPipeline: If nothing would inherit, or the output not depend on the noisy input.
        """
        self.flow, kept = flow, set[str]()
        for names in sets:
            needed = flow.needed(names, self.changes)
            if not needed.sample:
                raise UnsupportedPipeline(
                    f"while {min(names)} and others inherit, the output would not depend on the sample; "
                    'that is what accel="reuse" does, or let outer modules run'
                )
            if not needed.modules & names:
                raise UnsupportedPipeline(f"{min(names)} and others do not run, so that none can inherit")
            self._absent[names] = frozenset(flow.shapes) - needed.modules
            kept |= needed.modules & names
        self.wanted = kept
        self._values = {name: values for name, values in self._values.items() if name in kept}

    def block(self, names: frozenset[str], count: Count, name: str, call: BlockCall, proceed: Proceed) -> Any:
        """Lets a module inherit, leaves it out, or runs it and keeps its features.

        Arguments:
            names: The modules that inherit.
            count: The count of the network, in which what does not run is entered.
            name: The module's name.
            call: The call.
            proceed: What runs it.
        """
        if names:
            assert self.flow is not None
            if name in self._absent[names]:
                count.omitted += 1
                return blank_of(self.flow.shapes[name])
            if name in names:
                count.omitted += 1
                return self._inherited(name, call)
        return self._kept(name, call, proceed) if name in self.wanted else proceed(call)

    def _kept(self, name: str, call: BlockCall, proceed: Proceed) -> Any:
        before = None
        if name in self.changes:  # a copy, since some blocks work in place
            before = _each(torch.clone, skip_path(call.module, call.args, call.kwargs))
        output = proceed(call)
        value = _each(torch.clone, output) if before is None else _each(_difference, output, before)
        values = self._values.setdefault(name, deque(maxlen=self.order + 1))
        values.append((call.step, value))
        return output

    def _inherited(self, name: str, call: BlockCall) -> Any:
        """Returns the module's output by its last features; a copy, since some networks work in place."""
        step, value = self._values[name][-1]
        if len(self._values[name]) == 2:
            earlier, old = self._values[name][0]
            ratio = (call.step - step) / (step - earlier)
            value = _each(lambda now, then: _extrapolated(now, then, ratio), value, old)
        if name in self.changes:
            return _each(torch.add, value, skip_path(call.module, call.args, call.kwargs))
        return _each(torch.clone, value)


def _each(function: Any, *trees: Any) -> Any:
    """Applies a function to the tensors of equally structured outputs; the rest is that of the first."""
    leaves = [pytree.tree_leaves(tree) for tree in trees]
    made = [function(*same) if isinstance(same[0], Tensor) else same[0] for same in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(made, pytree.tree_structure(trees[0]))


def _difference(output: Tensor, before: Tensor) -> Tensor:
    exact = torch.promote_types(output.dtype, torch.float32)
    return (output.to(exact) - before.to(exact)).to(output.dtype)


def _extrapolated(now: Tensor, then: Tensor, ratio: float) -> Tensor:
    exact = torch.promote_types(now.dtype, torch.float32)
    return (now.to(exact) + (now.to(exact) - then.to(exact)) * ratio).to(now.dtype)
