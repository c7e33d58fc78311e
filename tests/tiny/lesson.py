"""Turns a pipeline with random weights into one that denoises, by fitting last layers only."""

from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

RIDGE = 1e-4


def last_layer(network: nn.Module) -> nn.Module:
    """The layer that makes the output of a denoiser; only a permutation follows it."""
    return next(getattr(network, n) for n in ("conv_out", "proj_out_2", "proj_out") if hasattr(network, n))


class Lesson:
    """Fits the last layer of each denoiser of a pipeline to data that are N(0, 1/4), by least squares.

    The pipeline runs as usual, but its networks are shown x_t = alpha_t x0 + sigma_t eps instead of the
    sample, and the inputs of their last layers are collected. What they return meanwhile is zero.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.draws: dict[float, tuple[Tensor, Tensor, float]] = {}  # by time: x_t, wanted output, weight
        self.features: dict[nn.Module, Tensor] = {}
        self.time = 0.0
        self.moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # X'X and X'Y

    def draw(self, t: float, like: Tensor) -> tuple[Tensor, Tensor, float]:
        """A noisy sample, the prediction that is wanted for it, and the weight of its error."""
        x0, eps = torch.randn_like(like) / 2, torch.randn_like(like)
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        if kind == "flow_prediction":
            sigma = t if t <= 1 else t / 1000  # some pipelines divide, others do not
            return (1 - sigma) * x0 + sigma * eps, eps - x0, 1.0
        alpha = self.scheduler.alphas_cumprod[int(t)].sqrt()
        sigma = (1 - alpha**2).sqrt()
        x_t = alpha * x0 + sigma * eps
        if kind == "epsilon":
            return x_t, eps, float(1 + sigma / alpha)  # the error of x0 is sigma / alpha times that of eps
        return x_t, alpha * eps - sigma * x0, 1.0

    def show(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pre-hook of a network: replaces its sample; what is concatenated to the latents stays."""
        sample = kwargs["hidden_states"] if not args else args[0]
        t = self.time = float(torch.as_tensor(kwargs["timestep"] if len(args) < 2 else args[1]).flatten()[0])
        size = min(sample.shape[1], 4) if sample.ndim == 4 else sample.shape[1]
        if t not in self.draws:
            self.draws[t] = self.draw(t, sample.narrow(1, 0, size))
        sample = torch.cat([self.draws[t][0], sample[:, size:]], dim=1)
        return ((sample, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": sample})

    def number(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Hook of a last layer: keeps its input, and numbers its output, to know where each entry goes."""
        self.features[layer] = args[0]
        return torch.arange(output.numel(), dtype=output.dtype).view_as(output)

    def collect(self, network: nn.Module, args: tuple, output: Any) -> None:
        """Hook of a network: adds the rows of this call to the moments."""
        layer, (_, wanted, weight) = last_layer(network), self.draws[self.time]
        index, x = output[0].narrow(1, 0, wanted.shape[1]).long(), self.features[layer]
        y = torch.zeros(output[0].numel(), dtype=torch.float64)
        y[index.flatten()] = wanted.flatten().double()
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding).mT
            y = y.view(len(x), layer.out_channels, -1).mT
        x = x.reshape(-1, x.shape[-1]).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        xx, xy = self.moments.get(layer, (0, 0))
        self.moments[layer] = xx + weight**2 * x.T @ x, xy + weight**2 * x.T @ y.reshape(len(x), -1)
        output[0].zero_()

    def finish(self) -> None:
        """Sets the last layers; a tenth of the random weights stays, to be sensitive to everything."""
        for layer, (xx, xy) in self.moments.items():
            ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
            weight = torch.linalg.solve(xx + ridge, xy).T
            layer.weight.mul_(0.02).add_(weight[:, :-1].reshape(layer.weight.shape))
            layer.bias.copy_(weight[:, -1])


@torch.no_grad()
def teach(pipe: DiffusionPipeline, denoisers: Iterable[str], sample: Callable[[], Any]) -> None:
    """Makes the named components of a pipeline denoise; ``sample`` runs the pipeline once."""
    lesson = Lesson(pipe.scheduler)
    handles = []
    for network in (getattr(pipe, name) for name in denoisers):
        handles.append(network.register_forward_pre_hook(lesson.show, with_kwargs=True))
        if not isinstance(network, diffusers.ControlNetModel):
            handles.append(last_layer(network).register_forward_hook(lesson.number))
            handles.append(network.register_forward_hook(lesson.collect))
    sample()
    for handle in handles:
        handle.remove()
    lesson.finish()
