"""LPIPS, CLIP score and feature distance on random weights, and what is said where weights are missing."""

import copy
import hashlib

import pytest
import torch
import torchvision
import transformers
from tiny.text import clip_tokenizer
from torch.nn import functional as F

from diffaccel.errors import MissingWeights, OptionError
from diffaccel.eval import weights
from diffaccel.eval.perceptual import (
    Clip,
    clip_available,
    clip_score,
    feature_distance,
    load_clip,
    load_lpips,
    lpips_available,
    lpips_distance,
)

PROMPTS = ["a red boot", "a green dress", "a blue bag", "a photo of a shirt", "a boot"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("DIFFACCEL_OFFLINE", "1")


def draw(count=5, size=40, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(count, 3, size, size, generator=generator)
    return (reference + noise * torch.randn(reference.shape, generator=generator)).clamp(0, 1), reference


@pytest.fixture(scope="module")
def alexnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.AlexNet().features.eval().requires_grad_(False)


@pytest.fixture
def alexnet_file(alexnet, tmp_path, monkeypatch):
    """A file with the name and the keys of the published one, known by its own digest."""
    pytest.importorskip("lpips")
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({f"features.{name}": value for name, value in alexnet.state_dict().items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("DIFFACCEL_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(weights.WEIGHTS, "alexnet", weights.Weights(path.name, digest))
    return path


def by_formula(alexnet, heads, images, reference):
    """LPIPS of one pair in [0, 1]: weighted squares of unit features after each ReLU, image means."""
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    x, y = ((2 * part - 1 - shift) / scale for part in (images, reference))
    total, head = 0.0, iter(heads)
    for layer in alexnet[:12]:  # its last pooling is not used
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            difference = F.normalize(x, dim=0) - F.normalize(y, dim=0)
            total += float((next(head).view(-1, 1, 1) * difference**2).sum(0).mean())
    return total


def test_lpips_is_its_formula(alexnet, alexnet_file):
    assert lpips_available()
    state = torch.random.get_rng_state()
    network = load_lpips()
    assert torch.equal(state, torch.random.get_rng_state())
    heads = [line.model[-1].weight.flatten() for line in network.lins]
    assert all((head >= 0).all() for head in heads), "those of the package, not random ones"
    images, reference = draw()
    with torch.no_grad():
        expected = torch.tensor(
            [by_formula(alexnet, heads, x, y) for x, y in zip(images, reference, strict=True)]
        )
    found = lpips_distance(images, reference, network, batch=2)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.se == pytest.approx(float(expected.std()) / 5**0.5, rel=1e-3)
    assert lpips_distance(images, reference).value == pytest.approx(found.value, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*pretrained", "ignore:Arguments other than a weight enum")
def test_lpips_of_random_trunk():
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    images, reference = draw()
    value = lpips_distance(images, reference, network).value
    assert lpips_distance(reference, images, network).value == pytest.approx(value, rel=1e-5)
    assert lpips_distance(reference, reference, network).value == 0 < value
    assert lpips_distance(draw(noise=0.3)[0], reference, network).value > value
    bytes_ = [(255 * part).round().byte() for part in (images, reference)]
    assert lpips_distance(*bytes_, network).value == pytest.approx(value, rel=0.02)
    gray = [part[:, :1] for part in (images, reference)]
    repeated = [part.repeat(1, 3, 1, 1) for part in gray]
    assert lpips_distance(*gray, network) == lpips_distance(*repeated, network)
    lpips_distance(images[..., :31, :31], reference[..., :31, :31], network)
    for bad in (images[..., :30, :], images[:, :2]):
        with pytest.raises(OptionError, match="LPIPS takes 1 or 3 channels, sides from 31"):
            lpips_distance(bad, bad, network)


def test_missing_or_damaged_alexnet(alexnet_file, monkeypatch):
    with alexnet_file.open("ab") as file:
        file.write(b"x")
    with pytest.raises(MissingWeights, match="SHA-256"):
        load_lpips()
    alexnet_file.unlink()
    monkeypatch.setattr(weights, "places", lambda found: [alexnet_file])
    assert not lpips_available()
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth.*forbids downloads"):
        load_lpips()
    monkeypatch.setattr("diffaccel.eval.perceptual.importlib.util.find_spec", lambda name: None)
    assert not lpips_available()
    with pytest.raises(MissingWeights, match="pip install lpips"):
        load_lpips()


@pytest.fixture(scope="module")
def clip():
    tokenizer = clip_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.CLIPConfig(
        text_config={**shape, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval().requires_grad_(False)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return Clip(model, transformers.CLIPProcessor(images, tokenizer))


def test_clip_score_is_that_of_the_model(clip):
    images, _ = draw(size=32)
    pixels = (255 * images).round().byte()
    mean, std = (torch.tensor(getattr(clip.processor.image_processor, name)).view(3, 1, 1)
                 for name in ("image_mean", "image_std"))  # fmt: skip
    tokens = clip.processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(pixel_values=(pixels / 255 - mean) / std, **tokens)
    cosines = (output.image_embeds * output.text_embeds).sum(1)
    assert (cosines > 0).all()
    for given in (images, pixels):
        found = clip_score(given, PROMPTS, clip, batch=2)
        assert found.value == pytest.approx(100 * float(cosines.mean()), abs=1e-3)
        assert found.se == pytest.approx(100 * float(cosines.std()) / 5**0.5, abs=1e-3)
    opposite = copy.deepcopy(clip.model)
    opposite.visual_projection.weight.neg_()
    assert clip_score(images, PROMPTS, Clip(opposite, clip.processor)).value == 0, "no less than 0"


def test_clip_score_takes_sizes_gray_and_long_prompts(clip):
    images, _ = draw(2, size=50)
    gray = images[:, :1]
    long = ["a boot " * 100, "a dress"]
    assert clip_score(gray, long, clip) == clip_score(gray.expand(-1, 3, -1, -1), long, clip)
    for bad, prompts in ((images, ["one"]), (images, "ab"), (images[:, :2], ["one", "two"])):
        with pytest.raises(OptionError, match="one for each"):
            clip_score(bad, prompts, clip)


def test_clip_is_loaded_from_a_folder(clip, tmp_path):
    images, _ = draw(2, size=32)
    assert not clip_available(tmp_path)
    with pytest.raises(MissingWeights, match=tmp_path.name):
        load_clip(tmp_path)
    clip.model.save_pretrained(tmp_path)
    clip.processor.save_pretrained(tmp_path)
    assert clip_available(tmp_path)
    load_clip.cache_clear()
    loaded = clip_score(images, PROMPTS[:2], tmp_path)
    assert loaded.value == pytest.approx(clip_score(images, PROMPTS[:2], clip).value, abs=1e-4)
    assert load_clip(tmp_path) is load_clip(tmp_path)


def test_missing_clip_is_said():
    name = "nobody/no-clip"
    assert not clip_available(name) and not clip_available("a/b/c d")
    with pytest.raises(MissingWeights, match="no CLIP model 'nobody/no-clip'; looked for"):
        clip_score(draw(2)[0], ["one", "two"], name)


def flat(pixels):
    assert pixels.dtype == torch.uint8
    return pixels.flatten(1).double() - 128


def test_feature_distance_is_its_formula():
    images, reference = draw()
    x, y = ((255 * part).round() - 128 for part in (images, reference))
    cosines = F.cosine_similarity(x.flatten(1).double(), y.flatten(1).double())
    found = feature_distance(images, reference, flat, batch=2)
    assert found.value == pytest.approx(float((1 - cosines).mean()), rel=1e-9)
    assert found.se == pytest.approx(float(cosines.std()) / 5**0.5, rel=1e-9)
    length = feature_distance(images, reference, flat, "l2")
    assert length.value == pytest.approx(float((2 - 2 * cosines).sqrt().mean()), rel=1e-9)
    assert feature_distance(images, images, flat).value == 0


def test_feature_distance_of_close_opposite_and_empty_features():
    images, reference = draw()

    def distance(first, second, kind="cosine"):
        rows = iter([first, second])
        return feature_distance(images, reference, lambda pixels: next(rows).expand(5, -1), kind).value

    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    near = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert distance(unit, near) == pytest.approx(5e-19, rel=1e-6), "1 - cos would be 0"
    assert distance(unit, near, "l2") == pytest.approx(1e-9, rel=1e-6)
    assert distance(unit, 3 * unit) == 0 and distance(unit, -unit) == 2 == distance(unit, -unit, "l2")
    assert distance(0 * unit, 0 * unit) == 0


def test_feature_distance_refuses():
    images, reference = draw(2)
    for extractor, options, words in (
        (flat, {"distance": "lpips"}, "no distance 'lpips'"),
        (lambda pixels: pixels.float(), {}, "expected \\(2, d\\)"),
        (lambda pixels: pixels.flatten(1)[:1].float(), {}, "expected \\(2, d\\)"),
        (lambda pixels: pixels.flatten(1) / 0.0, {}, "not finite"),
    ):
        with pytest.raises(OptionError, match=words):
            feature_distance(images, reference, extractor, **options)
    with pytest.raises(OptionError, match="differ in shape"):
        feature_distance(images, reference[:1], flat)
