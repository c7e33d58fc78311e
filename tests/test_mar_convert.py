"""Official MAR files: converted, they compute what functions of the official names compute."""

import argparse

import official_mar
import pytest
import torch
from safetensors.torch import save_file

from diffaccel import cli
from diffaccel.errors import ModelError
from diffaccel.pipelines import MARPipeline
from diffaccel.pipelines.mar_convert import convert_mar


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_official_file(tmp_path):
    weights = official_mar.trunk_weights(generator=seeded())
    file = tmp_path / "checkpoint-last.pth"
    wrong = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save({"model": wrong, "model_ema": weights, "optimizer": {}, "epoch": 3,
                "args": argparse.Namespace(model="mar_base")}, file)  # fmt: skip
    pipe = convert_mar(file, tmp_path / "out", num_attention_heads=4)
    network = MARPipeline.from_pretrained(tmp_path / "out").transformer
    assert network.config.learned_variance and network.config.num_classes == 5
    tokens, order = (
        torch.randn(3, 16, 4, generator=seeded()),
        torch.rand(3, 16, generator=seeded()).argsort(1),
    )
    mask = torch.zeros(3, 16).scatter(1, order[:, :11], 1.0)
    labels = torch.tensor([2, 4, 5])
    table = torch.cat([weights["class_emb.weight"], weights["fake_latent"]])
    x, t, z = torch.randn(9, 4), torch.randint(1000, (9,)), torch.randn(9, 32)
    with torch.no_grad():
        ours = network(tokens, known=order[:, 11:], class_labels=labels).sample
        official = official_mar.trunk(weights, tokens, mask, table[labels], 4)
        assert ((ours - official) * mask[..., None]).abs().max() < 1e-5 * official.abs().max()
        output = network.head(x, t, network.head.embed(z))
        expected = official_mar.head(weights, x, t, z)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    assert pipe.scheduler.config.variance_type == "learned" and pipe.vae is None


def test_official_autoencoder(tmp_path):
    weights, vae = (
        official_mar.trunk_weights(generator=seeded()),
        official_mar.vae_weights(generator=seeded()),
    )
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "mar.safetensors")
    torch.save({"model": {**vae, "loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")
    convert_mar(tmp_path / "mar.safetensors", tmp_path / "out", tmp_path / "kl.ckpt", num_attention_heads=4)
    pipe = MARPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    x, z = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        moments, image = official_mar.vae_encode(vae, x), official_mar.vae_decode(vae, z)
        assert torch.allclose(pipe.vae.encode(x).latent_dist.parameters, moments, atol=1e-5)
        assert torch.allclose(pipe.vae.decode(z).sample, image, atol=1e-5)
    assert pipe.vae.config.scaling_factor == 0.2325
    images = pipe([0, 1], num_head_steps=2, generator=seeded(), output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


def test_the_official_autoencoder_has_its_size():
    vae = official_mar.vae_weights((128, 128, 256, 256, 512), 2, 16)
    assert sum(tensor.numel() for tensor in vae.values()) == 66_456_019


def test_damaged_official_files(tmp_path):
    weights = official_mar.trunk_weights(generator=seeded())
    file = tmp_path / "a.pth"

    def fails(content, words, **options):
        torch.save(content, file)
        with pytest.raises(ModelError, match=words) as caught:
            convert_mar(file, tmp_path / "out", **{"num_attention_heads": 4, **options})
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    def without(name):
        return {key: value for key, value in weights.items() if key != name}

    fails(without("encoder_norm.bias"), "missing: encoder_norm.bias")
    fails({**weights, "extra.weight": torch.zeros(1)}, "unexpected: extra.weight")
    fails(
        {**weights, "mask_token": torch.zeros(1, 1, 7)},
        r"mask_token of shape \(1, 1, 7\); expected \(1, 1, 32\)",
    )
    fails(without("z_proj.weight"), "is no official MAR: it has no z_proj.weight")
    fails(weights, "has width 32; give a num_attention_heads", num_attention_heads=None)
    fails({"model": {"a": 1}}, "holds no weights")
    (tmp_path / "kl.ckpt").write_bytes(b"no zip")
    fails(weights, "safe to load", vae=tmp_path / "kl.ckpt")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "kl.ckpt")
    fails(weights, "is no official autoencoder", vae=tmp_path / "kl.ckpt")
    with pytest.raises(ModelError, match="cannot read"):
        convert_mar(tmp_path / "absent.pth", tmp_path / "out")
    with pytest.raises(ModelError, match="exists"):
        convert_mar(file, tmp_path)


def test_command(tmp_path, monkeypatch, capsys):
    """A file that is none is named, and nothing is written."""
    words = ["convert", "mar", str(tmp_path / "no.pth"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["diffaccel", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no.pth" in capsys.readouterr().err and not (tmp_path / "out").exists()
