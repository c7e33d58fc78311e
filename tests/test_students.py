"""Students made by pruning, and adapters that share one network."""

import math
import sys

import diffusers
import pytest
import torch
from tiny_pipelines import fresh, make_flux, normal, unet, wan_transformer
from torch import nn

from diffaccel import zoo
from diffaccel.distill.adapters import add_lora, lora_parameters, merged, using
from diffaccel.distill.students import prune, student_like
from diffaccel.errors import ModelError, OptionError

DIT = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 6, "out_channels": 4,
       "sample_size": 8, "num_embeds_ada_norm": 12}  # fmt: skip


def dit(**changes):
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(**{**DIT, **changes}).eval()


def numbered(network):
    """Every tensor holds the numbers of its entries, so that a part of it tells where it comes from."""
    for tensor in network.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view_as(tensor))
    return network.double()


def taken(teacher, student, name, source=None, axis=0):
    """Where the entries of the student's tensor stood in the teacher's, along an axis."""
    old, new = teacher.state_dict()[source or name], student.state_dict()[name].double()
    gain = math.sqrt(old.shape[1] / new.shape[1]) if new.ndim > 1 and "embedding" not in name else 1.0
    places = (new / gain).round().long().movedim(axis, 0).flatten(1)[:, 0] if new.ndim > 1 else new.long()
    return (places // math.prod(old.shape[axis + 1 :])) % old.shape[axis]


def thinned(old, new):
    return [k * old // new for k in range(new)]


# ---------------------------------------------------------------- students


def test_student_like():
    teacher = dit()
    state = torch.get_rng_state()
    student = student_like(teacher, num_layers=2, attention_head_dim=8)
    assert torch.equal(state, torch.get_rng_state())
    assert type(student) is type(teacher) and student.config.num_layers == 2 and student.inner_dim == 24
    assert student.config.num_attention_heads == 3 and student.config.num_embeds_ada_norm == 12
    same = student_like(teacher, num_layers=2, attention_head_dim=8)
    other = student_like(teacher, seed=1, num_layers=2, attention_head_dim=8)
    assert torch.equal(same.proj_out_2.weight, student.proj_out_2.weight)
    assert not torch.equal(other.proj_out_2.weight, student.proj_out_2.weight)
    assert student_like(student.half(), num_layers=1).dtype == torch.float32
    assert student_like(unet(), time_cond_proj_dim=4).time_embedding.cond_proj is not None  # was a default


def test_student_like_refuses():
    with pytest.raises(OptionError, match="no 'num_layer'; did you mean 'num_layers'"):
        student_like(dit(), num_layer=2)
    with pytest.raises(OptionError, match="refuses"):
        student_like(unet(), block_out_channels=(32,))
    with pytest.raises(OptionError, match="expected a diffusers model"):
        student_like(nn.Linear(2, 2))


def test_the_whole_teacher():
    teacher = dit()
    student = student_like(teacher, seed=7)
    report = prune(teacher, student)
    assert not report.random and not report.sliced and not report.dropped and not report.layers
    x, t, y = normal(2, 4, 8, 8), torch.tensor([300, 900]), torch.tensor([1, 12])
    assert torch.equal(student.eval()(x, t, y).sample, teacher(x, t, y).sample)


def test_layers_are_spread():
    for keep, places in {2: (0, 5), 3: (0, 3, 5), 4: (0, 2, 3, 5), 1: (0,)}.items():
        teacher, student = dit(), student_like(dit(), num_layers=keep)
        report = prune(teacher, student)
        assert report.layers == {"transformer_blocks": places} and not report.random and not report.sliced
        for own, block in zip(places, student.transformer_blocks, strict=True):
            assert torch.equal(block.ff.net[2].weight, teacher.transformer_blocks[own].ff.net[2].weight)
        gone = set(range(6)) - set(places)
        assert {int(name.split(".")[1]) for name in report.dropped} == gone
        assert f"layers {', '.join(map(str, places))}" in str(report)


def test_named_layers():
    teacher, student, name = dit(), student_like(dit(), num_layers=2), "transformer_blocks"
    assert prune(teacher, student, {name: [1, 4]}).layers == {name: (1, 4)}
    own, theirs = student.transformer_blocks[1], teacher.transformer_blocks[4]
    assert torch.equal(own.attn1.to_q.weight, theirs.attn1.to_q.weight)
    for layers, words in (({name: [4, 1]}, "rising"), ({name: [0, 6]}, "below 6"), ({name: [0]}, "2 rising"),
                          ({"blocks": [0, 1]}, "known: transformer_blocks$")):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            prune(teacher, student, layers)


def test_refusals():
    with pytest.raises(OptionError, match="no more than its teacher"):
        prune(dit(), student_like(dit(), num_layers=7))
    with pytest.raises(OptionError, match="out_channels is 8, and 4 in the teacher"):
        prune(dit(), student_like(dit(), out_channels=8))
    with pytest.raises(ModelError, match="cannot inherit"):
        prune(dit(), unet())
    with pytest.raises(OptionError, match="keeps its resolutions"):
        small = student_like(unet(), block_out_channels=(32,), down_block_types=("DownBlock2D",),
                             up_block_types=("UpBlock2D",))  # fmt: skip
        prune(unet(), small)
    wider = student_like(dit(), num_attention_heads=4)
    report = prune(dit(), wider)
    assert "proj_out_2.weight" in report.random and "proj_out_2.bias" in report.whole


def test_width_of_a_dit():
    """Heads are whole; the stream, the chunks of shifts and scales, and the classes are where they were."""
    teacher, student = numbered(dit()), student_like(dit(), num_attention_heads=2, num_embeds_ada_norm=5)
    report = prune(teacher, student)
    assert not report.random
    block, stream, heads = "transformer_blocks.3", thinned(48, 32), [*range(16), *range(16, 32)]
    for layer in ("to_q", "to_k", "to_v"):
        assert taken(teacher, student, f"{block}.attn1.{layer}.weight").tolist() == heads
        assert taken(teacher, student, f"{block}.attn1.{layer}.bias").tolist() == heads
        assert taken(teacher, student, f"{block}.attn1.{layer}.weight", axis=1).tolist() == stream
    assert taken(teacher, student, f"{block}.attn1.to_out.0.weight", axis=1).tolist() == heads
    assert taken(teacher, student, f"{block}.attn1.to_out.0.weight").tolist() == stream
    six = [48 * chunk + place for chunk in range(6) for place in stream]
    assert taken(teacher, student, f"{block}.norm1.linear.weight").tolist() == six
    hidden = taken(teacher, student, f"{block}.ff.net.0.proj.weight").tolist()
    assert hidden == taken(teacher, student, f"{block}.ff.net.2.weight", axis=1).tolist() == thinned(192, 128)
    table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
    assert taken(teacher, student, table).tolist() == [0, 1, 2, 3, 4, 12]  # the last row is no class
    assert taken(teacher, student, table, axis=1).tolist() == stream


def test_smaller_heads_are_thinned():
    teacher, student = numbered(dit()), student_like(dit(), attention_head_dim=8)
    prune(teacher, student)
    each = [16 * head + 2 * place for head in range(3) for place in range(8)]
    assert taken(teacher, student, "transformer_blocks.0.attn1.to_v.weight").tolist() == each


def test_width_of_a_unet():
    """Resolutions that become narrower by different factors: joined inputs are thinned part by part."""
    options = {"block_out_channels": (32, 64), "attention_head_dim": 4, "layers_per_block": 2}
    teacher = numbered(unet(**options))
    student = student_like(unet(**options), block_out_channels=(32, 32), layers_per_block=1)
    report = prune(teacher, student)
    assert not report.random
    assert report.layers["up_blocks.1.resnets"] == (0, 2) and report.layers["down_blocks.0.resnets"] == (0,)
    first = "up_blocks.1.resnets.0"  # 64 of the stream, and 32 joined
    joined = [*thinned(64, 32), *range(64, 96)]
    for part in ("norm1.weight", "norm1.bias"):
        assert taken(teacher, student, f"{first}.{part}").tolist() == joined
    for part in ("conv1.weight", "conv_shortcut.weight"):
        assert taken(teacher, student, f"{first}.{part}", axis=1).tolist() == joined
    last = [f"up_blocks.0.resnets.{place}.conv1.weight" for place in (1, 2)]
    assert taken(teacher, student, *last, axis=1).tolist() == joined  # joined from the finer resolution
    gated = "mid_block.attentions.0.transformer_blocks.0.ff.net"
    halves = taken(teacher, student, f"{gated}.0.proj.weight").tolist()
    inner = taken(teacher, student, f"{gated}.2.weight", axis=1).tolist()
    assert halves == [*inner, *(256 + place for place in inner)]


def test_width_of_a_flux():
    """One projection of joined attention and MLP: whole heads of the one, the other thinned."""

    def make():
        return make_flux(guidance_embeds=True).transformer

    teacher = numbered(make())
    student = student_like(make(), num_attention_heads=1, num_single_layers=1, num_layers=1)
    report = prune(teacher, student)
    assert not report.random and set(report.layers) == {"transformer_blocks", "single_transformer_blocks"}
    joined = taken(teacher, student, "single_transformer_blocks.0.proj_out.weight", axis=1).tolist()
    assert joined == [*range(16), *(32 + place for place in thinned(128, 64))]
    added = "transformer_blocks.0.attn.to_add_out.weight"
    assert taken(teacher, student, added, axis=1).tolist() == [*range(16)]


@pytest.mark.parametrize("name", ["sd3", "wan", "ddim"])
def test_other_networks_run(name):
    if name == "wan":
        teacher = wan_transformer()
        student = student_like(teacher, num_attention_heads=1, num_layers=1, ffn_dim=16)
        given = {"hidden_states": normal(1, 4, 2, 4, 4), "encoder_hidden_states": normal(1, 3, 32)}
    elif name == "sd3":
        teacher = fresh("sd3").transformer
        student = student_like(teacher, num_attention_heads=1, caption_projection_dim=16, num_layers=1)
        given = {"hidden_states": normal(1, 4, 8, 8), "encoder_hidden_states": normal(1, 3, 32),
                 "pooled_projections": normal(1, 64)}  # fmt: skip
    else:
        teacher = fresh("ddim").unet
        student = student_like(teacher, block_out_channels=(8, 24))
        given = {"sample": normal(1, 3, 16, 16)}
    report = prune(teacher, student)
    assert not report.random and report.sliced
    with torch.no_grad():
        assert torch.isfinite(student(**given, timestep=torch.tensor([500])).sample).all()


def test_pruned_zoo():
    """A third of the weights know most of the teacher's velocity before any training; random ones nothing."""
    pipe = zoo.load("tiny-fashion-dit")
    teacher = pipe.transformer.eval()
    student = student_like(teacher, num_layers=4, attention_head_dim=60, num_embeds_ada_norm=90).eval()
    count, whole = (sum(p.numel() for p in network.parameters()) for network in (student, teacher))
    assert count == 2_795_596 and count / whole < 0.4
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(zoo.labels(16))
    eps, t = torch.randn(16, 4, 16, 16, generator=generator), torch.rand(16, generator=generator)
    with torch.no_grad():
        v = teacher(eps, torch.full((16,), 1000.0), labels).sample
        x_t = eps - (1 - t).view(-1, 1, 1, 1) * v  # towards the mean of the data
        target = teacher(x_t, 1000 * t, labels).sample
        errors = []
        for inherit in (False, True):
            if inherit:
                assert not prune(teacher, student).random
            errors.append(float((student(x_t, 1000 * t, labels).sample - target).var() / target.var()))
    assert errors[0] > 1 and errors[1] < 0.4, errors


# ---------------------------------------------------------------- adapters


def outputs(network):
    with torch.no_grad():
        return network(normal(2, 4, 8, 8), torch.tensor([300, 900]), torch.tensor([1, 2])).sample


def trained_adapters(network, *names):
    for seed, name in enumerate(names):
        add_lora(network, name, 2, alpha=4.0, seed=seed)
        torch.manual_seed(seed)
        for parameter in lora_parameters(network, name).values():
            nn.init.normal_(parameter, std=0.3)
    return network


def flags(network):
    return {name: parameter.requires_grad for name, parameter in network.named_parameters()}


def test_a_new_adapter_changes_nothing():
    network = dit(num_layers=2)
    before, state = outputs(network), torch.get_rng_state()
    add_lora(network, "student", 2)
    assert torch.equal(outputs(network), before) and torch.equal(state, torch.get_rng_state())
    own = lora_parameters(network, "student")
    assert len(own) == 2 * 2 * 4 and sum(p.numel() for p in own.values()) == 2 * 4 * (48 + 48) * 2
    assert {name for name, wanted in flags(network).items() if wanted} == set(own)


@pytest.mark.parametrize("make", [lambda: dit(num_layers=2), lambda: fresh("sd").unet], ids=["dit", "unet"])
def test_several_on_one_base(make):
    """The base and every adapter by turns; one base in memory; what is trained stays what it was."""
    network = make()
    plain = list(network.parameters())
    base = sum(p.numel() for p in plain)
    trained_adapters(network, "student", "fake")
    assert all(not p.requires_grad for p in plain)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    added = sum(p.numel() for name in ("student", "fake") for p in lora_parameters(network, name).values())
    assert sum(storages.values()) == 4 * (base + added) and added < base
    before = flags(network)
    assert all(before[name] for adapter in ("student", "fake") for name in lora_parameters(network, adapter))
    probe = next(module for module in network.modules() if hasattr(module, "lora_A"))
    x = normal(3, probe.in_features)
    found = {}
    for name in ("student", None, "fake"):
        with using(network, name):
            found[name] = probe(x).detach()
            assert flags(network) == before
    scale = {name: 2 * probe.lora_B[name].weight @ probe.lora_A[name].weight for name in ("student", "fake")}
    for name, delta in scale.items():
        assert torch.allclose(found[name] - found[None], x @ delta.T, atol=1e-5)
    assert torch.equal(found[None], probe.base_layer(x))


def test_what_was_active_is_active_again():
    network = trained_adapters(dit(num_layers=2), "student", "fake")
    last = outputs(network)
    with using(network, "student"):
        student = outputs(network)
        with using(network, None):
            base = outputs(network)
            with using(network, "fake"):
                assert torch.equal(outputs(network), last)
            assert torch.equal(outputs(network), base)
        assert torch.equal(outputs(network), student)
    assert torch.equal(outputs(network), last)
    with pytest.raises(RuntimeError, match="stop"), using(network, None):
        raise RuntimeError("stop")
    assert torch.equal(outputs(network), last)
    assert not torch.allclose(student, base) and not torch.allclose(student, last)


def test_gradients_reach_the_adapter_in_force():
    network = trained_adapters(dit(num_layers=2), "student", "fake")
    x = normal(2, 4, 8, 8)
    with using(network, "student"):
        network(x, torch.tensor([300, 900]), torch.tensor([1, 2])).sample.square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(network, "student").values())
    assert all(p.grad is None for p in lora_parameters(network, "fake").values())


def test_merged_is_the_adapter():
    network = trained_adapters(dit(num_layers=2), "student", "fake")
    for name in ("student", "fake", None):
        plain = dit(num_layers=2)
        plain.load_state_dict(merged(network, name))
        with using(network, name):
            assert torch.allclose(outputs(plain), outputs(network), atol=1e-5)


def test_wrong_adapters(monkeypatch):
    network = dit(num_layers=2)
    with using(network, None):  # no adapters: the network as it is
        pass
    with pytest.raises(OptionError, match="'to_x' matches no layer of DiTTransformer2DModel; did you mean"):
        add_lora(network, "student", 2, targets=("to_q", "to_x"))
    assert not any("lora" in name for name, _ in network.named_modules())
    add_lora(network, "student", 2, targets=("to_q", "ff.net.2", "proj_out_2"))
    with pytest.raises(OptionError, match="taken: student"):
        add_lora(network, "student", 2)
    for call in (lambda: lora_parameters(network, "fake"), lambda: using(network, "fake").__enter__(),
                 lambda: merged(network, "fake")):  # fmt: skip
        with pytest.raises(OptionError, match="no adapter 'fake'; known: student"):
            call()
    for rank, alpha in ((0, None), (2, 0.0)):
        with pytest.raises(OptionError, match="expected at least 1"):
            add_lora(network, "other", rank, alpha)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"pip install diffaccel\[distill\]"):
        add_lora(network, "other", 2)
