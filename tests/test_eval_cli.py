"""`diffaccel fid`, `stats`, `eval` and `report` end to end: the same numbers however a run ends."""

import json
import time

import numpy as np
import pytest
import torch
from forking import begun, together
from torchvision.utils import save_image

from diffaccel import cli, zoo
from diffaccel.eval import load_statistics

DIT = "tiny-fashion-dit"
FAST = ("--steps", 2, "--n", 10, "--batch", 4, "--protocol", "fashion", "--metrics", "fid,kid")


@pytest.fixture
def run(monkeypatch, capfd):
    """Returns a function that runs a command, and returns its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        try:
            cli.main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of reference images: 40 and 30 PNG files."""
    images, _ = zoo.reference()
    root = tmp_path_factory.mktemp("images")
    for name, part in (("a", images[:40]), ("b", images[40:70])):
        (root / name).mkdir()
        for n, image in enumerate(part):
            save_image(image / 255, root / name / f"{n:03d}.png")
    return root


def test_fid_of_folders_and_of_statistics_agree(run, folders, tmp_path):
    a, b, npz = folders / "a", folders / "b", tmp_path / "b.npz"
    options = ("--protocol", "fashion", "--metrics", "fid,kid,pr")
    code, out, err = run("fid", a, b, *options, "--json", tmp_path / "fid.json")
    assert code == 0, err
    assert "FID-0.04k" in out and "±" in out and "precision" in out and "too few" in out
    record = json.loads((tmp_path / "fid.json").read_text())
    assert record["n"] == 40 and record["m"] == 30 and record["protocol"] == "fashion"
    assert len(record["features"]["weights"]) == len(record["generated"]["data"]) == 64
    assert run("stats", b, "--out", npz, "--protocol", "fashion", "--features")[0] == 0
    code, _, err = run("fid", a, npz, *options, "--json", tmp_path / "again.json")
    assert code == 0, err
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["scores"] == record["scores"]
    assert again["reference"]["data"] == record["reference"]["data"]
    with np.load(npz, allow_pickle=False) as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64 and file["feats"].shape == (30, 128)


def test_mistakes_are_one_line(run, folders, tmp_path):
    npz, bad = tmp_path / "a.npz", tmp_path / "bad"
    assert run("stats", folders / "a", "--out", npz, "--protocol", "fashion")[0] == 0
    bad.mkdir()
    save_image(torch.rand(3, 32, 32), bad / "1.png")
    (bad / "2.png").write_bytes((bad / "1.png").read_bytes()[:90])
    single = tmp_path / "single"
    single.mkdir()
    save_image(torch.rand(3, 32, 32), single / "1.png")
    (tmp_path / "empty").mkdir()
    for words, expected in (
        (("fid", folders / "a", npz, "--protocol", "offline"), "fashion"),
        (("fid", folders / "a", npz, "--protocol", "fashion", "--metrics", "kid"), "no features"),
        (("fid", folders / "a", npz, "--protocol", "nonsense"), "known:"),
        (("fid", folders / "a", npz, "--protocol", "fashion", "--metrics", "fud"), "known:"),
        (("fid", bad, npz, "--protocol", "fashion"), "2.png"),
        (("fid", single, npz, "--protocol", "fashion"), "at least 2"),
        (("fid", tmp_path / "empty", npz, "--protocol", "fashion"), "no images"),
        (("fid", tmp_path / "none", npz, "--protocol", "fashion"), "no file or folder"),
        (("fid", folders / "a", npz, "--protocol", "fashion", "--n", 99), "only 40 images"),
        (("stats", folders / "a", "--out", tmp_path / "x.json"), ".npz"),
        (("eval", "no-such-model"), "no-such-model"),
        (("eval", DIT, "--accel", "nonsense"), "known:"),
        (("report", tmp_path / "empty"), "eval.json"),
    ):
        code, _, err = run(*words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (words, err)
        assert expected in err, (words, err)


def test_missing_weights_name_the_file_and_where_to_get_it(run, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    code, _, err = run("fid", folders / "a", folders / "b", "--protocol", "clean")
    assert code == 2 and "inception-2015-12-05.pt" in err and "https://" in err


def evaluate(run, out, *more):
    code, printed, err = run("eval", DIT, "--accel", "reuse", *FAST, "--out", out, *more)
    assert code == 0, err
    return (out / "eval.json").read_bytes(), printed


def test_eval_is_reproducible_and_goes_on(run, tmp_path):
    first, printed = evaluate(run, tmp_path / "a", "--plain-steps", 1)
    record = json.loads(first)
    assert [row["label"] for row in record["rows"]] == ["plain, 2 steps", "reuse", "plain, 1 steps"]
    assert [row["evaluated"] for row in record["rows"]] == [2, 1, 1]
    plain, reuse, _ = record["rows"]
    assert reuse["fidelity"]["rms"]["value"] > 0 and reuse["difference"]["fid"]["se"] > 0
    assert reuse["scores"]["fid"]["value"] - plain["scores"]["fid"]["value"] == pytest.approx(
        reuse["difference"]["fid"]["value"]
    )
    assert set(plain["accuracy"]) == {"class_accuracy", "color_accuracy", "joint"}
    assert record["settings"]["versions"]["torch"] == torch.__version__ and "FID-0.01k" in printed
    parts = sorted((tmp_path / "a" / "parts").glob("part-*"))
    assert len(parts) == 3
    untouched = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    assert evaluate(run, tmp_path / "a", "--plain-steps", 1)[0] == first
    assert parts[0].stat().st_mtime_ns == untouched, "what is there is not made again"
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    code, _, err = run("eval", DIT, "--accel", "reuse", *FAST, "--plain-steps", 1, "--out", tmp_path / "a")
    assert code == 2 and parts[2].name in err
    code, _, err = run("eval", DIT, *FAST, "--guidance", 2, "--out", tmp_path / "a")
    assert code == 2 and "other settings" in err and "guidance" in err
    assert run("eval", DIT, *FAST, "--guidance", 2, "--out", tmp_path / "a", "--restart")[0] == 0


def test_report_puts_evaluations_together_and_refuses_others(run, tmp_path):
    evaluate(run, tmp_path / "a")
    evaluate(run, tmp_path / "b", "--seed", 100, "--save-images")
    assert len(list((tmp_path / "b" / "images").rglob("*.png"))) == 20
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "a", tmp_path / "b" / "eval.json", "--out", out)[0] == 0
    page = out.read_text()
    assert page.count("<table>") == 3 and "All methods" in page and "http" not in page
    record = json.loads((tmp_path / "b" / "eval.json").read_text())
    record["protocol"] = "clean"
    (tmp_path / "b" / "eval.json").write_text(json.dumps(record))
    code, _, err = run("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "no.html")
    assert code == 2 and "cannot be compared" in err and not (tmp_path / "no.html").exists()


def test_report_names_what_is_no_record(run, tmp_path):
    for content in ({"scores": {}}, {"rows": [5]}, {"rows": [{"scores": {}}]}, {"rows": []}, [1]):
        (tmp_path / "a.json").write_text(json.dumps(content))
        code, _, err = run("report", tmp_path / "a.json", "--out", tmp_path / "a.html")
        assert code == 2 and "a.json" in err and "expected" in err, err


def test_images_are_written_by_a_later_call_too(run, tmp_path):
    first, _ = evaluate(run, tmp_path)
    assert evaluate(run, tmp_path, "--save-images")[0] == first
    assert len(list((tmp_path / "images").rglob("*.png"))) == 20
    assert not list(tmp_path.rglob(".*"))


def test_parts_without_their_settings_are_refused(run, tmp_path):
    evaluate(run, tmp_path)
    (tmp_path / "parts" / "settings.json").unlink()
    code, _, err = run("eval", DIT, *FAST, "--out", tmp_path)
    assert code == 2 and "settings.json" in err and "--restart" in err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_record(run, tmp_path):
    whole, _ = evaluate(run, tmp_path / "a", "--n", 24)
    words = ("eval", DIT, "--accel", "reuse", *FAST, "--n", 24, "--out", tmp_path / "b")
    killed = begun(cli.main, [str(word) for word in words])
    deadline = time.monotonic() + 100
    while not list((tmp_path / "b").glob("parts/part-*")):
        assert time.monotonic() < deadline and killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert (
        len(list((tmp_path / "b" / "parts").glob("part-*"))) < 6
        and not (tmp_path / "b" / "eval.json").exists()
    )
    assert evaluate(run, tmp_path / "b", "--n", 24)[0] == whole


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, tmp_path):
    evaluate(run, tmp_path / "a")
    words = ("eval", DIT, "--accel", "reuse", *FAST, "--out", tmp_path / "b")
    together(cli.main, [str(word) for word in words])
    ours, theirs = (json.loads((tmp_path / name / "eval.json").read_text()) for name in "ab")
    for a, b in zip(ours["rows"], theirs["rows"], strict=True):
        assert a["scores"]["fid"]["value"] == pytest.approx(b["scores"]["fid"]["value"], rel=1e-9)
        assert a["data"] == b["data"], "the same images, bit by bit"


def test_the_reference_is_cached_and_found_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "cache"))
    first, _ = evaluate(run, tmp_path / "a")
    (file,) = (tmp_path / "cache" / "statistics").glob("*.npz")
    assert load_statistics(file).count == 10_000
    assert json.loads(first)["m"] == 10_000
    assert evaluate(run, tmp_path / "a")[0] == first
