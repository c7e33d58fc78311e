"""A trained network: which of its weights are trained, by what, their average, and how far it has come."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..errors import OptionError, closest
from .adapters import lora_parameters
from .config import Config
from .denoiser import Denoiser

__all__ = ["Role", "optimizer_of"]


class Role:
    """A network under training; it counts its own images and updates, which its average follows.

    Arguments:
        name: The name of the turn.
        denoiser: The network, which is prepared for the processes in place.
        config: The settings.
        accelerator: What prepares it.
        averages: Whether an average is kept, if the settings ask for one.
    """

    def __init__(self, name: str, denoiser: Denoiser, config: Config, accelerator: Accelerator,
                 averages: bool = True) -> None:  # fmt: skip
        self.name, self.denoiser, self._accelerator = name, denoiser, accelerator
        self.images = self.updates = 0
        self.finite = True
        """Whether the last gradient was."""
        network = denoiser.network
        network.eval()  # dropout, also that of labels (DiT), would have the student learn something else
        adapter = denoiser.adapter
        trained = dict(network.named_parameters()) if adapter is None else lora_parameters(network, adapter)
        self.keys = list(trained)
        """The names of the trained weights within the network."""
        for key, parameter in network.named_parameters():  # a base may have others, of another role
            parameter.requires_grad_(key in trained)
        optimizer = optimizer_of(
            config.optimizer, list(trained.values()), config.lr, config.optimizer_options
        )
        denoiser.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.average: EMAModel | None = None
        if config.ema_images and averages:
            decay = 0.5 ** (config.batch / config.ema_images)
            self.average = EMAModel(self.parameters, decay=decay, min_decay=decay, foreach=True)

    @property
    def network(self) -> nn.Module:
        """The network itself, without what the processes wrap around it."""
        network = self._accelerator.unwrap_model(self.denoiser.network)
        assert isinstance(network, nn.Module)
        return network

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, in the order of `keys`."""
        found = dict(self.network.named_parameters())
        return [found[key] for key in self.keys]

    def trains(self, on: bool) -> None:
        """Says whether gradients shall reach the trained weights."""
        for parameter in self.parameters:
            parameter.requires_grad_(on)

    def step(self, lr: float, clip: float, images: int) -> Tensor:
        """Makes an update of the weights and of their average; a gradient that is not finite makes none.

        Arguments:
            lr: The learning rate.
            clip: The largest norm of the gradient; 0 does not clip.
            images: The samples that the gradient is the mean of.

        Returns:
            The norm of the gradient before clipping, of shape ().
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        found = self._accelerator.clip_grad_norm_(self.parameters, clip or float("inf"))
        norm = torch.as_tensor(0.0 if found is None else found)
        finite = bool(torch.isfinite(norm))  # the one number an update that is read from the device
        self.finite = finite
        if finite or self._accelerator.scaler is not None:  # that leaves them out itself
            self.optimizer.step()
        if finite:
            self.updates += 1
            if self.average is not None:
                self.average.step(self.parameters)
        self.optimizer.zero_grad()
        self.images += images
        return norm.detach()

    def forget(self) -> None:
        """Begins anew from the average: the weights are set to it, and the optimizer's memory is empty."""
        if self.average is not None:
            self.average.copy_to(self.parameters)
            self.average.optimization_step = 0
        getattr(self.optimizer, "optimizer", self.optimizer).state.clear()

    @torch.no_grad()
    def follow(self) -> None:
        """Sets the average to the weights."""
        if self.average is not None:
            for shadow, parameter in zip(self.average.shadow_params, self.parameters, strict=True):
                shadow.copy_(parameter)

    def averaged(self) -> "_Averaged":
        """Returns a context in which the network has its averaged weights."""
        return _Averaged(self)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        averaged = 0 if self.average is None else self.average.optimization_step
        return {"images": self.images, "updates": self.updates, "averaged": averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to saved counts."""
        self.images, self.updates = int(state["images"]), int(state["updates"])
        if self.average is not None:
            self.average.optimization_step = int(state["averaged"])


class _Averaged:
    """Puts the averaged weights in and, at the end, the trained ones back."""

    def __init__(self, role: Role) -> None:
        self.role = role

    def __enter__(self) -> nn.Module:
        role = self.role
        if role.average is not None:
            role.average.store(role.parameters)
            role.average.copy_to(role.parameters)
        return role.network

    def __exit__(self, *exc: object) -> None:
        role = self.role
        if role.average is not None:
            role.average.restore(role.parameters)


def optimizer_of(name: str, parameters: list[nn.Parameter], lr: float,
                 options: Mapping[str, Any]) -> torch.optim.Optimizer:  # fmt: skip
    """Returns an optimizer of torch.optim, or of the library pytorch-optimizer.

    Raises:
        OptionError: If there is none of this name, or it does not take the options.
    """
    if name.lower() == "lbfgs":
        raise OptionError(f"{name} evaluates the loss several times an update, which is not done here")
    known = [
        key for key, value in vars(torch.optim).items() if isinstance(value, type) and key != "Optimizer"
    ]
    kind: Any = getattr(torch.optim, name, None) if name in known else None
    if kind is None:
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise OptionError(
                f"no optimizer {name!r} in torch.optim ({closest(name, known)}); pytorch-optimizer, with "
                "more, is not installed: pip install 'diffaccel[distill]'"
            ) from error
        try:
            kind = pytorch_optimizer.load_optimizer(name)
        except NotImplementedError as error:
            raise OptionError(f"no optimizer {name!r}; {closest(name, known)}") from error
    try:
        return kind(parameters, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} does not take optimizer_options={dict(options)}: {error}") from error
