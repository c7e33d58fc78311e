"""Combination of LoRA adapters: exact by concatenation, negative weights included, and back at their rank."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffaccel.distill import averages
from diffaccel.distill.checkpoint_files import open_checkpoint
from diffaccel.distill.checkpoints import CheckpointError
from diffaccel.distill.lora_stack import LoraStack

K = 5


class Host(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.to_q, self.to_k = nn.Linear(12, 10), nn.Linear(12, 8)
        self.conv = nn.Conv2d(4, 6, 3)


ALPHA = [1.8, -0.9, 0.6, -0.7, 0.2]


@pytest.fixture
def adapters(tmp_path):
    """Files of five adapters of rank 2, and their changes of the weights."""
    files, deltas = [], []
    for seed in range(K):
        source, state, delta = torch.Generator().manual_seed(seed), {}, {}
        for layer, (out, shape) in {"to_q": (10, (12,)), "conv": (6, (4, 3, 3))}.items():
            a = torch.randn(2, *shape, generator=source)
            b = torch.randn(out, 2, *[1] * (len(shape) - 1), generator=source)
            state |= {f"net.{layer}.lora_A.weight": a, f"net.{layer}.lora_B.weight": b}
            delta[layer] = 1.5 * (b.flatten(1).double() @ a.flatten(1).double()).view(out, *shape)
        files.append(tmp_path / f"{seed}.safetensors")
        settings_ = {"lora_adapter_metadata": json.dumps({"net.r": 2, "net.lora_alpha": 3})}
        save_file(state, files[-1], metadata=settings_)
        deltas.append(delta)
    return [open_checkpoint(file) for file in files], deltas


def test_adapters_are_combined_by_what_they_change(adapters):
    """Exact for negative coefficients, too; then at their own rank, by the best approximation."""
    checkpoints, deltas = adapters
    stack, network = LoraStack(checkpoints, "net"), Host()
    base = {name: value.clone().double() for name, value in network.state_dict().items()}
    targets = stack.targets(network)
    stack.write(ALPHA, targets)
    wanted = {layer: sum(a * delta[layer] for a, delta in zip(ALPHA, deltas, strict=True))
              for layer in ("to_q", "conv")}  # fmt: skip
    for layer, delta in wanted.items():
        found = network.get_submodule(layer).weight.double() - base[f"{layer}.weight"]
        assert (found - delta).norm() / delta.norm() < 1e-6
    saved = stack.write_reduced(ALPHA, targets)
    for layer, delta in wanted.items():
        a, b = (saved[f"net.{layer}.lora_{part}.weight"].flatten(1).double() for part in "AB")
        assert len(a) == 2
        s = torch.linalg.svdvals(delta.flatten(1))
        assert (b @ a - delta.flatten(1)).norm() == pytest.approx(s[2:].norm().item(), rel=1e-4)
        own = network.get_submodule(layer).weight.double() - base[f"{layer}.weight"]
        assert torch.allclose(own.flatten(1), b @ a, atol=1e-5)
    stack.write(averages.one_hot(K, 3), targets)
    assert torch.allclose(network.to_q.weight.double() - base["to_q.weight"], deltas[3]["to_q"], atol=1e-5)


def test_adapters_are_combined_as_peft_does(tmp_path):
    """Against peft's own concatenation, negative weights included; names as a run keeps them."""
    peft, names, alpha = pytest.importorskip("peft"), ["one", "two", "three"], [1.5, -0.8, 0.3]
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"])
    model, files = peft.get_peft_model(Host(), config, "one"), []
    for place, name in enumerate(names):
        if place:
            model.add_adapter(name, config)
        state = {}
        for key, value in model.named_parameters():
            if f".{name}." in key:
                value.data = torch.randn(
                    value.shape, generator=torch.Generator().manual_seed(place + len(key))
                )
                state[key.removeprefix("base_model.model.").replace(name, "student")] = value.detach()
        files.append(tmp_path / f"{place}.safetensors")
        save_file(state, files[-1])
    model.base_model.add_weighted_adapter(names, alpha, "all", combination_type="cat")
    stack, plain = LoraStack([open_checkpoint(file) for file in files]), Host()
    before = plain.to_q.weight.clone()
    stack.write(alpha, stack.targets(plain))
    theirs = model.base_model.model.to_q.get_delta_weight("all")
    assert (plain.to_q.weight - before - theirs).norm() / theirs.norm() < 1e-6


def test_bad_adapters_are_refused(adapters, tmp_path):
    checkpoints, _ = adapters
    with pytest.raises(CheckpointError, match="1 checkpoint"):
        LoraStack(checkpoints[:1], "net")
    with pytest.raises(CheckpointError, match=r"adapts 'conv' of shape .*no such layer"):
        LoraStack(checkpoints, "net").targets(nn.Linear(2, 2))
    a, b = torch.zeros(2, 12), torch.zeros(10, 2)
    cases = {
        "no LoRA weight": {"net.to_q.hada_w1": a}, "not finite": {"net.to_q.lora_A.weight": a / 0},
        "not both factors": {"net.to_q.lora_A.weight": a},
        "different layers": {"net.to_k.lora_A.weight": a, "net.to_k.lora_B.weight": b},
    }  # fmt: skip
    for match, state in cases.items():
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=match):
            LoraStack([*checkpoints, open_checkpoint(tmp_path / "bad.safetensors")], "net")
