"""Several networks, or adapters of one, in the place of a pipeline's single one: which is called is a route.

Such a module stands in an ordinary pipeline folder: ``config.json`` holds the classes and configurations of
its networks, and what the pipeline reads of its network (sizes, type, device) is that of the first.
"""

import importlib
import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ModelError, OptionError
from ..files import read_object
from .rows import gather_rows, take_rows
from .switching import check_adapter, insert_adapter, peft_library, using

__all__ = ["BUILT", "Member", "Routed", "described"]

Member = tuple[nn.Module, str | None]
"""A network and the adapter that is in force in it: "" for none of them, None to leave that as it is."""

ADAPTERS = "adapters.safetensors"

BUILT = ("networks", "adapters", "members")
"""The settings that say of what a module is made."""

_LIBRARIES = ("diffusers", "diffaccel")
_OWN = ("peft_config",)
"""What a pipeline must not read of the first network, for it would be written there alone."""


class Routed(ModelMixin, ConfigMixin):
    """Base of the modules that call one of several networks; a subclass says which, by `route`.

    Rows of a batch that belong to different networks are right, at one call for each of these; rows that
    share one, as in sampling, are given to it as they came. LoRA adapters count as networks.
    """

    _supports_gradient_checkpointing = True

    def _build(self, networks: Sequence[Mapping[str, Any]], adapters: Sequence[Mapping[str, Any]],
               members: Sequence[Sequence[Any]]) -> None:  # fmt: skip
        """Makes the networks, with random weights, and their adapters, from the configuration."""
        self.networks = nn.ModuleList(_made(entry) for entry in networks)
        self.members = tuple((int(place), adapter) for place, adapter in members)
        for entry in adapters:
            insert_adapter(self.networks[entry["network"]], entry["name"], entry["settings"])

    @classmethod
    def of(cls, members: Sequence[Member], **settings: Any) -> Self:
        """Returns a module of networks as they are: they are shared, not copied.

        Arguments:
            members: The networks, in the order of the routes.
            settings: The other arguments of the class.

        Raises:
            ModelError: If a network is neither of diffusers nor of diffaccel, or has no configuration.
            OptionError: If there is no such adapter.
        """
        distinct = list({id(network): network for network, _ in members}.values())
        order = [id(network) for network in distinct]
        adapters = {}
        for network, name in members:
            if name:
                check_adapter(network, name)
                place = order.index(id(network))
                adapters[place, name] = {"network": place, "name": name, "settings": _plain(network, name)}
        made = cls(**settings)
        made.networks = nn.ModuleList(distinct)
        made.members = tuple((order.index(id(network)), adapter) for network, adapter in members)
        made.register_to_config(
            networks=[described(network) for network in distinct], adapters=list(adapters.values()),
            members=[list(member) for member in made.members],
        )  # fmt: skip
        made.training = distinct[0].training
        made._check()
        return made

    def _check(self) -> None:
        """Raises an error of ours if the members do not go with the other settings."""

    @property
    def _parts(self) -> list[Any]:
        return list(self.networks)

    @property
    def leading(self) -> Any:
        """The network of the first route, which stands for all where a pipeline asks for sizes."""
        return self.networks[self.members[0][0]]

    @property
    def config(self) -> Any:
        """The first network's configuration, and that of the module itself."""
        own = self._internal_dict
        inner = getattr(self.leading, "config", {}) if len(getattr(self, "networks", ())) else {}
        return FrozenDict({**inner, **own})

    @property
    def _repeated_blocks(self) -> Any:
        return getattr(self.leading, "_repeated_blocks", None)

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.leading, "_no_split_modules", None)

    @property
    def _skip_layerwise_casting_patterns(self) -> Any:
        return getattr(self.leading, "_skip_layerwise_casting_patterns", None)

    def __getattr__(self, name: str) -> Any:
        """Returns what the first network has and the module has not, but for its methods and secrets."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        networks, members = modules.get("networks"), self.__dict__.get("members")
        if networks and members and not name.startswith("_") and name not in _OWN:
            found = getattr(networks[members[0][0]], name, None)
            if found is not None and not inspect.ismethod(found):
                return found
        return nn.Module.__getattr__(self, name)

    def check_adapters(self) -> None:
        """Checks that the experts are adapters of one network.

        Raises:
            OptionError: If they are not.
        """
        if len(self.networks) > 1 or not self.config["adapters"]:
            raise OptionError(
                "only adapters of one network leave without it; these are networks of their own"
            )

    def save_adapters(self, folder: str | Path, dtype: torch.dtype) -> None:
        """Writes the adapters without their network, for `on`.

        Arguments:
            folder: The folder, which is there.
            dtype: The type of the weights.

        Raises:
            OptionError: If the experts are not adapters of one network.
        """
        self.check_adapters()
        ends = tuple(f".{entry['name']}.weight" for entry in self.config["adapters"])
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()
                 if ".lora_" in key and key.endswith(ends)}  # fmt: skip
        self.save_config(folder)
        save_file(state, Path(folder) / ADAPTERS)

    @classmethod
    def on(cls, network: nn.Module, folder: str | Path) -> Self:
        """Returns experts that are adapters, put on a network that is changed for it.

        Arguments:
            network: The network that they were trained on, without adapters of their names.
            folder: What `save_adapters` has written.

        Raises:
            ModelError: If they are not there, or of another network.
        """
        file, config = Path(folder) / ADAPTERS, read_object(Path(folder) / cls.config_name, ModelError)
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {str(file)!r}: {error}") from error
        made, found = described(network), config["networks"][0]
        if (made["library"], made["class"]) != (found["library"], found["class"]):
            raise ModelError(f"{str(folder)!r} has adapters of a {found['class']}, not of a {made['class']}")
        like = next(network.parameters())
        for entry in config["adapters"]:
            insert_adapter(network, entry["name"], entry["settings"])
        nn.Module.to(network, like.device, like.dtype).requires_grad_(False)
        own = dict(network.named_parameters())
        for key, value in state.items():
            target = own.get(key.removeprefix("networks.0."))
            if target is None or target.shape != value.shape:
                raise ModelError(
                    f"{str(folder)!r} has adapters of another {made['class']}: {key} does not fit"
                )
            target.data.copy_(value)
        rest = {key: config[key] for key in config if not key.startswith("_") and key not in BUILT}
        return cls.of([(network, name) for _, name in config["members"]], **rest)

    @abstractmethod
    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
        """Returns the place of the member for each row, or one for all, from the arguments of a call."""

    @torch.compiler.disable(recursive=False)  # Python decides; the networks are compiled, each by itself
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the networks with the arguments that their class takes, and returns what they return."""
        places = self._places(args, kwargs)
        if len(set(places)) == 1:
            return self._call(places[0], args, kwargs)
        parts, order, size = [], [], len(places)
        for place in sorted(set(places)):
            index = [row for row, other in enumerate(places) if other == place]
            some = tuple(take_rows(value, index, size) for value in args)
            named = {name: take_rows(value, index, size, name) for name, value in kwargs.items()}
            parts.append(self._call(place, some, named))
            order += index
        return gather_rows(parts, order)

    @torch.compiler.disable
    def _places(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
        return self.route(args, kwargs)

    def _call(self, place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        number, adapter = self.members[place]
        network = self.networks[number]
        with nullcontext() if adapter is None else using(network, adapter or None):
            return network(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Names the branch of guidance for the caches of all networks, as pipelines do it."""
        with ExitStack() as stack:
            for network in self._parts:
                if hasattr(network, "cache_context"):
                    stack.enter_context(network.cache_context(name, **kwargs))
            yield

    def enable_cache(self, config: Any) -> None:
        """Gives each network a cache of diffusers."""
        for network in self._parts:
            network.enable_cache(config)

    def disable_cache(self) -> None:
        """Takes the caches away."""
        for network in self._parts:
            network.disable_cache()

    def _reset_stateful_cache(self) -> None:
        for network in self._parts:
            if hasattr(network, "_reset_stateful_cache"):
                network._reset_stateful_cache()


def described(network: nn.Module) -> dict[str, Any]:
    """Returns the library, class and configuration of a network, plain data.

    Raises:
        ModelError: If it is neither of diffusers nor of diffaccel, or has no configuration.
    """
    kind: Any = type(network)
    library = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
    config = getattr(network, "config", None)
    if library.partition(".")[0] not in _LIBRARIES or config is None:
        raise ModelError(f"{kind.__name__} cannot be one of several networks; expected a diffusers model")
    known = [name for name in inspect.signature(kind.__init__).parameters if name in config]
    return {"library": library, "class": kind.__name__, "config": {name: config[name] for name in known}}


def _made(entry: Mapping[str, Any]) -> nn.Module:
    library, name = str(entry["library"]), str(entry["class"])
    if library.partition(".")[0] not in _LIBRARIES:
        raise ModelError(f"no class {name!r} is taken of {library!r}; known: {', '.join(_LIBRARIES)}")
    kind = getattr(importlib.import_module(library), name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ModelError(f"{library!r} has no model {name!r}")
    model: Any = kind
    made: nn.Module = model.from_config(dict(entry["config"]))
    return made


def _plain(network: Any, name: str) -> dict[str, Any]:
    """Returns the settings of an adapter that are not the defaults, plain data."""
    usual, own = peft_library().LoraConfig().to_dict(), network.peft_config[name].to_dict()
    kept = {"r", "lora_alpha", "target_modules"}
    changed = {key: value for key, value in own.items() if key in kept or value != usual.get(key)}
    for key in ("base_model_name_or_path", "inference_mode", "peft_version"):  # no settings of a LoraConfig
        changed.pop(key, None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
