"""One training loop for all targets: AdamW, moving average, checkpoints with exact resume, JSON-lines log."""

import contextlib
import copy
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffaccel.errors import DiffaccelError, ModelError
from recipes.tiny_fashion import checkpoint, data, models, objectives
from recipes.tiny_fashion.config import Config

__all__ = ["Trainer", "resume", "start"]

BETAS = (0.9, 0.99)


class Trainer:
    """The networks, their average, and everything that decides how training goes on.

    Arguments:
        config: The settings.
        run: The folder of checkpoints, log and settings.
        state: A saved state to go on from.
    """

    def __init__(self, config: Config, run: Path, state: dict[str, Any] | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.run = config, run
        self.generator = torch.Generator().manual_seed(config.seed)
        flip = config.target in ("vae", "decoder", "classifier")
        self.stream = data.Stream(data.load("train", config.data), self.generator, flip)
        self.test = data.held_out(data.load("test", config.data), config.eval_size)
        self.objective = objectives.build(config)
        first = config if state is None else dataclasses.replace(config, init="scratch")
        self.networks = models.build(first)
        self.average = {name: copy.deepcopy(net).requires_grad_(False) for name, net in self.networks.items()}
        self.parameters = [p for net in self.networks.values() for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, betas=BETAS, weight_decay=config.weight_decay
        )
        self.images = 0
        self.losses: list[float] = []  # since the last record
        if state is not None:
            self.load_state_dict(state)

    def step(self) -> float:
        """Makes one update of the networks and of their average, and returns the loss."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.images)
        loss = self.objective.loss(self.networks, self.stream.next(config.batch), self.generator)
        if not torch.isfinite(loss):
            raise DiffaccelError(f"the loss is {loss.item()} after {self.images} images; try a smaller lr")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        self.images += config.batch
        self._update_average()
        return loss.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        config = self.config
        half_life = float(config.ema_images)
        if config.init == "scratch":  # forget the random beginning sooner
            half_life = min(half_life, 0.05 * self.images)
        weight = 1 - 0.5 ** (config.batch / half_life) if half_life else 1.0
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
            "losses": list(self.losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            self.average[name].load_state_dict(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.stream.load_state_dict(state["stream"])
        self.images, self.losses = state["images"], list(state["losses"])

    def save(self) -> Path:
        """Writes a checkpoint and the settings."""
        settings = {**dataclasses.asdict(self.config), "trained_images": self.images}
        checkpoint.replace_text(self.run / "config.json", json.dumps(settings, indent=2) + "\n")
        return checkpoint.write(self.state_dict(), self.run, self.images)

    def _log_loss(self, speed: float) -> None:
        mean = sum(self.losses) / len(self.losses)
        self._log(
            {"loss": mean, "lr": self.config.learning_rate(self.images), "images_per_s": round(speed, 1)}
        )
        self.losses.clear()

    def _measure(self) -> None:
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
            smooth: list[float] = []

            def show(speed: float) -> None:
                loss = self.losses[-1]
                smooth[:] = [0.98 * smooth[0] + 0.02 * loss] if smooth else [loss]
                progress.update(task, completed=self.images, loss=smooth[0], speed=speed)

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
