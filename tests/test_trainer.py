"""The trainer: exact resume, the same course however a batch is divided, averages, phases and refusals."""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import begun, together
from safetensors.torch import load_file
from tiny_pipelines import TINY
from torch import Tensor

from diffaccel import zoo
from diffaccel.distill import checkpoints, runs
from diffaccel.distill.checkpoints import CheckpointError
from diffaccel.distill.config import Config, merge, read
from diffaccel.distill.data import Batch
from diffaccel.distill.draws import Draws
from diffaccel.distill.method import Method
from diffaccel.distill.pairs import make_pairs
from diffaccel.distill.runs import Run, export_run, resume, start
from diffaccel.distill.validation import Validation
from diffaccel.errors import DiffaccelError, OptionError
from diffaccel.options import option


@dataclass
class Plain(Method):
    """Reflow with a uniform t and squares, and options for the tests."""

    name = "test-plain"
    switch: int = option(0, low=0)
    poison: int = option(-1)
    dropout: float = option(0.0)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """One more phase, if asked for."""
        return (self.switch,) if self.switch else ()

    def enter(self, phase: int) -> None:
        """Keeps a copy of the student in the second phase."""
        if phase == 1:
            self.snapshot("reflow")

    def loss(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        """Returns the mean square of the velocity's error."""
        t = batch.draws.uniform().clamp(1e-3, 1)
        wide = t.view(-1, 1, 1, 1)
        x_t = (1 - wide) * batch.x0 + wide * batch.noise
        x_t = torch.nn.functional.dropout(x_t, self.dropout)  # global random numbers
        error = self.velocity(self.networks[turn], batch.inputs)(x_t, t) - (batch.noise - batch.x0)
        if "reflow" in self.frozen:
            error = error + self.velocity(self.frozen["reflow"], batch.inputs)(x_t, t)
        terms = {"flow": error.square().mean()}
        if self.poison >= 0 and batch.images >= self.poison:
            terms["flow"] = terms["flow"] * float("nan")
        return terms


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and 24 pairs of it."""
    folder = tmp_path_factory.mktemp("distill")
    pipe = TINY["dit"].build()
    pipe.save_pretrained(folder / "teacher")
    make_pairs(folder / "pairs", pipe, [0, 1, 2], count=24, steps=2, guidance=2.0, batch=8, shard_size=16)
    return folder


def config(made: Path, run: Path, **changes: Any) -> Config:
    """Settings of a small run."""
    settings = {
        "method": "test-plain", "teacher": str(made / "teacher"), "pairs": str(made / "pairs"),
        "run": str(run), "images": 40, "batch": 4, "warmup_images": 8, "ema_images": 8, "eval_count": 0,
        "log_images": 8, "lr": 1e-3,
    }  # fmt: skip
    return merge({**settings, **changes})


def state(run: Run) -> dict[str, Tensor]:
    """All tensors of a run's roles."""
    role = run.trainer.roles["student"]
    found = dict(zip(role.keys, (p.detach().clone() for p in role.parameters), strict=True))
    if role.average is not None:
        found |= {f"average.{n}": p.clone() for n, p in enumerate(role.average.shadow_params)}
    for n, entry in enumerate(role.optimizer.state.values()):
        found |= {f"optimizer.{n}.{key}": torch.as_tensor(value).clone() for key, value in entry.items()}
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Asserts that two runs have the same tensors."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=tolerance, rtol=tolerance, msg=key)


def test_draws_belong_to_samples() -> None:
    """A sample has the same draws in any batch; other purposes, seeds and numbers have others."""
    many, one = Draws(1, range(10)), Draws(1, [7])
    assert torch.equal(many.normal(3)[7], one.normal(3)[0])
    assert torch.equal(many.uniform()[7:8], one.uniform())
    assert torch.equal(many.integers(1000)[7:8], one.integers(1000))
    others = [Draws(2, [7]), Draws(1, [8]), Draws(1, [7], "other")]
    assert len({round(draws.uniform().item(), 6) for draws in (Draws(1, [7]), *others)}) == 4


def test_stopping_and_going_on_changes_no_bit(made: Path, tmp_path: Path) -> None:
    """N steps are k steps, a resume from disk, and N - k steps: over phases, dropout and averages."""
    options = {"switch": 16, "dropout": 0.1}
    whole = start(config(made, tmp_path / "whole", options=options))
    assert whole.trainer.fit() == "complete"
    part = start(config(made, tmp_path / "part", options=options))
    assert part.trainer.fit(stop=12) == "stopped"
    part = resume(tmp_path / "part")
    assert part.trainer.fit(stop=24) == "stopped"
    torch.manual_seed(99)  # nothing outside of the checkpoint counts
    again = resume(tmp_path / "part")
    assert again.trainer.images == 24 and again.trainer.phase == 1
    assert again.trainer.fit() == "complete"
    assert_same(state(whole), state(again))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "part")]
    drop = ("images_per_s",)
    rows = [[{k: v for k, v in json.loads(line).items() if k not in drop} for line in log] for log in logs]
    assert rows[0][-1] == rows[1][-1]


def test_parts_of_a_batch_make_the_same_step(made: Path, tmp_path: Path) -> None:
    """Accumulation over parts of any size gives the gradient of the whole batch."""
    one = start(config(made, tmp_path / "one", ema_images=0, optimizer="SGD"))
    one.trainer.fit(stop=12)
    parts = start(config(made, tmp_path / "parts", ema_images=0, optimizer="SGD", micro_batch=3))
    parts.trainer.fit(stop=12)
    assert_same(state(one), state(parts), 1e-6)


def fit(settings: Config, stop: int | None = None, pause: float = 0.0) -> None:
    """Trains in a process of its own, and waits between updates."""
    start(settings).trainer.fit(stop=stop, show=lambda trainer: time.sleep(pause))


def test_two_processes_make_the_course_of_one(made: Path, tmp_path: Path) -> None:
    """Two processes give the losses of one with the same batch, and a checkpoint that one does not take."""
    settings = config(made, tmp_path / "one", optimizer="SGD", log_images=4)
    one = start(settings)
    one.trainer.fit(stop=12)
    second = merge({**asdict(settings), "run": str(tmp_path / "two")})
    together(fit, second, 12)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for ours, theirs in zip(*logs, strict=True):
        assert json.loads(ours)["student/flow"] == pytest.approx(json.loads(theirs)["student/flow"], abs=1e-6)
    saved = load_file(checkpoints.find(tmp_path / "two")[0] / "model.safetensors")
    for key, value in one.trainer.roles["student"].network.state_dict().items():
        torch.testing.assert_close(saved[key], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckpointError, match="processes is 2 there and 1 here"):
        resume(tmp_path / "two")
    assert_same(state(one), state(resume(tmp_path / "two", training=False)), 1e-5)


def test_a_killed_run_goes_on(made: Path, tmp_path: Path) -> None:
    """kill -9 in mid-training, and the rest is the same to the bit."""
    settings = config(made, tmp_path / "whole")
    whole = start(settings)
    whole.trainer.fit()
    killed = tmp_path / "killed"
    second = merge({**asdict(settings), "run": str(killed), "save_minutes": 0.0})
    process = begun(fit, second, None, 0.05)
    deadline = time.monotonic() + 60
    while len(checkpoints.find(killed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    run = resume(killed)
    assert 0 < run.trainer.images < 40
    run.trainer.fit()
    assert_same(state(whole), state(run))


def test_what_a_run_cannot_go_on_with(made: Path, tmp_path: Path) -> None:
    """Missing, damaged and foreign checkpoints are errors, and never a fresh start."""
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        resume(tmp_path / "nothing")
    folder = tmp_path / "run"
    run = start(config(made, folder))
    run.trainer.fit(stop=8)
    run.trainer.fit(stop=16)
    with pytest.raises(CheckpointError, match="holds a run; go on with 'diffaccel distill resume"):
        start(config(made, folder))
    with pytest.raises(CheckpointError, match=r"another run: lr is 0.001 there and 0.5 here"):
        resume(folder, ("lr=0.5",))
    newest, before = checkpoints.find(folder)
    (newest / "model.safetensors").write_bytes(b"nothing")
    again = resume(folder)
    assert again.trainer.images == 8
    assert (
        checkpoints.find(folder) == [before] and (folder / "checkpoints" / f"damaged-{newest.name}").is_dir()
    )
    (before / "optimizer.bin").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        resume(folder)
    (before / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        resume(folder)
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        resume(folder)


def test_a_full_disk_costs_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before stays, no half-written one is left, and the error says where it is."""
    run = start(config(made, tmp_path / "run"))
    run.trainer.fit(stop=8)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*the last good one is .*images-0000000008"):
        run.trainer.fit(stop=16)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-0000000008"]
    assert resume(tmp_path / "run").trainer.images == 8


def test_gradients_that_are_not_finite_change_nothing_and_end_a_run(made: Path, tmp_path: Path) -> None:
    """They are counted; ten in a row are an error that says what to try."""
    run = start(config(made, tmp_path / "run", images=400, options={"poison": 8}))
    with pytest.raises(DiffaccelError, match="10 gradients of 'student' in a row are not finite after 48"):
        run.trainer.fit()
    assert run.trainer.skipped == 10 and run.trainer.roles["student"].updates == 2
    assert all(torch.isfinite(value).all() for value in state(run).values())


def test_the_average_has_the_half_life_in_images(made: Path, tmp_path: Path) -> None:
    """After one half-life of constant weights, half of the first ones is left."""
    run = start(config(made, tmp_path / "run", ema_images=8))
    role = run.trainer.roles["student"]
    assert role.average is not None
    role.average.optimization_step = 1  # past the first step, which copies
    with torch.no_grad():
        for shadow in role.average.shadow_params:
            shadow.zero_()
        for parameter in role.parameters:
            parameter.fill_(1)
    for _ in range(2):
        role.average.step(role.parameters)
    for shadow in role.average.shadow_params:
        torch.testing.assert_close(shadow, torch.full_like(shadow, 0.5))


def test_raw_weights_are_kept_for_combination(made: Path, tmp_path: Path) -> None:
    """At the interval asked for, and as the checkpoints have them."""
    run = start(config(made, tmp_path / "run", keep_images=16))
    run.trainer.fit()
    names = sorted(path.name for path in (tmp_path / "run" / "raw").iterdir())
    assert names == ["student-0000000016.safetensors", "student-0000000032.safetensors"]


def test_lora_students_share_the_base(made: Path, tmp_path: Path) -> None:
    """One copy of the base in memory and none in the checkpoints; the teacher stays what it was."""
    whole = start(config(made, tmp_path / "run", lora_rank=2))
    setup = whole.method.setup
    assert setup.teacher.network is whole.trainer.roles["student"].network
    inputs, x_t, t = whole.host.encode([0, 1]), torch.randn(2, *whole.host.shape), torch.full((2,), 0.5)
    before = setup.teacher(x_t, t, inputs).velocity
    torch.testing.assert_close(setup.student(x_t, t, inputs).velocity, before)
    whole.trainer.fit()
    torch.testing.assert_close(setup.teacher(x_t, t, inputs).velocity, before, atol=0, rtol=0)
    assert (setup.student(x_t, t, inputs).velocity - before).abs().max() > 1e-4
    checkpoint = checkpoints.find(tmp_path / "run")[0]
    assert all(".lora_" in key for key in load_file(checkpoint / "model.safetensors"))
    part = start(config(made, tmp_path / "part", lora_rank=2))
    part.trainer.fit(stop=16)
    part = resume(tmp_path / "part")
    part.trainer.fit()
    assert_same(state(whole), state(part))


def test_lora_of_the_zoo_holds_one_base(tmp_path: Path) -> None:
    """Training the UNet of tiny-fashion-sd with an adapter needs its weights once, and little more."""
    pipe: Any = zoo.load("tiny-fashion-sd")
    pipe.set_progress_bar_config(disable=True)
    base = sum(p.untyped_storage().nbytes() for p in pipe.unet.parameters())
    make_pairs(tmp_path / "pairs", pipe, zoo.prompts(2), count=2, steps=1, guidance=1.0, batch=2)
    settings = {"method": "test-plain", "teacher": "tiny-fashion-sd", "pairs": str(tmp_path / "pairs"),
                "run": str(tmp_path / "run"), "images": 2, "batch": 2, "lora_rank": 4,
                "eval_count": 0}  # fmt: skip
    run = start(merge(settings))
    run.trainer.update()
    networks = (run.method.setup.teacher, run.method.setup.student, run.host.network, run.pipe.unet)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
              for network in networks for p in network.parameters()}  # fmt: skip
    role = run.trainer.roles["student"]
    added = sum(p.untyped_storage().nbytes() for p in role.parameters)
    assert sum(stored.values()) == base + added and added < 0.03 * base
    assert all(p.grad is None for p in run.pipe.unet.parameters())


@pytest.mark.parametrize(("settings", "words"), [
    ({"lrr": 1}, "no option 'lrr'"), ({"lr": -1.0}, "outside"), ({"method": "reflow"}, "no method 'reflow'"),
    ({"options": {"swich": 1}}, "no option 'swich'"), ({"steps": "many"}, "steps"),
    ({"lora_rank": 4, "student_changes": {"num_layers": 1}}, "exclude each other"),
])  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    """A misspelt name is an error that tells the known ones."""
    with pytest.raises(OptionError, match=words):
        merge({"method": "test-plain", **settings})


def test_settings_are_read_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    """The command line has the last word; what is no mapping is refused."""
    file = tmp_path / "run.yaml"
    file.write_text("method: test-plain\nlr: 1e-3\nbatch: 8\noptions: {switch: 5}\n")
    found = read(file, ["batch=16", "options.dropout=0.5", "lr=2e-5"])
    assert (found.batch, found.lr, dict(found.options)) == (16, 2e-5, {"switch": 5, "dropout": 0.5})
    with pytest.raises(OptionError, match="method is 'test-plain' in the settings, but 'slimflow'"):
        read(file, [], method="slimflow")
    with pytest.raises(OptionError, match="not of the form key=value"):
        read(file, ["batch"])
    file.write_text("- a\n")
    with pytest.raises(OptionError, match="holds no mapping"):
        read(file)


def test_teacher_and_pairs_have_to_fit(made: Path, tmp_path: Path) -> None:
    """Samples of another shape, batches that do not divide, and students of another shape are refused."""
    other = TINY["ddim"].build()
    make_pairs(tmp_path / "pairs", other, count=4, steps=2, batch=4)
    with pytest.raises(OptionError, match="samples"):
        start(config(made, tmp_path / "run", pairs=str(tmp_path / "pairs")))
    with pytest.raises(OptionError, match="student=random or"):
        start(config(made, tmp_path / "run", student_changes={"num_layers": 1}))
    with pytest.raises(OptionError, match="needs pairs=FOLDER"):
        start(config(made, tmp_path / "run", pairs=""))
    with pytest.raises(OptionError, match="in_channels is 8, and 4 in the teacher"):
        start(config(made, tmp_path / "run", student="random", student_changes={"in_channels": 8}))
    with pytest.raises(OptionError, match="LBFGS evaluates the loss several times"):
        start(config(made, tmp_path / "run", optimizer="LBFGS"))
    with pytest.raises(OptionError, match="steps must be different numbers"):
        config(made, tmp_path / "run", steps=[1, 1])
    with pytest.raises(OptionError, match="eval_count=1"):
        config(made, tmp_path / "run", eval_count=1)
    with pytest.raises(OptionError, match="tracker='nothing'"):
        start(config(made, tmp_path / "run", tracker="nothing"))
    assert runs.checkpoints.find(tmp_path / "run") == []


def test_the_size_of_the_pairs_is_that_of_the_run(tmp_path: Path) -> None:
    """Training, validation and export call the pipeline as the pairs were made."""
    pipe = TINY["sd"].build()
    pipe.save_pretrained(tmp_path / "teacher")
    make_pairs(tmp_path / "pairs", pipe, ["a red boot"], count=8, steps=2, guidance=2.0, batch=4,
               options={"height": 16, "width": 16})  # fmt: skip
    run = start(config(tmp_path, tmp_path / "run", images=8, eval_count=2, steps=[1]))
    assert run.host.shape == (4, 8, 8)
    validation = Validation(run)
    run.trainer.fit(validate=validation)
    assert validation.shown["teacher"].shape == validation.shown["1 steps"].shape == (2, 3, 16, 16)
    export_run(run, tmp_path / "out")


def test_no_is_a_word_and_not_a_truth_value() -> None:
    """YAML takes it for False."""
    assert merge({}, ("precision=no",)).precision == "no"


def test_two_processes_take_both_terms_of_one_student(made: Path, tmp_path: Path) -> None:
    """SlimFlow evaluates the student twice an update: on two processes the course is that of one, too."""
    changes = {"method": "slimflow", "optimizer": "SGD", "lr": 1e-6, "log_images": 4, "ema_images": 0,
               "options": {"distill_part": 0.8}}  # fmt: skip
    settings = config(made, tmp_path / "one", **changes)
    start(settings).trainer.fit(stop=16)
    second = merge({**asdict(settings), "run": str(tmp_path / "two")})
    together(fit, second, 16)
    one, two = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    assert {"student/distill", "student/two-step"} <= one[-1].keys()
    for name in ("student/distill", "student/two-step"):
        assert one[-1][name] == pytest.approx(two[-1][name], rel=1e-6)
