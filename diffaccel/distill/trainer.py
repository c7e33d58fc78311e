"""One loop for all methods, on accelerate: turns, accumulation, averages, checkpoints and exact resume."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..errors import DiffaccelError, OptionError
from . import checkpoints
from .config import Config
from .data import Batch, Data
from .method import Method
from .role import Role

__all__ = ["Trainer"]

PATIENCE = 10
"""Updates in a row without a finite gradient, after which a run ends."""

SCALES = 16
"""How often fp16 may halve the scale of its loss besides: from 2^16 to 1."""


class Trainer:
    """The networks of a method under training, and all that decides how it goes on.

    Arguments:
        config: The settings.
        method: The method, after `Method.begin`.
        data: The samples.
        accelerator: The processes.
        run: The folder of the run.
        facts: What a checkpoint has to agree with, besides the settings that decide the course.

    Raises:
        OptionError: If the batch does not divide among the processes.
    """

    def __init__(self, config: Config, method: Method, data: Data, accelerator: Accelerator, run: Path,
                 facts: Mapping[str, Any]) -> None:  # fmt: skip
        self.config, self.method, self.data = config, method, data
        self.accelerator, self.run = accelerator, run
        world = accelerator.num_processes
        if config.batch % world:
            raise OptionError(f"batch={config.batch} does not divide among {world} processes")
        self.facts = {**facts, "processes": world}
        self.partial = any(denoiser.adapter is not None for denoiser in method.networks.values())
        """Whether checkpoints hold only some of a network's weights."""
        self.roles = {
            name: Role(name, denoiser, config, accelerator, averages=name not in method.helpers)
            for name, denoiser in method.networks.items()
        }
        if self.partial:
            accelerator.register_save_state_pre_hook(self._only_trained)
        self.step = self.phase = self.skipped = self._bad = 0
        self._losses: dict[str, list[Tensor]] = {}
        self._logged, self._since = 0, time.monotonic()
        self.seconds = 0.0
        """The time that the training took, validations left out."""
        self.figures: dict[str, Any] = {}
        """The last validation."""
        method.enter(0)

    @property
    def images(self) -> int:
        """The samples that the student has been trained on."""
        return self.roles["student"].images

    def update(self) -> None:
        """Makes one step: a turn of each network that the method names."""
        boundaries = self.method.boundaries
        while self.phase < len(boundaries) and self.images >= boundaries[self.phase]:
            self.phase += 1
            self._enter(self.phase)
        lr = self.config.learning_rate(self.images)
        for turn in self.method.turns(self.step):
            role = self.roles[turn]
            for other in self.roles.values():
                other.trains(other is role)
            for batch, weight, last in self._parts(role):
                self._backward(role, batch, weight, last)
            norm = role.step(lr * self.method.rate(turn), self.config.clip, self.config.batch)
            self._note(role, norm)
        self.step += 1

    def _enter(self, phase: int) -> None:
        for role in self.roles.values():
            role.forget()
        self.method.enter(phase)
        for role in self.roles.values():
            role.follow()

    def _parts(self, role: Role) -> Iterator[tuple[Batch, float, bool]]:
        """Yields this process' samples in parts, each with its share of them, and whether it is the last."""
        share = self.config.batch // self.accelerator.num_processes
        first = role.images + share * self.accelerator.process_index
        size = self.config.micro_batch or share
        for start in range(0, share, size):
            stop = min(start + size, share)
            batch = self.data.batch(range(first + start, first + stop), role.name, role.images)
            yield batch, (stop - start) / share, stop == share

    def _backward(self, role: Role, batch: Batch, weight: float, last: bool) -> None:
        network = role.denoiser.network
        quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(network)
        with quiet:
            with self.accelerator.autocast():
                terms = self.method.loss(role.name, batch)
            total = sum(terms.values(), torch.zeros((), device=self.accelerator.device))
            with role.denoiser.active():  # checkpointed layers are evaluated again
                self.accelerator.backward(weight * total)
        for name, term in terms.items():
            self._losses.setdefault(f"{role.name}/{name}", []).append(weight * term.detach())

    def _note(self, role: Role, norm: Tensor) -> None:
        turn, finite = role.name, role.finite
        self._losses.setdefault(f"{turn}/gradient", []).append(norm if finite else torch.zeros_like(norm))
        self._bad = 0 if finite else self._bad + 1
        self.skipped += not finite
        patience = PATIENCE if self.accelerator.scaler is None else PATIENCE + SCALES
        if self._bad >= patience:
            raise DiffaccelError(
                f"{patience} gradients of {turn!r} in a row are not finite after {self.images} images; try a "
                f"smaller lr than {self.config.lr:g}; the checkpoints are in {str(self.run)!r}"
            )

    def fit(self, stop: int | None = None, halt: Callable[[], bool] = lambda: False,
            validate: Callable[[], Mapping[str, Any]] | None = None,
            show: Callable[["Trainer"], None] = lambda trainer: None) -> str:  # fmt: skip
        """Trains to the planned number of images.

        Arguments:
            stop: An earlier number of images to stop at.
            halt: Whether to stop now; the first process is asked after each step.
            validate: What measures the student; its result is logged.
            show: What is called after each step, such as a progress bar.

        Returns:
            "complete" or "stopped".
        """
        config, saved = self.config, time.monotonic()
        end = min(config.images, stop or config.images)
        self._logged, self._since = self.images, saved
        self._losses.clear()
        measured = self.images
        while self.images < end:
            before = self.images
            self.update()
            show(self)
            if self.images - self._logged >= config.log_images:
                self._log_losses()
            if validate is not None and before // config.eval_images < self.images // config.eval_images:
                began = time.monotonic()
                self.log(validate())
                measured = self.images
                self._since += time.monotonic() - began
            checkpoints.keep_raw(self, config.keep_images, config.keep_raw)
            now = time.monotonic()
            if self._agreed(now - saved > 60 * config.save_minutes):
                checkpoints.save(self, config.keep_last)
                saved = now
            if self._agreed(halt()):
                break
        self.seconds += time.monotonic() - self._since
        if validate is not None and self.images > measured:  # an export has the checkpoint's figures
            self.log(validate())
        checkpoints.save(self, config.keep_last)
        return "complete" if self.images >= config.images else "stopped"

    def _agreed(self, wish: bool) -> bool:
        """Returns what the first process wishes, since all have to do the same."""
        if self.accelerator.num_processes == 1:
            return wish
        wishes = [wish]
        broadcast_object_list(wishes)
        return wishes[0]

    def _log_losses(self) -> None:
        now, images = time.monotonic(), self.images - self._logged
        updates = [len(self._losses[f"{name.partition('/')[0]}/gradient"]) for name in self._losses]
        parts = zip(self._losses.values(), updates, strict=True)
        sums = torch.stack([torch.stack(part).sum().float() / count for part, count in parts])
        found = self.accelerator.reduce(sums, "mean")
        means = {name: value if math.isfinite(value) else None
                 for name, value in zip(self._losses, found.tolist(), strict=True)}  # fmt: skip
        self._losses.clear()
        self.seconds += now - self._since
        self.log({**means, "lr": self.config.learning_rate(self.images), "skipped": self.skipped,
                  "images_per_s": round(images / (now - self._since), 1)})  # fmt: skip
        self._logged, self._since = self.images, now

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes a line of the log, and tells the trackers."""
        self.figures = dict(record.get("validation", self.figures))
        if self.accelerator.is_main_process:
            with (self.run / "log.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"images": self.images, **record}) + "\n")
        flat = {**record, **record.get("validation", {})}
        numbers = {key: value for key, value in flat.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.images)

    def state_dict(self) -> dict[str, Any]:
        """Returns all of the state that is not tensors; the draws of a sample depend on its number alone."""
        roles = {name: role.state_dict() for name, role in self.roles.items()}
        return {
            "facts": self.facts, "images": self.images, "step": self.step, "phase": self.phase,
            "skipped": self.skipped, "bad": self._bad, "roles": roles,
            "seconds": self.seconds, "figures": self.figures,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to a saved state, but for the tensors."""
        for name, role in self.roles.items():
            role.load_state_dict(state["roles"][name])
        self.step, self.skipped, self._bad = (int(state[key]) for key in ("step", "skipped", "bad"))
        self.seconds, self.figures = float(state["seconds"]), dict(state["figures"])
        while self.phase < int(state["phase"]):
            self.phase += 1
            self.method.enter(self.phase)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the averages, and the networks that came about in this run, by name."""
        found = {
            f"average-{name}": _copied(dict(zip(role.keys, role.average.shadow_params, strict=True)))
            for name, role in self.roles.items() if role.average is not None
        }  # fmt: skip
        kept = self.method.frozen.items()
        frozen = {f"frozen-{name}": _copied(denoiser.state()) for name, denoiser in kept}
        return {**found, **frozen}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Returns to saved averages and networks."""
        for name, role in self.roles.items():
            if role.average is not None:
                saved = tensors[f"average-{name}"]
                for key, shadow in zip(role.keys, role.average.shadow_params, strict=True):
                    shadow.copy_(saved[key])
        for name, denoiser in self.method.frozen.items():
            for key, value in denoiser.state().items():
                value.copy_(tensors[f"frozen-{name}"][key])

    def _only_trained(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Leaves out of a checkpoint what is not trained: the base that LoRA adapters share."""
        keys = {key for role in self.roles.values() for key in role.keys}
        weights[:] = [{key: value for key, value in whole.items() if key in keys} for whole in weights]


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors that share no memory, as safetensors has to have them."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
