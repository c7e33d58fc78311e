"""Students of several experts in runs, from training to a pipeline, with accelerators, offloading, caches."""

import copy
from dataclasses import dataclass

import diffusers
import pytest
import torch
from test_experts import Case, reloaded
from tiny_pipelines import TINY, fresh

from diffaccel.distill import Denoiser
from diffaccel.distill.assembly import averaged, joined
from diffaccel.distill.config import merge
from diffaccel.distill.method import Expert, Method
from diffaccel.distill.pairs import make_pairs
from diffaccel.distill.runs import export_run, start
from diffaccel.distill.validation import Validation
from diffaccel.errors import OptionError
from diffaccel.options import option
from diffaccel.pipelines import NoiseExperts, accelerate

# ---------------------------------------------------------------- runs


@dataclass
class Phases(Method):
    """A flow in two phases: the student of the first is frozen and makes the first steps."""

    name = "test-phases"
    bound: float = option(0.5)

    @property
    def boundaries(self):
        return (8,)

    def enter(self, phase):
        if phase == 1:
            self.snapshot("first")

    def loss(self, turn, batch):
        velocity = self.velocity(self.networks[turn], batch.inputs)
        t = batch.draws.uniform().clamp(1e-3, 1)
        wide = t.view(-1, 1, 1, 1)
        error = velocity((1 - wide) * batch.x0 + wide * batch.noise, t) - (batch.noise - batch.x0)
        return {"flow": error.square().mean()}

    def experts(self):
        student = self.networks["student"]
        first = self.frozen.get("first")
        return (Expert(student),) if first is None else (Expert(first, self.bound), Expert(student))


def test_runs_of_two_experts(tmp_path):
    """Validations and the export take the frozen expert as it is, and the average of the student."""
    TINY["dit"].build().save_pretrained(tmp_path / "teacher")
    make_pairs(tmp_path / "pairs", fresh("dit"), [0, 1, 2], count=12, steps=2, guidance=2.0)
    settings = {"method": "test-phases", "teacher": str(tmp_path / "teacher"), "steps": [2], "images": 16,
                "pairs": str(tmp_path / "pairs"), "run": str(tmp_path / "run"), "batch": 4, "ema_images": 8,
                "eval_count": 2, "lr": 1e-2}  # fmt: skip
    made = start(merge(settings))
    times = made.method.grid(2).times
    made.method.bound = sum(times) / 2
    made.trainer.fit()
    role, first = made.trainer.roles["student"], made.method.frozen["first"]
    record = Validation(made)()
    assert {"mean/2", "diversity/2"} <= set(record["validation"])
    pipe = reloaded(export_run(made, tmp_path / "it", torch.float32))
    found = pipe.transformer.networks
    average = dict(zip(role.keys, role.average.shadow_params, strict=True))
    for key, value in found[0].state_dict().items():
        assert torch.equal(value, first.network.state_dict()[key])
        assert key not in average or torch.equal(found[1].state_dict()[key], average[key])
    with pytest.raises(OptionError, match="weights of its own"):
        export_run(made, tmp_path / "lora", lora=True)
    made.method.bound = times[1]
    with pytest.raises(OptionError, match="rounding decides"):
        export_run(made, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("rank", "lora"), [(0, False), (2, True)])
def test_phased_dmd_leaves(rank, lora, tmp_path):
    """The experts of a run of two phases, as networks, as adapters of one, and as adapters alone."""
    TINY["dit"].build().save_pretrained(tmp_path / "teacher")
    make_pairs(tmp_path / "pairs", fresh("dit"), [0, 1, 2], count=12, steps=2, guidance=2.0)
    settings = {"method": "phased-dmd", "teacher": str(tmp_path / "teacher"), "steps": [4], "images": 8,
                "pairs": str(tmp_path / "pairs"), "run": str(tmp_path / "run"), "batch": 2, "ema_images": 4,
                "eval_count": 2, "lr": 1e-3, "lora_rank": rank, "options": {"ratio": 1}}  # fmt: skip
    made = start(merge(settings))
    made.trainer.fit(stop=4)
    assert "diversity/4" in Validation(made)()["validation"]
    made.trainer.fit()
    assert made.trainer.phase == 1 and "diversity/4" in Validation(made)()["validation"]
    folder = export_run(made, tmp_path / "it", torch.float32, lora=lora)
    with averaged(made.trainer, made.host.units) as student:
        if lora:
            other = NoiseExperts.on(fresh("dit").transformer, folder)
        else:
            other = reloaded(folder).transformer
        assert len(other.networks) == (1 if rank else 2) and other.limits == student.limits
        inputs = made.host.encode([0, 1, 2])
        x, t = torch.randn(3, *made.host.shape), torch.tensor([0.99, 0.5, 0.05])
        with torch.no_grad():
            found, wanted = (
                Denoiser(one, made.host.units)(x, t, inputs).velocity for one in (other, student)
            )
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# ---------------------------------------------------------------- the rest of diffaccel and of torch


@pytest.mark.parametrize("accel", ["sada", "reuse", "apg"])
def test_accelerated(accel, tmp_path):
    case = Case("flux", 2)  # its network is called by name
    pipe = case.pipeline(joined(case.experts, case.host.units))
    plain = case.call(pipe)
    quick = accelerate(pipe, accel)
    case.call(quick)
    assert set(quick.accel.report.counts) == {"transformer"}
    assert torch.equal(case.call(accelerate(quick, None)), plain)


def test_compiled():
    """The choice is outside of the graphs; each expert is one of its own."""
    case = Case("dit", 2)
    network = joined(case.experts, case.host.units)
    inputs, x = case.host.encode([0, 1]), torch.randn(2, *case.host.shape)
    times = [torch.full((2,), time) for time in (900.0, 100.0)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    with torch.no_grad():
        wanted = [inputs.call(network, x, t)[0] for t in times]
        for _ in range(2):
            found = [inputs.call(compiled, x, t)[0] for t in times]
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
            assert len(graphs) == 2  # one an expert, and none anew
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["model", "group"])
def test_offloaded(way):
    case = Case("flux", 2)
    pipe = case.pipeline(copy.deepcopy(joined(case.experts, case.host.units)))
    wanted = case.call(pipe)
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(case.call(pipe), wanted)


def test_caches_of_diffusers():
    case = Case("flux", 2)
    pipe = case.pipeline(joined(case.experts, case.host.units))
    wanted = case.call(pipe)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    cached = case.call(pipe)
    pipe.transformer.disable_cache()
    assert torch.allclose(cached, wanted, atol=1e-4) and torch.equal(case.call(pipe), wanted)


def test_methods_of_one_network_are_not_passed_on():
    """Adapters that are loaded later would be those of the first expert alone."""
    case = Case("sd", 2)
    network = joined(case.experts, case.host.units)
    assert network.conv_in is case.networks[0].conv_in
    for name in ("load_lora_adapter", "set_attn_processor", "nothing"):
        with pytest.raises(AttributeError):
            getattr(network, name)
