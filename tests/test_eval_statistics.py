"""Statistics: made in one pass, saved and read by others, never mixed with those of other protocols."""

import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffaccel.errors import MissingReference, OptionError, ProtocolMismatch
from diffaccel.eval.arrays import ArrayError
from diffaccel.eval.frechet import Frechet, frechet_distance
from diffaccel.eval.images import open_images
from diffaccel.eval.inception_score import inception_score
from diffaccel.eval.metrics import kept_of_generated, kept_of_reference, score
from diffaccel.eval.networks import Outputs
from diffaccel.eval.protocols import Extractor, protocol
from diffaccel.eval.scoring import is_statistics, measure, statistics_of
from diffaccel.eval.statistics import Collector, check_same, collect, load_statistics, save_statistics

DIM = 16
PLAIN = replace(protocol("offline"), size=0, resizer="none", scaling="unit", metrics=("fid",))


class Tiny(nn.Module):
    """Random features of pooled pixels."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(48, DIM, generator=generator))

    def forward(self, images):
        pooled = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        features = torch.relu(pooled @ self.weight)
        return Outputs(features, features[:, :5], features[:, :6])


def extractor(seed=0, proto=PLAIN, **options):
    return Extractor(proto, network=Tiny(seed), weights=f"tiny-{seed}", **options)


def pixels(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


def make(count=40, seed=0, **options):
    return collect(
        open_images(pixels(count, seed)), extractor(**options), {"features", "logits"}, True, batch=7
    )


def test_moments_features_and_meta():
    made, x = make(), extractor()(torch.from_numpy(pixels()))
    assert made.count == 40 and made.features.shape == (40, DIM) and made.logits.shape == (40, 5)
    np.testing.assert_allclose(made.features[0:40], x.features, rtol=1e-5)
    np.testing.assert_allclose(made.gaussian.covariance, np.cov(x.features.double().T), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(made.spatial.gaussian.mean, x.features[:, :6].double().mean(0), rtol=1e-5)
    assert made.protocol == extractor().record and made.protocol["weights"] == "tiny-0"
    assert made.meta["images"] == 40 and "torch" in made.meta["versions"]
    assert made.meta["data"] == make(proto=PLAIN).meta["data"] != make(seed=1).meta["data"]


@pytest.mark.parametrize("batch", [1, 64])
def test_batches_do_not_matter(batch):
    other = collect(open_images(pixels()), extractor(), batch=batch)
    np.testing.assert_allclose(other.gaussian.covariance, make().gaussian.covariance, rtol=1e-4, atol=1e-6)
    assert other.features is None and other.spatial is None and other.meta["data"] == make().meta["data"]


def test_feature_files_go_with_the_statistics():
    made = make()
    folder = made.features.path.parent
    assert folder.is_dir()
    del made
    assert not folder.exists()


def test_progress_and_limit():
    told = []
    made = collect(open_images(pixels()), extractor(), limit=20, batch=8, advance=told.append)
    assert told == [8, 8, 4] and made.count == 20


def test_round_trip(tmp_path):
    made, path = make(), tmp_path / "deep" / "a.npz"
    save_statistics(made, path)
    again = load_statistics(path)
    assert (again.gaussian.mean == made.gaussian.mean).all() and again.count == 40
    assert (again.gaussian.covariance == made.gaussian.covariance).all()
    assert (again.spatial.gaussian.covariance == made.spatial.gaussian.covariance).all()
    rows = again.features[0:40]
    assert (rows == made.features[0:40]).all() and isinstance(rows, np.memmap), "not held in memory"
    assert again.meta == {**made.meta, "file": str(path)}
    save_statistics(again, path)
    assert load_statistics(path).meta == again.meta and is_statistics(path)
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_others_read_it(tmp_path):
    from cleanfid.fid import frechet_distance as clean
    from pytorch_fid.fid_score import compute_statistics_of_path

    path, other = tmp_path / "a.npz", make(seed=1).gaussian
    save_statistics(make(), path)
    with np.load(path, allow_pickle=False) as file:
        assert {"mu", "sigma", "n", "meta", "mu_s", "sigma_s", "feats"} == set(file.files)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert json.loads(str(file["meta"]))["images"] == 40
    mu, sigma = compute_statistics_of_path(str(path), None, 1, DIM, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = clean(mu, sigma, other.mean, other.covariance)
    assert theirs == pytest.approx(frechet_distance(load_statistics(path).gaussian, other), rel=1e-6)


def test_files_of_others_are_read(tmp_path):
    mu, sigma = np.zeros(DIM, np.float32), np.eye(DIM)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:6], sigma_s=sigma[:6, :6], arr_0=pixels(3))
    found = load_statistics(tmp_path / "adm.npz")
    assert found.count is None and found.protocol is None and found.spatial.gaussian.dim == 6
    scores = score(make(), found, ["fid", "sfid"], PLAIN)
    assert scores["fid"].value == pytest.approx(frechet_distance(make().gaussian, found.gaussian))
    assert scores["fid"].se > 0 and scores["sfid"].value > 0
    with pytest.raises(OptionError, match=r"adm\.npz has no features of each image"):
        score(make(), found, ["kid"], PLAIN)
    path = tmp_path / "adm.npz"
    record = measure(
        pixels(seed=1), path, extractor(), ["fid", "kid"]
    )  # its images serve where moments do not
    alone = measure(pixels(seed=1), pixels(3), extractor(), ["fid", "kid"])
    assert record["scores"]["kid"]["value"] == pytest.approx(alone["scores"]["kid"]["value"], rel=1e-4)
    assert record["m"] is None and record["scores"]["fid"]["value"] > 5 * alone["scores"]["fid"]["value"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_no_file_by_half(error, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_statistics(make(), path)
    before = path.read_bytes()

    def savez(file, **arrays):
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises((OptionError, KeyboardInterrupt), match=r"No space left|^$"):
        save_statistics(make(seed=1), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "expected mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit together"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "meta": np.array("{")}, "no JSON"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "meta": np.array("[1]")}, "no record"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "meta": np.array('{"protocol": "clean"}')}, "no record"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": np.array([1, 2])}, "expected a number"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, "no numbers 'sigma_s'"),
        ({"mu": np.array(["a"] * 3), "sigma": np.eye(3)}, "no numbers 'mu'"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "Object arrays cannot"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "feats": np.zeros((5, 4))}, "do not fit"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": np.array(4), "feats": np.zeros((5, 3))}, "do not fit"),
    ],
)
def test_a_wrong_file_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ArrayError, match=rf"a\.npz.*{message}"):
        load_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("damage", ["cut", "middle", "text"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "a.npz"
    save_statistics(make(), path)
    content = bytearray(path.read_bytes())
    content[300:700] = bytes(400)
    path.write_bytes({"cut": content[:500], "middle": content, "text": b"hello"}[damage])
    with pytest.raises(ArrayError, match=r"a\.npz"):
        load_statistics(path)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (extractor(bf16=True), "bf16: False and True"),
        (extractor(seed=1), "weights: 'tiny-0' and 'tiny-1'"),
        (extractor(proto=replace(PLAIN, quantizer="trunc")), "quantizer: 'round' and 'trunc'"),
        (extractor(proto=replace(PLAIN, version=2)), "version: 1 and 2"),
        (extractor(proto=replace(PLAIN, resizer="clean", size=8)), "resizer"),
    ],
)
def test_other_ways_are_refused(other, told):
    x, y = (collect(open_images(pixels()), one) for one in (extractor(), other))
    with pytest.raises(ProtocolMismatch, match=told):
        score(x, y, ["fid"], PLAIN)


def test_what_does_not_move_features_is_not_compared():
    check_same(extractor().record, extractor(proto=replace(PLAIN, neighbors=3, images=7)).record, ("a", "b"))
    check_same(None, extractor().record, ("a", "b"))


def test_a_file_of_another_protocol_is_refused(tmp_path):
    save_statistics(make(proto=replace(PLAIN, name="clean")), tmp_path / "a.npz")
    with pytest.raises(
        ProtocolMismatch, match=r"a\.npz' holds statistics of the protocol 'clean', not 'offline'"
    ):
        measure(pixels(), tmp_path / "a.npz", extractor())
    with pytest.raises(MissingReference, match=r"none\.npz"):
        measure(pixels(), tmp_path / "none.npz", extractor())


def test_measure(tmp_path):
    save_statistics(make(seed=1), tmp_path / "a.npz")
    record = measure(pixels(), tmp_path / "a.npz", extractor(), ["fid", "sfid", "is", "kid"], batch=9)
    x, y = make().gaussian, make(seed=1).gaussian
    assert record["scores"]["fid"]["value"] == pytest.approx(frechet_distance(x, y), rel=1e-5)
    assert record["scores"]["fid"]["name"] == "FID-0.04k" and "corrected" not in record["scores"]["fid"]
    assert record["scores"]["fid"]["se"] > 0 and record["n"] == record["m"] == 40
    assert record["features"] == extractor().record and record["reference"]["file"].endswith("a.npz")
    json.dumps(record, allow_nan=False)
    ours = make(2000).gaussian
    assert Frechet(ours, y).correctable is False and Frechet(ours, ours).correctable is True


def test_files_that_do_not_tell_are_said_to(tmp_path):
    for n in range(2):
        np.savez(tmp_path / f"{n}.npz", mu=np.full(DIM, n), sigma=np.eye(DIM))
    records = [measure(pixels(2000), tmp_path / f"{n}.npz", extractor(), ["fid"]) for n in range(2)]
    score = records[0]["scores"]["fid"]
    assert score["se"] > 0 and not {"bias", "corrected"} & set(score), "M is not known, nor is its bias"
    first, second = (record["reference"] for record in records)
    assert first["unverified"] and first["data"] != second["data"], "told apart by the files' digests"
    np.savez(tmp_path / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ProtocolMismatch, match=r"16 numbers and .*short\.npz' of 3"):
        measure(pixels(), tmp_path / "short.npz", extractor(), ["fid"])
    with pytest.raises(OptionError, match="to take 7 of them"):
        measure(tmp_path / "0.npz", pixels(), extractor(), ["fid"], count=7)


def test_bias_does_not_depend_on_the_other_metrics():
    alone, more = (measure(pixels(), pixels(seed=1), extractor(), names)["scores"]["fid"]
                   for names in (["fid"], ["fid", "kid"]))  # fmt: skip
    assert alone == more


def test_inception_scores_are_split_as_the_protocol_says():
    made = make()
    value = partial(score, made, make(seed=1), ["is"])
    whole = inception_score(made.logits).value
    assert value(PLAIN)["is"].value == whole != value(replace(PLAIN, split_size=10))["is"].value
    assert (
        value(replace(PLAIN, split_size=10))["is"].value == inception_score(made.logits, split_size=10).value
    )
    assert value(replace(PLAIN, splits=4))["is"].value == inception_score(made.logits, 4, 2020).value
    assert protocol("adm").split_size == 5000 and protocol("torchmetrics_1_9").splits == 10


def test_too_few_or_missing_outputs():
    for count, error in ((1, "1 image; statistics need at least 2"), (0, "no images")):
        with pytest.raises(ValueError, match=error):
            statistics_of(pixels(count), extractor(), (), False)
    collector = Collector({}, {"logits"}, spatial=True)
    with pytest.raises(OptionError, match="no spatial features"):
        collector.add(np.ones((2, 3)))
    with pytest.raises(OptionError, match="no logits"):
        Collector({}, {"logits"}).add(np.ones((2, 3)))
    assert kept_of_generated(["is"]) == {"features", "logits"} and kept_of_reference(["fid", "is"]) == set()


def test_rows_of_another_run_are_not_taken_for_these(tmp_path):
    for expected in (None, "holds 4 rows for 2 images"):
        collector = Collector({}, {"features"}, folder=tmp_path)
        collector.add(np.random.rand(2, 3))
        if expected is None:
            assert collector.statistics().features.shape == (2, 3)
        else:
            with pytest.raises(OptionError, match=expected):
                collector.statistics()


class Pooled(nn.Module):
    """torchvision's Inception with random weights, up to the pooled features."""

    def __init__(self):
        from torchvision.models import inception_v3

        super().__init__()
        self.network = inception_v3(weights=None, init_weights=False, aux_logits=True)
        self.network.AuxLogits, self.network.fc = None, nn.Identity()
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.8, 1.2)

    def forward(self, images):
        return self.network(images)


def test_whole_path_is_that_of_cleanfid(tmp_path):
    from cleanfid import fid

    torch.manual_seed(0)
    network = Pooled().eval()
    for name, low in (("a", 0), ("b", 80)):
        (tmp_path / name).mkdir()
        for n, image in enumerate(
            np.random.default_rng(low).integers(low, 256, (8, 64, 64, 3), dtype=np.uint8)
        ):
            Image.fromarray(image).save(tmp_path / name / f"{n:02}.png")
    features = partial(fid.get_folder_features, model=lambda x: network((x - 128) / 128), num_workers=0,
                       batch_size=8, device="cpu", verbose=False)  # fmt: skip
    clean = Extractor(replace(protocol("clean"), metrics=("fid",)), network=network)
    theirs = [features(str(tmp_path / name)) for name in "ab"]
    ours = [statistics_of(tmp_path / name, clean, ["features"], False, batch=8) for name in "ab"]
    errors = [
        np.linalg.norm(o.features[0:8] - t) / np.linalg.norm(t) for o, t in zip(ours, theirs, strict=True)
    ]
    distance = frechet_distance(*(one.features for one in ours))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = frechet_distance(*theirs)
    print("features", errors, "FD", distance / expected - 1)
    assert max(errors) <= 1e-3 and distance == pytest.approx(expected, rel=1e-3)
