"""Students of several experts, and teachers of two networks, in pipelines that are saved and loaded."""

import copy
import pickle
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from test_export import CARD, SIZE
from tiny_pipelines import TINY, fresh, run
from torch import nn

from diffaccel.distill import Denoiser, Grid, Host, export, export_lora
from diffaccel.distill.adapters import add_lora, lora_parameters, merged, using
from diffaccel.distill.assembly import check_grids, joined, timestep_of
from diffaccel.distill.data import Batch
from diffaccel.distill.discriminator import middle_of
from diffaccel.distill.draws import Draws
from diffaccel.distill.grid import fixed_grid
from diffaccel.distill.method import Expert, Setup, method_of
from diffaccel.distill.students import student_like
from diffaccel.distill.trial import with_network
from diffaccel.distill.units import EDMUnits, FlowUnits
from diffaccel.errors import ModelError, OptionError, UnsupportedPipeline
from diffaccel.pipelines import NoiseExperts
from diffaccel.samplers import FixedGridScheduler

PART = {"sd": "unet", "dit": "transformer", "flux": "transformer", "sd3": "transformer", "sdxl": "unet"}


def part_of(name):
    return PART.get(name, "transformer")


def variants(network, count):
    """Copies of a network with other last weights each."""
    made = []
    for place in range(count):
        other = student_like(network)
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            for tensor in list(other.parameters())[-2:]:
                tensor.mul_(1 + 0.2 * (place + 1))
        made.append(other.eval().requires_grad_(False))
    return made


def call_of(name):
    keys = (*SIZE, "num_frames", "max_sequence_length")
    return {key: value for key, value in TINY[name].call.items() if key in keys}


@dataclass
class Case:
    """A pipeline, its host, and experts whose boundaries lie between the times of a grid of four."""

    name: str
    count: int = 2

    def __post_init__(self):
        self.pipe = fresh(self.name)
        self.host = Host(self.pipe, call_of(self.name))
        self.grid = Grid.stock(self.pipe.scheduler, 4)
        if not self.name.startswith("wan"):
            self.networks = variants(self.host.network, self.count)
        else:
            self.networks = variants(self.pipe.transformer, self.count)
        times = self.grid.times
        places = [4 * place // self.count for place in range(1, self.count)]
        self.bounds = [*((times[place - 1] + times[place]) / 2 for place in places), 0.0]
        self.experts = tuple(
            Expert(Denoiser(network, self.host.units), bound)
            for network, bound in zip(self.networks, self.bounds, strict=True)
        )
        self.owner = [next(k for k, bound in enumerate(self.bounds) if time >= bound) for time in times]

    def pipeline(self, network):
        pipe = with_network(self.pipe, self.host.component, network)
        pipe.scheduler = fixed_grid(self.pipe.scheduler, [self.grid])
        return pipe

    def call(self, pipe, **options):
        scale = {} if self.name == "flux" else {"guidance_scale": 1.0}
        return run(TINY[self.name], pipe, 4, **{**scale, **options})


class ByHand(nn.Module):
    """Calls the networks in the order in which they are given, whatever the timestep."""

    def __init__(self, networks):
        super().__init__()
        self.networks, self.step = nn.ModuleList(networks), 0
        self.config, self.dtype = networks[0].config, networks[0].dtype

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.networks[0], name)

    def forward(self, *args, **kwargs):
        self.step += 1
        return self.networks[self.step - 1](*args, **kwargs)


@pytest.mark.parametrize(("name", "count"), [("sd", 2), ("dit", 3), ("flux", 2), ("sdxl", 2)])
def test_sampling_is_that_of_the_experts_by_hand(name, count):
    """Bit for bit: in a pipeline each step is made by the network that owns its time."""
    case = Case(name, count)
    network = joined(case.experts, case.host.units)
    check_grids(case.experts, case.host.units, [case.grid])
    found = case.call(case.pipeline(network))
    pipe = case.pipeline(ByHand([case.networks[k] for k in case.owner]))
    assert torch.equal(found, case.call(pipe)) and set(case.owner) == set(range(count))
    for other in case.networks:
        assert not torch.equal(found, case.call(case.pipeline(other)))


@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_rows_of_different_experts(name):
    """Each row is, bit for bit, what its expert makes of these rows, in any order of the batch."""
    case = Case(name, 2)
    student = Denoiser(joined(case.experts, case.host.units), case.host.units)
    conditions = [0, 1, 2, 3] if name == "dit" else ["a", "b", "c", "d"]
    inputs, bound = case.host.encode(conditions), case.bounds[0]
    x = torch.randn(4, *case.host.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([bound + 0.05, bound - 0.05, 0.99, 0.02])
    with torch.no_grad():
        found = student(x, t, inputs).velocity
        for rows, network in (([0, 2], case.networks[0]), ([1, 3], case.networks[1])):
            alone = Denoiser(network, case.host.units)(x[rows], t[rows], inputs.take(rows)).velocity
            assert torch.equal(found[rows], alone)
        turned = [3, 1, 0, 2]
        other = student(x[turned], t[turned], inputs.take(turned)).velocity
    assert torch.allclose(other, found[turned], rtol=0, atol=1e-5)


def test_outputs_are_packed_as_the_network_packs_them():
    case = Case("sd", 2)
    network, unit = joined(case.experts, case.host.units), case.networks[0]
    x, text = torch.randn(3, 4, 16, 16), torch.randn(3, 8, 32)
    for t in (torch.tensor(900), torch.tensor([900, 10, 950]), 900, torch.tensor([900])):
        assert type(network(x, t, text)) is type(unit(x, 5, text))
        assert network(x, t, encoder_hidden_states=text, return_dict=False)[0].shape == x.shape
    with pytest.raises(UnsupportedPipeline, match=r"timesteps of shape \(3, 2\)"):
        network(x, torch.ones(3, 2), text)


def lora_case(name="sd", count=2):
    """A case whose experts are adapters of the pipeline's own network, beside one that is no expert."""
    case = Case(name, count)
    base = case.host.network
    names = [f"phase{place}" for place in range(count)]
    for place, adapter in enumerate((*names, "fake")):
        add_lora(base, adapter, 2, alpha=3.0, seed=place)
        torch.manual_seed(place)
        for parameter in lora_parameters(base, adapter).values():
            nn.init.normal_(parameter, std=0.3)
    case.experts = tuple(Expert(Denoiser(base, case.host.units, adapter), bound)
                         for adapter, bound in zip(names, case.bounds, strict=True))  # fmt: skip
    return case, names


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_adapters_are_switched_at_each_step(name):
    """As by hand, bit for bit; the adapter that was in force before is so afterwards."""
    case, names = lora_case(name)
    network = joined(case.experts, case.host.units)
    assert isinstance(network, NoiseExperts) and len(network.networks) == 1
    x = torch.randn(2, *case.host.shape)
    inputs = case.host.encode([0, 1] if name == "dit" else ["a", "b"])
    with torch.no_grad():
        for time, adapter in ((0.99, names[0]), (0.05, names[1])):
            t = torch.full((2,), time)
            found = Denoiser(network, case.host.units)(x, t, inputs).velocity
            with using(case.host.network, adapter):
                assert torch.equal(found, Denoiser(case.host.network, case.host.units)(x, t, inputs).velocity)
            plain = Denoiser(case.host.network, case.host.units)(x, t, inputs).velocity  # "fake", the last
            assert not torch.equal(found, plain)


# ---------------------------------------------------------------- files


def reloaded(folder, dtype=torch.float32):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_pipelines_are_saved_and_loaded(name, tmp_path):
    """Stock ``from_pretrained``: the same images to the bit, and the same index; copies and pickles too."""
    case = Case(name, 2)
    pipe = case.pipeline(joined(case.experts, case.host.units))
    wanted = case.call(pipe)
    pipe.save_pretrained(tmp_path)
    own = reloaded(tmp_path)
    network = getattr(own, part_of(name))
    assert type(network) is NoiseExperts and type(network.leading) is type(case.networks[0])
    for part in own.components.values():  # weights that are mapped from a file are not aligned as others
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.clone()
    assert torch.equal(case.call(own), wanted)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(case.call(case.pipeline(other)), wanted)
    assert network.config.in_channels == case.networks[0].config.in_channels
    assert network.dtype == torch.float32 and network.device.type == "cpu"
    assert network.config.boundaries == pytest.approx([timestep_of(case.host.units, case.bounds[0])])


@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_exports(name, tmp_path):
    """float16 weights and the exact grid; what is loaded is compared with the training, as of one network."""
    case = Case(name, 2)
    network, guidance = joined(case.experts, case.host.units), 3.5 if name == "flux" else 1.0
    folder = export(network, case.pipe, part_of(name), case.grid, tmp_path / "it", guidance=guidance,
                    card=CARD, options=call_of(name))  # fmt: skip
    text = (folder / "README.md").read_text()
    assert text.index("import diffaccel") < text.index("from_pretrained")
    assert "loaded again" in text and "| experts | 2 networks, by noise level" in text and "float16" in text
    own = reloaded(folder, torch.float16)
    kinds = {tensor.dtype for tensor in getattr(own, part_of(name)).state_dict().values()}
    assert kinds == {torch.float16} and own.scheduler.config["_trained_steps"] == [4]
    plain = reloaded(folder)
    found, wanted = case.call(plain), case.call(case.pipeline(network))
    assert float((found - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())
    if name != "dit":  # no guidance scale can do harm, as for one network
        assert torch.equal(found, case.call(plain, guidance_scale=7.5))


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_exported_adapters(name, tmp_path):
    """One base and two adapters in one folder; adapters that are no experts stay behind."""
    case, names = lora_case(name)
    network = joined(case.experts, case.host.units)
    wanted = case.call(case.pipeline(network))
    folder = export(network, case.pipe, part_of(name), case.grid, tmp_path / "it", guidance=1.0, card=CARD,
                    options=call_of(name), dtype=torch.float32)  # fmt: skip
    own = reloaded(folder)
    found = getattr(own, part_of(name))
    assert len(found.networks) == 1 and list(found.leading.peft_config) == names
    assert not [key for key in found.state_dict() if "fake" in key]
    assert torch.allclose(case.call(own), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert "2 adapters of one network" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["dit"])
def test_adapters_without_their_network(name, tmp_path):
    """A folder of adapters and a scheduler; put on the teacher's network, they make the student's images."""
    case, _ = lora_case(name)
    network = joined(case.experts, case.host.units)
    wanted = case.call(case.pipeline(network))
    common = {"guidance": 1.0, "card": CARD, "options": call_of(name), "dtype": torch.float32}
    folder = export_lora(network, None, case.pipe, part_of(name), case.grid, tmp_path / "it", **common)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "adapters.safetensors", "config.json", "scheduler", "student.json"
    ]  # fmt: skip
    text = (folder / "README.md").read_text()
    assert f'pipe.{part_of(name)} = NoiseExperts.on(pipe.{part_of(name)}, "it")' in text
    assert "import DiffusionPipeline" in text and "load_lora_weights" not in text
    pipe = fresh(name)
    setattr(pipe, part_of(name), NoiseExperts.on(getattr(pipe, part_of(name)), folder))
    pipe.scheduler = FixedGridScheduler.from_pretrained(folder, subfolder="scheduler")
    assert torch.equal(case.call(pipe), wanted)
    with pytest.raises(OptionError, match="an adapter 'phase0' already"):
        NoiseExperts.on(getattr(pipe, part_of(name)).leading, folder)
    with pytest.raises(ModelError, match="not of a FluxTransformer2DModel"):
        NoiseExperts.on(fresh("flux").transformer, folder)
    with pytest.raises(ModelError, match="cannot read"):
        (folder / "adapters.safetensors").unlink()
        NoiseExperts.on(getattr(fresh(name), part_of(name)), folder)
    with pytest.raises(OptionError, match="networks of their own"):
        whole = joined(Case(name, 2).experts, case.host.units)
        export_lora(whole, None, fresh(name), part_of(name), case.grid, tmp_path / "other", **common)
    assert not (tmp_path / "other").exists()


def test_two_places_of_a_pipeline(tmp_path):
    """Wan: two experts leave as the stock pipeline of Wan 2.2, from a teacher of one network or of two."""
    for name in ("wan", "wan22"):
        case = Case(name, 2)
        case.grid = Grid((1.0, 0.9375, 5 / 6, 0.625))
        experts = [Expert(expert.denoiser, bound)
                   for expert, bound in zip(case.experts, (0.88, 0.0), strict=True)]  # fmt: skip
        network = joined(experts, case.host.units)
        folder = export(network, case.pipe, "transformer", case.grid, tmp_path / name, guidance=1.0,
                        card=CARD, options=call_of(name), dtype=torch.float32)  # fmt: skip
        own = reloaded(folder)
        assert own.config.boundary_ratio == pytest.approx(0.88)
        assert type(own.transformer) is type(own.transformer_2) is diffusers.WanTransformer3DModel
        last = [list(part.parameters())[-1] for part in (own.transformer, own.transformer_2)]
        trained = [list(part.parameters())[-1] for part in case.networks]
        assert all(torch.equal(a, b) for a, b in zip(last, trained, strict=True))
        assert type(own.scheduler) is FixedGridScheduler
        with pytest.raises(OptionError, match="trained for 4 steps, not for 5"):
            run(TINY[name], own, 5)
        assert case.pipe.config.boundary_ratio == (0.875 if name == "wan22" else None)


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_adapters_in_two_places(name, tmp_path):
    """Adapters of one network, or of the two of a teacher, are merged, each into its place."""
    pipe = fresh(name)
    host = Host(pipe, call_of(name))
    bases = [pipe.transformer, pipe.transformer_2 or pipe.transformer]
    for place, base in enumerate(bases):
        add_lora(base, f"phase{place}", 2, seed=place)
        torch.manual_seed(place)
        for parameter in lora_parameters(base, f"phase{place}").values():
            nn.init.normal_(parameter, std=0.3)
    experts = [Expert(Denoiser(base, host.units, f"phase{place}"), (0.88, 0.0)[place])
               for place, base in enumerate(bases)]  # fmt: skip
    grid, options = Grid((1.0, 0.9375, 5 / 6, 0.625)), {"options": call_of(name), "dtype": torch.float32}
    folder = export(joined(experts, host.units), pipe, "transformer", grid, tmp_path / name, guidance=1.0,
                    card=CARD, **options)  # fmt: skip
    own = reloaded(folder)
    for place, base in enumerate(bases):
        part = (own.transformer, own.transformer_2)[place].state_dict()
        for key, value in merged(base, f"phase{place}").items():
            assert torch.equal(part[key], value)


def test_one_student_of_a_teacher_of_two(tmp_path):
    case = Case("wan22", 1)
    folder = export(case.networks[0], case.pipe, "transformer", Grid((1.0,)), tmp_path / "it", guidance=1.0,
                    card=CARD, options=call_of("wan22"), dtype=torch.float32)  # fmt: skip
    own = reloaded(folder)
    assert own.transformer_2 is None and own.config.boundary_ratio is None


# ---------------------------------------------------------------- teachers of two networks


def test_a_teacher_split_over_noise():
    """Rows of both kinds in one batch are what their own network makes of them, bit for bit."""
    pipe = fresh("wan22")
    host = Host(pipe, call_of("wan22"))
    teacher = Denoiser.of(host)
    inputs = host.encode(["a", "b", "c", "d"])
    x = torch.randn(4, *host.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.95, 0.5, 0.875, 0.87])  # the pipeline's own rule has the boundary itself above
    with torch.no_grad():
        found = teacher(x, t, inputs).velocity
        for rows, network in (([0, 2], pipe.transformer), ([1, 3], pipe.transformer_2)):
            alone = Denoiser(network, host.units)(x[rows], t[rows], inputs.take(rows)).velocity
            assert torch.equal(found[rows], alone)
    copied = copy.deepcopy(host.network)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in host.network.parameters()})
    assert len(list(copied.parameters())) == 2 * len(list(pipe.transformer.parameters()))


def test_a_student_of_a_teacher_split_over_noise(tmp_path):
    """Distribution matching on Wan 2.2: both networks learn, and leave in their places."""
    pipe = fresh("wan22")
    host = Host(pipe, call_of("wan22"))
    student = copy.deepcopy(host.network).requires_grad_(True)
    method = method_of("dmd2", {"ratio": 1, "times": (0.95, 0.5)})
    method.begin(Setup(host, Denoiser.of(host), Denoiser(student, host.units), 2.0, 8, (2,)))
    x0, noise = torch.randn(2, 4, *host.shape, generator=torch.Generator().manual_seed(0))
    for turn, network in method.networks.items():
        for images in range(0, 32, 8):  # either step of the student, times above and below the boundary
            batch = Batch(x0, noise, host.encode(["a", "b", "c", "d"]), Draws(0, range(4), turn), images)
            sum(method.loss(turn, batch).values()).backward()
        for part in network.network.networks:
            assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    folder = export(student, pipe, "transformer", method.grid(2), tmp_path / "it", guidance=1.0, card=CARD,
                    options=call_of("wan22"), dtype=torch.float32)  # fmt: skip
    own = reloaded(folder)
    for part, trained in zip((own.transformer, own.transformer_2), student.networks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), trained.parameters(), strict=True))


def test_several_networks_that_are_not_by_noise():
    with pytest.raises(UnsupportedPipeline, match="features of one network"):
        middle_of(Host(fresh("wan22"), call_of("wan22")).network)
    pipe = fresh("wan22")
    pipe.register_to_config(boundary_ratio=None)
    with pytest.raises(UnsupportedPipeline, match="several networks: transformer, transformer_2"):
        Host(pipe, call_of("wan22"))


# ---------------------------------------------------------------- refusals


def test_boundaries_that_are_ambiguous_or_out_of_order():
    case = Case("dit", 2)
    units, (first, second) = case.host.units, (expert.denoiser for expert in case.experts)
    grid = Grid(case.grid.times, case.grid.kind)
    at = case.grid.times[1]
    for bound in (at, at * (1 + 1e-7), at * 1.003, at * 0.997):
        with pytest.raises(OptionError, match="so near to the boundary"):
            check_grids([Expert(first, bound), Expert(second)], units, [grid])
    for bounds in ((0.2, 0.5), (0.5, 0.5), (0.5, 0.1), (1.0, 0.0)):
        with pytest.raises(OptionError, match="expected falling ones"):
            joined([Expert(first, bounds[0]), Expert(second, bounds[1])], units)
    with pytest.raises(OptionError, match="expert 2 of 2, from the time 0 on, makes no step of the grids"):
        check_grids([Expert(first, 0.5), Expert(second)], units, [Grid((1.0,))])
    check_grids([Expert(first)], units, [Grid((1.0,))])
    with pytest.raises(OptionError, match="trained for 4 steps, not for 3"):
        run(TINY["dit"], case.pipeline(joined(case.experts, units)), 3)


@pytest.mark.parametrize("units", [FlowUnits(0, 1000), FlowUnits(1, -1), EDMUnits(0.5, "epsilon")])
def test_all_units(units):
    """Whatever the timestep counts, rising or falling, the choice is that of the path's time."""
    case = Case("dit", 3)
    experts = [Expert(expert.denoiser, bound)
               for expert, bound in zip(case.experts, (0.7, 0.3, 0.0), strict=True)]  # fmt: skip
    network = joined(experts, units)
    for time, place in ((0.99, 0), (0.71, 0), (0.69, 1), (0.31, 1), (0.29, 2), (0.01, 2)):
        assert network.route((), {"timestep": torch.tensor(timestep_of(units, time))}) == [place]


def test_configurations_that_are_not_ours():
    with pytest.raises(ModelError, match="no class 'Popen' is taken of 'subprocess'"):
        NoiseExperts(
            networks=[{"library": "subprocess", "class": "Popen", "config": {}}], members=[[0, None]]
        )
    with pytest.raises(ModelError, match="Linear cannot be one of several"):
        NoiseExperts.of([(nn.Linear(1, 1), None)])
    case = Case("dit", 2)
    with pytest.raises(OptionError, match="2 experts and 0 boundaries"):
        NoiseExperts.of([(network, None) for network in case.networks])
    with pytest.raises(OptionError, match="no two alike"):
        NoiseExperts(boundaries=[1.0, 2.0])
