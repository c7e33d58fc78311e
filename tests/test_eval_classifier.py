"""The shipped classifier and label accuracy."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffaccel import zoo
from diffaccel.errors import ModelError, OptionError
from diffaccel.eval import classifier as module
from diffaccel.eval.classifier import (
    FashionClassifier,
    label_accuracy,
    labels_of_prompts,
    load_classifier,
    predict,
)
from diffaccel.zoo import fashion

DATA = Path("/usr/share/datasets/fashion-mnist")
CARD = module.FOLDER / "README.md"


@pytest.fixture(scope="module")
def network():
    return load_classifier()


@pytest.fixture(scope="module")
def painted():
    """The first 1000 test images, each in the color of its number modulo 9, and their labels."""
    if not DATA.is_dir():
        pytest.skip("the data set is not installed")

    def read(name, skip):
        return np.frombuffer(gzip.decompress((DATA / name).read_bytes()), np.uint8, offset=skip)

    grey = read("t10k-images-idx3-ubyte.gz", 16)[: 1000 * 784].reshape(1000, 1, 28, 28)
    kinds = read("t10k-labels-idx1-ubyte.gz", 8)[:1000].tolist()
    colors = [number % 9 for number in range(1000)]
    factors = torch.tensor([(1.0, 1.0, 1.0), *fashion.COLORS.values()])[colors]
    images = torch.nn.functional.pad(torch.from_numpy(grey / np.float32(255)), (2, 2, 2, 2))
    labels = [fashion.label(kind, color) for kind, color in zip(kinds, colors, strict=True)]
    return images * factors[:, :, None, None], labels


def stated(row):
    """The percentage in the row of the model card that begins with ``row``."""
    line = next(line for line in CARD.read_text().splitlines() if line.startswith(f"| {row} |"))
    return float(line.split("|")[-2].replace("%", "")) / 100


def test_accuracy_is_that_of_the_card(network, painted):
    measured = label_accuracy(*painted, network)
    assert measured.class_accuracy.value == pytest.approx(stated("class accuracy"), abs=0.015)
    assert measured.color_accuracy.value == pytest.approx(stated("color accuracy"), abs=0.015)
    assert measured.class_accuracy.value > 0.92 and measured.color_accuracy.value > 0.99
    assert measured.joint.value <= min(measured.class_accuracy.value, measured.color_accuracy.value)
    p = measured.class_accuracy.value
    assert measured.class_accuracy.se == pytest.approx((p * (1 - p) / 999) ** 0.5)


def test_wrong_labels_are_wrong(network, painted):
    images, labels = painted[0][:90], painted[1][:90]
    right = label_accuracy(images, labels, network)
    other_color = label_accuracy(images, [(label + 40) % 90 for label in labels], network)
    assert other_color.class_accuracy == right.class_accuracy
    assert other_color.color_accuracy.value < 0.05 > other_color.joint.value
    other_class = label_accuracy(images, [label // 10 * 10 + (label + 1) % 10 for label in labels], network)
    assert other_class.color_accuracy == right.color_accuracy and other_class.class_accuracy.value < 0.2


def test_no_color_counts_as_white(network, painted):
    images, labels = painted
    unnamed = [number for number, label in enumerate(labels) if label < 10]
    kinds = [labels[number] for number in unnamed]
    as_white = label_accuracy(images[unnamed], [10 + kind for kind in kinds], network)
    assert label_accuracy(images[unnamed], kinds, network) == as_white
    assert as_white.color_accuracy.value > 0.98
    red = [number for number, label in enumerate(labels) if label // 10 == 2]
    assert label_accuracy(images[red], [labels[number] % 10 for number in red]).color_accuracy.value < 0.05


def test_prediction_does_not_depend_on_the_batch(network):
    images = torch.rand(module.BATCH + 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together, alone = predict(images, network), predict(images[-2:], network)
    shapes = [tuple(values.shape) for values in together]
    assert shapes == [(len(images), 128), (len(images), 10), (len(images), 8)]
    assert all(torch.allclose(one[-2:], other, atol=1e-4) for one, other in zip(together, alone, strict=True))
    assert not together.class_logits.requires_grad and together.features.min() >= 0
    single = label_accuracy(images[:1], [0], network)
    assert single.class_accuracy.se is None


def test_shipped_files(network):
    assert {file.name for file in module.FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert sum(file.stat().st_size for file in module.FOLDER.iterdir()) <= 3e6
    assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    assert module.FOLDER.name not in zoo.names()  # it is no pipeline


def test_labels_of_prompts():
    for template in range(len(fashion.TEMPLATES)):
        captions = [fashion.caption(n % 10, n // 10, template) for n in range(len(fashion.LABELS))]
        assert labels_of_prompts(captions) == list(range(90))
    assert labels_of_prompts(zoo.prompts(50, seed=1)) == zoo.labels(50, seed=1)
    assert labels_of_prompts([]) == []
    with pytest.raises(OptionError, match="'a red sneeker'; did you mean 'a red sneaker'"):
        labels_of_prompts(["bag", "a red sneeker"])
    with pytest.raises(OptionError, match="no label for the prompt ''; expected"):
        labels_of_prompts([""])


def test_bad_input(network):
    images = torch.rand(2, 3, 32, 32)
    cases = [
        (images, [1], "1 labels for 2 images"),
        (images, [1, 90], "unknown label 90"),
        (images, [-1, 0], "unknown label -1"),
        (images[:0], [], "N of 1 or more"),
        (images[:, :1], [0, 0], r"\(2, 1, 32, 32\)"),
        (2 * images - 1, [0, 0], r"not all in \[0, 1\]"),
        (images * float("nan"), [0, 0], r"not all in \[0, 1\]"),
        ((255 * images).byte(), [0, 0], "uint8"),
    ]
    for wrong, labels, message in cases:
        with pytest.raises(OptionError, match=message):
            label_accuracy(wrong, labels, network)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    network = FashionClassifier((4, 6, 8))
    network(torch.rand(4, 3, 32, 32))  # moves the statistics of the normalization
    network.half().save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.widths == (4, 6, 8) and not loaded.training
    saved = network.state_dict()
    assert all(torch.equal(value, saved[name].to(value.dtype)) for name, value in loaded.state_dict().items())
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}


def test_damaged_files(tmp_path):
    good = tmp_path / "good"
    FashionClassifier((4, 6, 8)).save_pretrained(good)

    def edit(folder, **changes):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def drop(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop("class_head.bias")
        save_file(weights, folder / "model.safetensors")

    cases = [
        (lambda d: (d / "config.json").unlink(), r"cannot read .*config\.json"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json' is not of a FashionClassifier"),
        (lambda d: edit(d, colors=["red"]), "expected colors"),
        (lambda d: edit(d, widths=[4, "6", 8]), "three numbers of channels"),
        (lambda d: edit(d, widths=[4, 6, 16]), r"cannot load .*model\.safetensors.*size mismatch"),
        (lambda d: (d / "model.safetensors").unlink(), r"cannot load .*model\.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"none"), r"cannot load .*model\.safetensors"),
        (drop, r"model\.safetensors.*class_head\.bias"),
    ]
    for number, (damage, message) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        damage(folder)
        with pytest.raises(ModelError, match=message) as caught:
            load_classifier(folder)
        assert "\n" not in str(caught.value)
