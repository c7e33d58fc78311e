"""Streams of images: the same bytes from whatever they come, and wrong images refused by name."""

import struct
import weakref
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.errors import OptionError
from diffaccel.eval.arrays import ArrayError, ArrayFile, members
from diffaccel.eval.images import ImageError, digest, open_images, to_bytes
from diffaccel.eval.provenance import digest_of

COUNT, SIDE = 10, 12
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def write_folder(folder, nested=False):
    for n, pixels in reversed(list(enumerate(PIXELS))):
        place = folder / (f"part{n // 4}" if nested else ".")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{n:02}.{'PNG' if n % 2 else 'png'}")
    (folder / "notes.txt").write_text("no image")
    return folder


def write_zip(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def written(path, write, *arrays, **named):
    write(path, *arrays, **named)
    return path


def floats(low, high):
    return low + TENSOR.double() / 255 * (high - low)


SOURCES = {
    "folder": lambda p: write_folder(p / "flat"),
    "text": lambda p: str(write_folder(p / "flat")),
    "nested": lambda p: write_folder(p / "deep", nested=True),
    "zip": lambda p: write_zip(p / "a.zip", write_folder(p / "flat", nested=True)),
    "npz": lambda p: written(p / "a.npz", np.savez, PIXELS),
    "npz deflated": lambda p: written(p / "a.npz", np.savez_compressed, PIXELS, mu=np.zeros(3)),
    "npy": lambda p: written(p / "a.npy", np.save, PIXELS),
    "npy floats": lambda p: written(p / "a.npy", np.save, floats(0, 1).numpy()),
    "NHWC": lambda p: torch.from_numpy(PIXELS),
    "NCHW": lambda p: TENSOR,
    "array": lambda p: PIXELS,
    "floats": lambda p: floats(0, 1).float(),
    "PIL": lambda p: [Image.fromarray(pixels) for pixels in PIXELS],
    "iterator": lambda p: iter(TENSOR.split(7)),
    "float iterator": lambda p: (part.float() / 255 for part in TENSOR.split(4)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [3, 64])
def test_the_same_bytes_and_digest(source, size, tmp_path):
    images = open_images(SOURCES[source](tmp_path))
    batches = list(images.batches(size))
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, TENSOR)
    assert max(len(batch.names) for batch in batches) == min(size, 7 if source == "iterator" else COUNT) or (
        source == "float iterator"
    )
    assert len({name for batch in batches for name in batch.names}) == COUNT
    assert images.count == (None if "iterator" in source else COUNT)
    backwards = digest_of(reversed([one for batch in batches for one in digest(batch.pixels)]))
    assert backwards == digest_of(digest(TENSOR))
    if images.count:  # again, and only some
        some = torch.cat([batch.pixels for batch in images.batches(size, 7)])
        assert torch.equal(some, TENSOR[:7])


def test_declared_range():
    images = open_images(floats(-1, 1), value_range=(-1, 1))
    assert torch.equal(next(images.batches(64)).pixels, TENSOR)
    assert torch.equal(next(open_images(images).batches(64)).pixels, TENSOR)


def test_the_quantizer_is_used():
    x = torch.full((2, 3, 4, 4), 0.9999)
    assert {int(next(open_images(x, mode).batches(2)).pixels.max()) for mode in ("round", "trunc")} == {
        254,
        255,
    }


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_becomes_rgb(mode, tmp_path):
    grey = Image.fromarray(PIXELS[0]).convert(mode)
    grey.save(tmp_path / "a.png")
    found = next(open_images(tmp_path).batches(1)).pixels
    assert torch.equal(found[0], torch.from_numpy(np.array(grey.convert("RGB"))).permute(2, 0, 1))
    for shape in ((2, 1, 4, 4), (2, 4, 4, 1)):
        pixels = to_bytes(torch.arange(32, dtype=torch.uint8).reshape(shape), "round", (0, 1), "x")
        assert pixels.shape == (2, 3, 4, 4) and torch.equal(pixels[:, 0], pixels[:, 2])


def png_of_16_bits():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x12\x34" * 3 * SIDE) * SIDE
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def spoil(kind, path):
    image = Image.fromarray(PIXELS[0])
    if kind == "alpha":
        image.convert("RGBA").save(path)
    elif kind == "transparent":
        image.convert("P").save(path, transparency=0)
    elif kind == "16 bits of grey":
        Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16)).save(path)
    elif kind == "16 bits of RGB":
        path.write_bytes(png_of_16_bits())
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "text":
        path.write_text("hello")
    else:
        image.resize((SIDE + 1, SIDE)).save(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("alpha", "alpha channel"),
        ("transparent", "alpha channel"),
        ("16 bits of grey", "has 16 bits"),
        ("16 bits of RGB", "has 16 bits"),
        ("truncated", "cannot read the image"),
        ("text", "cannot read the image"),
        ("size", "13x12 pixels and the images before it 12x12"),
    ],
)
def test_a_wrong_file_is_named(kind, message, packed, tmp_path):
    folder = write_folder(tmp_path / "flat")
    spoil(kind, folder / "05.PNG")
    images = open_images(write_zip(tmp_path / "a.zip", folder) if packed else folder)
    with pytest.raises(ImageError, match=message) as caught:
        list(images.batches(4))
    assert "05.PNG" in str(caught.value)


def test_mixed_sizes_where_allowed(tmp_path):
    folder = write_folder(tmp_path / "flat")
    spoil("size", folder / "05.PNG")
    batches = list(open_images(folder).batches(4, mixed=True))
    assert [len(batch.names) for batch in batches] == [4, 1, 1, 4]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 3, 4, 4), np.nan, np.float32), "images 0 to 1: some pixels are not finite"),
        (
            np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 3, 4, 4),
            "pixels from -1.0 to 1.0; expected 0 to 1",
        ),
        (PIXELS.astype(np.float32), "to 255.0; expected 0 to 1"),
        (PIXELS.astype(np.int64), "expected bytes"),
        (PIXELS.astype(np.uint16), "expected bytes"),
        (PIXELS[..., :2], "expected .N, 3, H, W."),
        (PIXELS[0], "expected .N, 3, H, W."),
        (np.array([[["a"]]]), "no tensor or array of numbers|expected"),
    ],
)
def test_a_wrong_array_is_named(array, message, tmp_path):
    np.save(tmp_path / "wrong.npy", array)
    for data, name in ((tmp_path / "wrong.npy", "wrong.npy"), (array, "a tensor")):
        with pytest.raises(ImageError, match=message) as caught:
            list(open_images(data).batches(64))
        assert name in str(caught.value)


@pytest.mark.parametrize("source", ["folder", "zip", "npz", "PIL", "iterator"])
def test_more_than_there_are(source, tmp_path):
    images = open_images(SOURCES[source](tmp_path))
    with pytest.raises(ImageError, match="has only 10 images of the 11 asked for"):
        for n, _ in enumerate(images.batches(2, 11)):
            assert images.count is None, f"batch {n} was made in vain"


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    write_zip(tmp_path / "empty.zip", tmp_path / "empty")
    cases = {"empty": "no images in", "none": "no folder or file", "text.txt": "neither a folder",
             "empty.zip": "no images in"}  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            open_images(tmp_path / name)
        assert name in str(caught.value)
    for data in ([], iter([]), PIXELS[:0]):
        with pytest.raises(ImageError, match="no images"):
            list(open_images(data).batches(2))
    with pytest.raises(ImageError, match="from a int"):
        open_images(3)
    for size, limit in ((0, None), (2, 0), (2, -1)):
        with pytest.raises(OptionError, match="positive"):
            list(open_images(PIXELS).batches(size, limit))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([Bomb()], dtype=object))
    with pytest.raises(ArrayError, match=r"a\.npz.*no plain array"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_arrays(write, tmp_path):
    path = tmp_path / "a.npz"
    write(path, PIXELS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(ArrayError, match=r"a\.npz"):
        list(open_images(path).batches(3))
    path.write_bytes(content[:1000])
    with pytest.raises(ArrayError, match=r"a\.npz"):
        open_images(path)
    write(path, other=PIXELS)
    with pytest.raises(ArrayError, match="has the arrays other; expected 'arr_0'"):
        open_images(path)
    assert members(path) == ["other"]


def test_array_file_slices(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", rows=PIXELS)
    file = ArrayFile(tmp_path / "a.npz", "rows")
    for rows in (slice(2, 5), slice(7, 9), slice(0, 3), slice(0, 10), slice(8, 20)):
        assert (file[rows] == PIXELS[rows]).all()
    np.save(tmp_path / "short.npy", PIXELS)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-5])
    with pytest.raises(ArrayError, match="ends within"):
        ArrayFile(tmp_path / "short.npy")[0:10]


def test_only_some_batches_are_in_memory():
    alive = []

    def parts():
        for _ in range(40):
            part = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
            alive.append(weakref.ref(part))
            yield part
            del part

    most = 0
    for batch in open_images(parts()).batches(4):
        most = max(most, sum(ref() is not None for ref in alive))
        assert len(batch.names) == 4
    assert len(alive) == 40 and most <= 3


def test_files_are_decoded_at_most_two_batches_ahead(monkeypatch, tmp_path):
    from diffaccel.eval import images

    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    made, taken, most = [], 0, 0
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    loaders = [(str(n), lambda: made.append(1) or image) for n in range(200)]
    for batch in images._read_all(loaders, 10):
        taken += len(batch.names)
        most = max(most, len(made) - taken)
    assert taken == len(made) == 200 and most <= 21
