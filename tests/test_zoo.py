"""The shipped pipelines: they load quietly without a network, run, and match their vocabulary."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffaccel import zoo
from diffaccel.errors import ModelError, OptionError
from diffaccel.eval.classifier import predict
from diffaccel.zoo import fashion

ROOT = Path(__file__).parents[1]
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def sd_folder(tmp_path):
    return Path(shutil.copytree(zoo.path("tiny-fashion-sd"), tmp_path / "sd"))


def edit_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_names_and_size():
    students = {f"tiny-fashion-dit-{name}" for name in ("2rf", "slimflow", "dmd2", "phased-dmd")}
    assert {"tiny-fashion-dit", "tiny-fashion-mar", "tiny-fashion-sd"} | students <= set(zoo.names())
    folder = Path(zoo.__file__).parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 80e6
    for name in zoo.names():
        assert (zoo.path(name) / "README.md").is_file()


@pytest.mark.parametrize("name", ["tiny-fashion-sd", "tiny-fashion-dit", "tiny-fashion-mar"])
def test_two_steps(name):
    pipe = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    condition = zoo.prompts(2) if name.endswith("sd") else zoo.labels(2)
    images = pipe(
        condition, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (2, 32, 32, 3)
    assert abs(images[0] - images[1]).max() > 0.1  # not blank, and the condition matters


@pytest.mark.parametrize(
    ("name", "steps"), [("2rf", 1), ("2rf", 4), ("slimflow", 1), ("dmd2", 4), ("phased-dmd", 4)]
)
def test_students(name, steps):
    """Students make the class that they are asked for; experts, by no grid but their own."""
    pipe = zoo.load(f"tiny-fashion-dit-{name}")
    pipe.set_progress_bar_config(disable=True)
    generator, labels = torch.Generator().manual_seed(0), [0, 1, 2, 3, 5, 7, 8, 9]
    images = torch.from_numpy(
        pipe(labels, num_inference_steps=steps, guidance_scale=1, generator=generator, output_type="np")[0]
    ).movedim(-1, 1)
    assert (predict(images).class_logits.argmax(1) == torch.tensor(labels)).sum() >= 7
    if name == "phased-dmd":
        with pytest.raises(OptionError, match="trained for 4 steps, not for 3"):
            pipe(labels, num_inference_steps=3, guidance_scale=1)


def test_a_folder_of_adapters(tmp_path):
    """It is loaded with what it changes; one that names nothing, or has lost a file, is an error."""
    folder = shutil.copytree(zoo.path("tiny-fashion-dit-phased-dmd"), tmp_path / "it")
    pipe = zoo.load_pipeline(folder, torch.float16)
    assert type(pipe.transformer).__name__ == "NoiseExperts" and pipe.transformer.dtype == torch.float16
    assert type(pipe.scheduler).__name__ == "FixedGridScheduler"
    edit_json(folder / "student.json", base="tiny-fashion-dot")
    with pytest.raises(ModelError, match="did you mean 'tiny-fashion-dit"):
        zoo.load_pipeline(folder)
    edit_json(folder / "student.json", base=1)
    with pytest.raises(ModelError, match="names no base"):
        zoo.load_pipeline(folder)
    edit_json(folder / "student.json", base="tiny-fashion-dit")
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ModelError, match="scheduler_config"):
        zoo.load_pipeline(folder)


def test_color_follows_the_prompt():
    pipe = zoo.load("tiny-fashion-sd")
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe(["a red coat", "a blue coat"], num_inference_steps=8, guidance_scale=2.5,
                  generator=torch.Generator().manual_seed(0), output_type="np").images  # fmt: skip
    red, _, blue = pixels.mean((1, 2)).T
    assert red[0] > 1.5 * blue[0] and blue[1] > 1.5 * red[1]


def test_dtype_and_further_arguments():
    pipe = zoo.load("tiny-fashion-sd", torch.float16, text_encoder=None)
    assert pipe.unet.dtype == torch.float16 and pipe.text_encoder is None


def test_loads_without_a_word_and_leaves_logging_as_it_was():
    code = (
        "from diffusers.utils import logging as d; from transformers.utils import logging as t\n"
        "state = lambda: [(x.is_progress_bar_enabled(), x.get_verbosity(), x.get_logger(n).handlers[:],"
        " x.get_logger(n).propagate) for x, n in ((d, 'diffusers'), (t, 'transformers'))]\n"
        "from diffaccel import zoo; before = state()\n"
        "for name in zoo.names(): zoo.load(name)\n"
        "assert state() == before, (before, state())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_resolution(tmp_path, monkeypatch, sd_folder):
    assert zoo.resolve_model("tiny-fashion-sd") == zoo.path("tiny-fashion-sd")
    assert zoo.resolve_model(str(sd_folder)) == sd_folder
    assert zoo.resolve_model("owner/some-model.v2") == "owner/some-model.v2"
    monkeypatch.chdir(tmp_path)
    assert zoo.resolve_model("sd") == Path("sd")
    assert type(zoo.load_pipeline("sd")).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tiny-fashion-ds", ["did you mean 'tiny-fashion-", "tiny-fashion-dit", "tiny-fashion-sd"]),
        ("nonsense", ["known: tiny-fashion-dit"]),
        ("./nonsense", ["no folder './nonsense'"]),
        ("/no/such/folder", ["no folder '/no/such/folder'"]),
        (Path("owner/name"), ["no folder"]),
        (__file__, ["is a file"]),
        ("owner/name", ["cannot load 'owner/name' from the hub"]),
    ],
)
def test_wrong_names(model, words):
    with pytest.raises(ModelError) as caught:
        zoo.load_pipeline(model)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_unknown_zoo_name():
    with pytest.raises(ModelError, match="did you mean 'tiny-fashion-dit'"):
        zoo.load("tiny-fashion-dot")


DAMAGE = {
    "no index": (lambda d: (d / "model_index.json").unlink(), "has no model_index.json"),
    "bad JSON": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json': .*expected JSON"),
    "no object": (lambda d: (d / "model_index.json").write_text("[1]"), "holds a list"),
    "binary JSON": (
        lambda d: (d / "unet/config.json").write_bytes(b"\xff\xfe\x00"),
        "unet/config.json.*JSON",
    ),
    "no component": (lambda d: shutil.rmtree(d / "vae"), "no folder .*/vae'.*AutoencoderKL"),
    "empty component": (
        lambda d: [f.unlink() for f in (d / "scheduler").iterdir()],
        "scheduler.*DDIMScheduler",
    ),
    "no weights": (lambda d: (d / UNET_WEIGHTS).unlink(), "no weights in .*/unet'.*UNet2DConditionModel"),
    "cut weights": (lambda d: os.truncate(d / UNET_WEIGHTS, 5000), f"damaged weights file .*{UNET_WEIGHTS}"),
    "empty weights": (lambda d: os.truncate(d / UNET_WEIGHTS, 0), f"damaged weights file .*{UNET_WEIGHTS}"),
    "tensor absent": (
        lambda d: edit_weights(d / UNET_WEIGHTS, lambda w: w.pop("conv_out.weight")),
        "weights are missing .*conv_out.weight",
    ),
    "text tensor absent": (
        lambda d: edit_weights(d / "text_encoder/model.safetensors", lambda w: w.pop(sorted(w)[3])),
        "weights are missing .*encoder.layers",
    ),
    "other shape": (
        lambda d: edit_weights(d / UNET_WEIGHTS, lambda w: w.update({"conv_out.weight": torch.zeros(3)})),
        "conv_out.weight expected shape",
    ),
    "unknown class": (lambda d: edit_json(d / "model_index.json", _class_name="Foo"), "Foo"),
    "shard absent": (
        lambda d: (d / "unet/x.safetensors.index.json").write_text(
            '{"weight_map": {"a": "x-1.safetensors"}}'
        ),
        "x-1.safetensors'; x.safetensors.index.json promises",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(case, sd_folder):
    damage, message = DAMAGE[case]
    damage(sd_folder)
    with pytest.raises(ModelError, match=message) as caught:
        zoo.load_pipeline(sd_folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(sd_folder):
    (sd_folder / UNET_WEIGHTS).rename(sd_folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"expected a \.safetensors file"):
        zoo.load_pipeline(sd_folder)


def test_labels_agree_with_the_shipped_table():
    index = json.loads((zoo.path("tiny-fashion-dit") / "model_index.json").read_text())
    assert index["id2label"] == fashion.ID2LABEL
    assert len(fashion.LABELS) == 90 == len(set(fashion.LABELS))
    assert fashion.LABELS[fashion.label(7, 2)] == "red sneaker" == fashion.phrase(7, 2)
    assert fashion.label(9) == 9 and fashion.LABELS[10] == "white t-shirt"
    assert zoo.load("tiny-fashion-dit").labels["red sneaker"] == fashion.label(7, 2)


def test_captions_have_no_unknown_tokens():
    tokenizer = zoo.load("tiny-fashion-sd").tokenizer
    for caption in fashion.CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert len(ids) <= tokenizer.model_max_length  # nothing is cut off
        pieces = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1]))
        assert pieces.replace("</w>", " ").split() == caption.replace("-", " - ").split()
    assert len({tuple(tokenizer(caption).input_ids) for caption in fashion.CAPTIONS}) == len(fashion.CAPTIONS)
    assert (
        fashion.caption(9, 2)
        == "a photo of a red ankle boot"
        == fashion.CAPTIONS[3 * fashion.label(9, 2) + 2]
    )


def test_prompts_and_labels_go_together():
    numbers = zoo.labels(900, seed=3)
    assert zoo.prompts(900, seed=3) == [f"a photo of a {fashion.LABELS[number]}" for number in numbers]
    assert zoo.labels(17, seed=3) == numbers[:17]
    assert numbers != zoo.labels(900, seed=4)
    assert all([number % 10 for number in numbers].count(kind) == 90 for kind in range(10))
    assert 0.42 < sum(number < 10 for number in numbers) / 900 < 0.58  # half; standard deviation 0.017
