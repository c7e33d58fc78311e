"""What a distillation method is: the networks it trains, whose turn it is, and one loss for each turn."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from ..errors import OptionError, closest
from ..options import check_names, check_options
from .adapters import copy_lora, lora_parameters
from .data import Batch
from .denoiser import Denoiser, guided_velocity
from .grid import Grid
from .host import Host, Inputs
from .inversion import Velocity
from .shards import Condition
from .students import student_like

__all__ = ["Expert", "Method", "Setup", "methods"]

_METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Setup:
    """What a method starts from.

    Arguments:
        host: How the teacher's pipeline uses its network.
        teacher: The frozen teacher.
        student: The student, which is trained.
        guidance: The guidance scale that the data have, or None.
        images: The samples that the student will be trained on.
        steps: The numbers of steps that the student is for.
        seed: The seed of the run.
        conditions: The conditions of the data.
    """

    host: Host
    teacher: Denoiser
    student: Denoiser
    guidance: float | None
    images: int
    steps: tuple[int, ...] = (1, 2, 4)
    seed: int = 0
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Expert:
    """A network that is a part of the student.

    Arguments:
        denoiser: The network.
        boundary: The lowest time of the straight path, in [0, 1), at which it is evaluated.
        conditions: The conditions for which it is evaluated; None for all.
    """

    denoiser: Denoiser
    boundary: float = 0.0
    conditions: tuple[Condition, ...] | None = None


@dataclass
class Method(ABC):
    """Base of all methods: its fields are the options, made by `diffaccel.options.option`.

    A run begins with `begin` and calls `turns` at each step, and `loss` for each turn.  The trainer counts in
    samples of the student's turns; at each of `boundaries` it calls `enter`.  A subclass that has a ``name``
    is registered under it.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[str] = "pairs"
    """The data: "pairs" of noise and sample."""
    helpers: ClassVar[frozenset[str]] = frozenset()
    """The networks that are no part of the student: no average of theirs is kept."""
    bound: ClassVar[bool] = False
    """Whether the numbers of steps decide the course of a run, so that they cannot change later."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the subclass by its name."""
        super().__init_subclass__(**kwargs)
        if cls.name:
            _METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        """Checks the options."""
        check_options(self, self.name)

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """Creates a method from its options.

        Raises:
            OptionError: If an option is unknown or has a wrong value.
        """
        check_names(cls, options, cls.name)
        return cls(**options)

    def begin(self, setup: Setup) -> None:
        """Makes the networks."""
        self.setup = setup
        self.networks: dict[str, Denoiser] = {"student": setup.student}
        """The trained networks; "student" is the one that is exported."""
        self.frozen: dict[str, Denoiser] = {}
        """Denoisers that came about in this run and are trained no more: part of its state."""

    def turns(self, step: int) -> tuple[str, ...]:
        """Returns the networks that are trained in a step, in their order."""
        return ("student",)

    @abstractmethod
    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms, each of shape (), whose sum ``networks[turn]`` shall make small."""

    def rate(self, turn: str) -> float:
        """Returns the factor of the learning rate of a network."""
        return 1.0

    def conditions(self, turn: str) -> tuple[Condition, ...] | None:
        """Returns the conditions of the samples that a network is trained on, or None for all."""
        return None

    def grid(self, steps: int) -> Grid:
        """Returns the times at which a student with so many steps is evaluated."""
        return Grid.stock(self.setup.host.pipe.scheduler, steps)

    def experts(self) -> tuple[Expert, ...]:
        """Returns the networks that the student consists of, those for the highest times first."""
        return (Expert(self.networks["student"]),)

    @property
    def router(self) -> Mapping[str, Any] | None:
        """What knows the expert of a condition, see `Partition`; None if noise decides."""
        return None

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The numbers of images at which another phase begins."""
        return ()

    def enter(self, phase: int) -> None:
        """Begins a phase, the first having the number 0; the student's weights are its average then."""
        return None

    def velocity(self, network: Denoiser, inputs: Inputs) -> Velocity:
        """Returns the velocity field of a network with its conditions bound: (x_t, t) -> (B, *)."""
        return guided_velocity(network, inputs, None, 1.0)

    def snapshot(self, name: str) -> Denoiser:
        """Keeps a frozen copy of the student as it is now in `frozen`, and returns it.

        Arguments:
            name: Its name there, and that of an adapter beside the student's, if that is one.
        """
        student = self.networks["student"]
        network: Any = getattr(student.network, "module", student.network)
        self.frozen[name] = copied = self._copied(network, name)
        return copied

    def _copied(self, network: Any, name: str) -> Denoiser:
        student = self.networks["student"]
        if student.adapter is not None:
            copy_lora(network, student.adapter, name)
            for parameter in lora_parameters(network, name).values():
                parameter.requires_grad_(False)
            return Denoiser(network, student.units, name)
        copied = student_like(network)  # a deep copy would take along what accelerate does to its forward
        copied.load_state_dict(network.state_dict())
        copied.to(next(network.parameters()).device).requires_grad_(False).eval()  # DiT drops labels else
        return Denoiser(copied, student.units)


def methods() -> dict[str, type[Method]]:
    """Returns the methods by name."""
    return dict(sorted(_METHODS.items()))


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    """Returns a method by name.

    Raises:
        OptionError: If there is none of that name, or an option is unknown or has a wrong value.
    """
    if name not in _METHODS:
        raise OptionError(f"no method {name!r}; {closest(name, _METHODS)}")
    return _METHODS[name].create(options)


def options_of(method: Method) -> dict[str, Any]:
    """Returns the options of a method."""
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
