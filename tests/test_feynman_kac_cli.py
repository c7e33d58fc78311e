"""Products, temperatures and particles on the command line, their record, and their part of the report."""

import json

import pytest

from diffaccel import cli

SD, DIT = "tiny-fashion-sd", "tiny-fashion-dit"
FEW = ("--steps", "3", "--particles", "3")


def call(capfd, *words):
    """The exit code and what was printed to stdout and stderr."""
    try:
        cli.main([str(word) for word in words])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    found = capfd.readouterr()
    return code, found.out, found.err


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("--product", "a red bag", "--product", "a sneaker"),
        ("--product", "a red bag", "a sneaker"),
    ],
)
def test_product(capfd, tmp_path, words):
    code, out, _ = call(capfd, "generate", SD, *words, *FEW, "--out", tmp_path)
    assert code == 0 and "effective size" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "run.json"]
    record = record_of(tmp_path)
    assert [*record["product"], *record["conditions"]] == ["a red bag", "a sneaker"]
    (report,) = record["feynman_kac"]
    assert report["exponents"] == [1, 1] and report["particles"] == 3
    assert report["evaluations"] == 3 * 2 * 3 and record["particles"] == 3
    assert record["versions"]["torch"] and record["scheduler_config"]["class"] == "DDIMScheduler"


def test_both_ways_to_write_a_product_are_the_same(capfd, tmp_path):
    words = ("--product", "a red bag", "--product", "a sneaker"), ("--product", "a red bag", "a sneaker")
    for number, product in enumerate(words):
        assert call(capfd, "generate", SD, *product, *FEW, "--out", tmp_path / str(number))[0] == 0
    assert (tmp_path / "0" / "0000.png").read_bytes() == (tmp_path / "1" / "0000.png").read_bytes()


def test_temperature_and_guidance_of_each_prompt_and_the_record_that_repeats_it(capfd, tmp_path):
    options = ("--temperature", "0.8", "--guidance", "2", "--seed", "5")
    code, _, _ = call(capfd, "generate", DIT, "red sneaker", "27", *options, *FEW, "--out", tmp_path / "a")
    assert code == 0
    record = record_of(tmp_path / "a")
    assert record["images"] == ["0000.png", "0001.png"] and len(record["feynman_kac"]) == 2
    assert record["feynman_kac"][0]["exponents"] == pytest.approx([-1.25, 2.5])
    code, _, _ = call(
        capfd, "generate", record["model"], *record["conditions"], "--temperature", record["temperature"],
        "--guidance", record["guidance"], "--seed", record["seed"], "--steps", record["steps"], "--particles",
        record["particles"], "--out", tmp_path / "b",
    )  # fmt: skip
    assert code == 0
    for name in record["images"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = record_of(tmp_path / "b")
    assert again["feynman_kac"][1]["weights"] == record["feynman_kac"][1]["weights"]


def test_images_do_not_depend_on_each_other(capfd, tmp_path):
    assert call(capfd, "generate", SD, "a bag", "a coat", *FEW, "--out", tmp_path / "a")[0] == 0
    assert call(capfd, "generate", SD, "a coat", "--seed", 1, *FEW, "--out", tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "0001.png").read_bytes() == (tmp_path / "b" / "0000.png").read_bytes()


def test_report(capfd, tmp_path):
    product = ("--product", "a red bag", "a sneaker")
    assert call(capfd, "generate", SD, *product, *FEW, "--out", tmp_path / "run")[0] == 0
    page = tmp_path / "report.html"
    assert call(capfd, "report", tmp_path / "run", "--out", page)[0] == 0
    text = page.read_text()
    assert "weighted particles" in text and "a red bag, a sneaker" in text
    assert "Effective size and weights" in text and text.count("data:image/png;base64,") == 1
    assert "Quality against cost" not in text and "ess_threshold" in text
    assert "of 3 steps" in text and "<td>18</td>" in text


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((SD, "a bag", "--particles", "1"), "one particle"),
        ((SD, "a bag", "--temperature", "0"), "temperature is 0"),
        ((SD, "a bag", "--temperature", "nan"), "temperature is nan"),
        ((SD, "a bag", "--particles", "3", "--accel", "sada"), "--accel does not go with"),
        ((SD, "--temperature", "0.9"), "needs a prompt"),
        ((DIT, "--product", "red boat"), "no label 'red boat'"),
        ((SD, "a bag", "--particles", "3", "--scheduler", "heun"), "twice a step"),
        ((SD, "a bag", "--particles", "3", "--guidance", "inf"), "guidance inf"),
    ],
)
def test_mistakes(capfd, tmp_path, words, what):
    code, _, err = call(capfd, "generate", *words, "--steps", "2", "--out", tmp_path / "out")
    assert code == 2 and what in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_plain_runs_are_no_record_of_a_report(capfd, tmp_path):
    assert call(capfd, "generate", SD, "a bag", "--steps", "1", "--out", tmp_path / "run")[0] == 0
    code, _, err = call(capfd, "report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert code == 2 and "holds no record" in err
