"""One training loop for all targets: AdamW, moving average, checkpoints with exact resume, JSON-lines log."""

import contextlib
import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffaccel.errors import DiffaccelError, ModelError
from recipes.tiny_fashion import checkpoint, data, models, objectives
from recipes.tiny_fashion.config import Config
from recipes.tiny_fashion.graph import StepGraph

__all__ = ["Trainer", "resume", "start"]

BETAS = (0.9, 0.99)
SHOWN = 10
"""Steps between two updates of the progress."""


class Trainer:
    """The networks, their average, and everything that decides how training goes on.

    Arguments:
        config: The settings.
        run: The folder of checkpoints, log and settings.
        state: A saved state to go on from.
    """

    def __init__(self, config: Config, run: Path, state: dict[str, Any] | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.run, self.device = config, run, torch.device(config.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        flip = config.target in ("vae", "decoder", "classifier")
        train, test = (data.load(split, config.data).to(self.device) for split in ("train", "test"))
        self.stream = data.Stream(train, self.generator, flip)
        self.test = data.held_out(test, config.eval_size)
        first = config if state is None else dataclasses.replace(config, init="scratch")
        self.networks = {name: net.to(self.device) for name, net in models.build(first).items()}
        with self.device:
            self.objective = objectives.build(config)
        self.average = {name: copy.deepcopy(net).requires_grad_(False) for name, net in self.networks.items()}
        self.parameters = [p for net in self.networks.values() for p in net.parameters() if p.requires_grad]
        captured = config.cuda_graph
        self.lr = torch.tensor(config.lr, device=self.device) if captured else config.lr
        self.weight = torch.zeros((), device=self.device) if captured else 0.0
        """The new weights' part of the average."""
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.lr, betas=BETAS, weight_decay=config.weight_decay, capturable=captured
        )
        self.images = 0
        self.losses: list[Tensor] = []  # since the last record
        if state is not None:
            self.load_state_dict(state)
        self._graph: StepGraph | None = None

    def step(self) -> Tensor:
        """Makes one update of the networks and of their average, and returns the loss, of shape ()."""
        config = self.config
        half_life = float(config.ema_images)
        if config.init == "scratch":  # forget the random beginning sooner
            half_life = min(half_life, 0.05 * (self.images + config.batch))
        weight = 1 - 0.5 ** (config.batch / half_life) if half_life else 1.0
        lr = config.learning_rate(self.images)
        if isinstance(self.lr, Tensor) and isinstance(self.weight, Tensor):  # what the graph reads
            self.lr.fill_(lr)
            self.weight.fill_(weight)
        else:
            self.lr, self.weight = lr, weight
        with self.device:
            batch = self.stream.next(config.batch)
            if config.cuda_graph and self._graph is None:
                self._graph = StepGraph(self, batch)
            loss = self.update(batch) if self._graph is None else self._graph(batch)
        self.images += config.batch
        return loss

    def update(self, batch: data.Batch) -> Tensor:
        """Makes an update with a batch, and returns the loss, of shape ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss = self.objective.loss(self.networks, batch, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self._update_average(self.weight)
        return loss.detach()

    @torch.no_grad()
    def _update_average(self, weight: float | Tensor) -> None:
        for name, network in self.networks.items():
            for averaged, current in zip(self.average[name].parameters(), network.parameters(), strict=True):
                if current.requires_grad:
                    averaged.lerp_(current, weight)
            for averaged, current in zip(self.average[name].buffers(), network.buffers(), strict=True):
                if current.is_floating_point():  # the statistics of batch normalization
                    averaged.lerp_(current, weight)
                else:
                    averaged.copy_(current)

    def fit(self, stop: int | None = None, minutes: float | None = None, quiet: bool = False) -> str:
        """Trains to the planned number of images, and returns why it ended.

        Arguments:
            stop: An earlier number of images to stop at.
            minutes: A limit of time.
            quiet: Whether to show no progress.
        """
        end = min(self.config.images, stop or self.config.images)
        begin = saved = time.monotonic()
        first, measured = self.images, self.images
        with _interruptible() as interrupted, self._progress(quiet) as show:
            if not self.images:
                self._measure()
                begin = saved = time.monotonic()
            while self.images < end and not interrupted:
                self.losses.append(self.step())
                now = time.monotonic()
                speed = (self.images - first) / (now - begin)
                show(speed)
                if self.config.batch * len(self.losses) >= self.config.log_images:
                    self._log_loss(speed)
                if self.images - measured >= self.config.eval_images:
                    self._measure()
                    measured = self.images
                if now - saved > 60 * self.config.save_minutes:
                    self.save()
                    saved = now
                if minutes is not None and now - begin >= 60 * minutes:
                    break
        if self.images > measured:
            self._measure()
        self.save()
        done = self.images >= self.config.images
        return "complete" if done else "interrupted" if interrupted else "stopped"

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next step depends on."""
        return {
            "config": dataclasses.asdict(self.config),
            "images": self.images,
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "average": {name: net.state_dict() for name, net in self.average.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "stream": self.stream.state_dict(),
            "losses": [loss.item() for loss in self.losses],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            self.average[name].load_state_dict(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.stream.load_state_dict(state["stream"])
        self.images = state["images"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]

    def save(self) -> Path:
        """Writes a checkpoint and the settings.

        Raises:
            DiffaccelError: If a loss since the last record is not finite.
        """
        self._mean_loss()
        settings = {**dataclasses.asdict(self.config), "trained_images": self.images}
        checkpoint.replace_text(self.run / "config.json", json.dumps(settings, indent=2) + "\n")
        return checkpoint.write(self.state_dict(), self.run, self.images)

    def _log_loss(self, speed: float) -> None:
        lr = self.config.learning_rate(self.images)
        self._log({"loss": self._mean_loss(), "lr": lr, "images_per_s": round(speed, 1)})
        self.losses.clear()

    def _mean_loss(self) -> float:
        """Returns the mean loss since the last record; it is read here only, as that waits for the device."""
        mean = torch.stack(self.losses).double().mean().item() if self.losses else 0.0
        if not math.isfinite(mean):
            raise DiffaccelError(f"the loss is {mean} within {self.images} images; try a smaller lr")
        return mean

    def _measure(self) -> None:
        with self.device:
            self._log({"held_out": self.objective.held_out(self.average, self.test)})

    def _log(self, record: dict[str, Any]) -> None:
        with (self.run / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"images": self.images, **record}) + "\n")

    @contextlib.contextmanager
    def _progress(self, quiet: bool) -> Iterator[Any]:
        columns = ("{task.description}", BarColumn(), "{task.completed:,.0f}/{task.total:,.0f} images")
        shown = TextColumn("loss {task.fields[loss]:.4f} {task.fields[speed]:.0f} img/s ETA")
        with Progress(*columns, shown, TimeRemainingColumn(), disable=quiet) as progress:
            task = progress.add_task(self.config.target, total=self.config.images, loss=0.0, speed=0.0)

            def show(speed: float) -> None:
                if not quiet and len(self.losses) % SHOWN == 0:
                    mean = torch.stack(self.losses[-SHOWN:]).mean().item()  # waits for the device
                    progress.update(task, completed=self.images, loss=mean, speed=speed)

            yield show


def start(config: Config, run: Path) -> Trainer:
    """Begins a run in a new or empty folder."""
    if checkpoint.find(run):
        raise ModelError(
            f"{str(run)!r} holds a run already; go on with --resume {run}, or give another --run"
        )
    trainer = Trainer(config, run)
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").unlink(missing_ok=True)
    return trainer


def resume(config: Config, source: Path, state: dict[str, Any]) -> Trainer:
    """Goes on with a run from a state of it, and sets aside what it has of later images."""
    run = source if source.is_dir() else source.parent
    trainer = Trainer(config, run, state)
    checkpoint.set_aside(run, trainer.images)
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    kept = [line for line in lines if _images(line) <= trainer.images]
    checkpoint.replace_text(log, "".join(line + "\n" for line in kept))
    return trainer


def _images(line: str) -> float:
    """Returns the images of a log record; none for a line that was cut off."""
    try:
        return json.loads(line)["images"]
    except (ValueError, KeyError):
        return float("inf")


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list that fills at the first Ctrl-C; the second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
