from __future__ import annotations

import gzip
import json
import urllib.error
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from compress import demo_data
from compress.data import (
    Loader,
    Preprocessing,
    batches,
    check_channels,
    check_labels,
    first_inputs,
    open_dataset,
    split,
)
from compress.data.held import hold
from compress.demo_data.network import width32
from compress.errors import DataError
from compress.inputs.checkpoint.loading import load_into
from compress.inputs.checkpoint.reading import read_checkpoint
from compress.vision.torchvision import load_torchvision

PLAIN = Preprocessing()
DEMO = Path(demo_data.__file__).parent
RANDOM = np.random.default_rng(0)


def pixels(*shape: Any) -> Any:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_folder(
    root: Any, sizes: Any = ((8, 8),) * 6, classes: Any = ("ant", "bee", "cat"), mode: Any = "RGB"
) -> Any:
    """Write images of the given (width, height) into the class folders in turn."""
    for k, (width, height) in enumerate(sizes):
        folder = root / classes[k % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (height, width) if mode == "L" else (height, width, 3)
        Image.fromarray(pixels(*shape)).save(folder / f"{k}.png")
    return root


def write_idx(path: Any, array: Any, kind: Any = 8) -> Any:
    head = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    data = head + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def arrays(tmp_path: Path, images: Any, labels: Any = None, name: Any = "a.npz") -> Any:
    given = {"images": images} | ({} if labels is None else {"labels": np.asarray(labels)})
    if name.endswith(".npz"):
        np.savez(tmp_path / name, **given)
    else:
        save_file({k: torch.tensor(v) for k, v in given.items()}, tmp_path / name)
    return f"tensors:{tmp_path / name}"


@pytest.fixture(scope="module")
def digits() -> Any:
    return open_dataset(f"tensors:{DEMO / 'digits-train.npz'}", Preprocessing(resize=28))


@pytest.fixture(scope="module")
def digits_test() -> Any:
    return open_dataset(f"tensors:{DEMO / 'digits-test.npz'}", Preprocessing(resize=28))


# --- Folders -----------------------------------------------------------------------------------


def test_folder_order_labels_names(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "ant" / "deep").mkdir()
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "ant" / "deep" / "z.JPG")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    names = [images.name(k) for k in range(len(images))]
    expected = [
        "ant/0.png", "ant/3.png", "ant/deep/z.JPG", "bee/1.png", "bee/4.png", "cat/2.png",
        "cat/5.png",
    ]  # fmt: skip
    assert names == expected
    assert images.classes == ("ant", "bee", "cat")
    assert images.labels == (0, 0, 0, 1, 1, 2, 2)
    tensor, label = images[3]
    with Image.open(tmp_path / "bee" / "1.png") as picture:
        array = np.asarray(picture)
    torch.testing.assert_close(
        tensor, torch.tensor(array).permute(2, 0, 1) / 255, rtol=0, atol=1e-7
    )
    assert label == 1
    np.testing.assert_array_equal(images.raw(3), array)


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.png")
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    assert images[0][1] == -1
    assert images.classes == ()
    with pytest.raises(DataError, match="have no labels, so accuracy cannot be measured"):
        check_labels(images, 10)


@pytest.mark.parametrize("resize", [None, 6, 9, 20, (7, 15)])
@pytest.mark.parametrize("crop", [None, 5, 6, (6, 5)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_files_are_transformed_as_torchvision_does(
    tmp_path: Path, resize: Any, crop: Any, interpolation: Any
) -> None:
    torchvision, _ = load_torchvision()
    transforms = torchvision.transforms
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if crop:
        steps.insert(0, transforms.CenterCrop(crop))
    if resize:
        filter_ = transforms.InterpolationMode(interpolation)
        steps.insert(0, transforms.Resize(resize, filter_))
    write_folder(tmp_path, sizes=((11, 8), (9, 14)))
    preprocessing = Preprocessing(mean, std, resize, crop, interpolation)
    images = open_dataset(f"imagefolder:{tmp_path}", preprocessing)
    for k in range(2):
        with Image.open(tmp_path / images.name(k)) as picture:
            expected = transforms.Compose(steps)(picture.convert("RGB"))
        torch.testing.assert_close(images[k][0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_arrays_are_resized_as_torchvision_does(tmp_path: Path, size: Any) -> None:
    torchvision, _ = load_torchvision()
    array = pixels(2, 3, *size)
    for resize in (5, 28, (6, 21)):
        images = open_dataset(arrays(tmp_path, array), Preprocessing(resize=resize))
        functional = torchvision.transforms.functional
        wanted = [resize] if isinstance(resize, int) else list(resize)
        expected = functional.resize(torch.tensor(array) / 255, wanted, antialias=True)
        torch.testing.assert_close(images[1][0], expected[1], rtol=0, atol=1e-6)


def test_grey_and_colour_follow_the_mean_or_the_channels(tmp_path: Path) -> None:
    write_folder(tmp_path, mode="L")
    spec = f"imagefolder:{tmp_path}"
    assert open_dataset(spec, PLAIN)[0][0].shape[0] == 3
    assert open_dataset(spec, Preprocessing((0.5,), (0.5,)))[0][0].shape[0] == 1
    grey = open_dataset(spec, Preprocessing(channels=1))
    assert grey[0][0].shape[0] == 1
    assert grey.raw(0).shape == (8, 8, 1)
    with pytest.raises(DataError, match="have 1 channels, the network takes 3"):
        check_channels(grey, 3)
    check_channels(grey, 1)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "1", "I;16"])
def test_every_usual_pixel_type_is_read(tmp_path: Path, mode: Any) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    picture = Image.fromarray(pixels(8, 8, 3))
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    elif mode == "P":
        picture = picture.convert("P")
        picture.info["transparency"] = b"\x00\x10"
    else:
        picture = picture.convert(mode)
    picture.save(folder / ("a.tif" if mode in ("CMYK", "I;16") else "a.png"))
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    assert images[0][0].shape == (3, 8, 8)
    if mode == "I;16":
        assert set(images.raw(0).flat) == {0x80}


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    with pytest.raises(DataError, match=r"pest cannot be read: No such file.*mean 'pets'"):
        open_dataset(f"imagefolder:{tmp_path / 'pest'}", PLAIN)
    with pytest.raises(DataError, match="holds no pictures, neither in folders by class"):
        open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    (tmp_path / "pets" / "readme.txt").write_text("")
    with pytest.raises(DataError, match="holds no pictures"):
        open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        open_dataset(f"imagefolder:{tmp_path / 'file'}", PLAIN)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_images_are_named(tmp_path: Path, damage: Any, workers: Any) -> None:
    write_folder(tmp_path, sizes=((40, 40),) * 6)
    path = tmp_path / "bee" / "4.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"GIF?", "empty": b""}[damage])
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    with pytest.raises(DataError, match=r"bee/4\.png cannot be read: .*; replace it") as caught:
        list(batches(images, 2, workers))
    assert "\n" not in str(caught.value)


def test_batches_of_one_may_differ_in_size(tmp_path: Path) -> None:
    write_folder(tmp_path, sizes=((8, 8), (9, 8), (8, 8), (8, 8), (9, 8), (8, 8)))
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    found = [tuple(x.shape) for x, _ in batches(images, 1)]
    assert found.count((1, 3, 8, 9)) == 2
    assert found.count((1, 3, 8, 8)) == 4
    assert hold(images, Loader(1)) is images
    different = next(i for i in range(6) if images[i][0].shape != images[0][0].shape)
    assert len(first_inputs(images, 6)) == different


@pytest.mark.parametrize("batch_size", [2, 6])
def test_different_sizes_name_both_files_and_the_flags(tmp_path: Path, batch_size: Any) -> None:
    write_folder(tmp_path, sizes=((8, 8), (8, 8), (8, 8), (8, 8), (9, 8), (8, 8)))
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    with pytest.raises(DataError) as caught:
        list(batches(images, batch_size))
    message = str(caught.value)
    assert "bee/4.png" in message
    assert "3x8x9" in message
    assert "3x8x8" in message
    assert "--resize" in message
    assert "--crop" in message
    cropped = open_dataset(f"imagefolder:{tmp_path}", Preprocessing(resize=8, crop=8))
    assert sum(len(x) for x, _ in batches(cropped, batch_size)) == 6


def test_images_smaller_than_the_crop(tmp_path: Path) -> None:
    write_folder(tmp_path)
    images = open_dataset(f"imagefolder:{tmp_path}", Preprocessing(crop=9))
    with pytest.raises(DataError, match=r"ant/0\.png is 8x8 pixels, smaller than the crop of 9"):
        images[0]
    images = open_dataset(f"imagefolder:{tmp_path}", Preprocessing(crop=(8, 9)))
    with pytest.raises(DataError, match=r"the crop of 8x9; pass --resize 8,9 or more"):
        images[0]


def test_an_exact_size_brings_pictures_of_all_sizes_together(tmp_path: Path) -> None:
    write_folder(tmp_path, sizes=((8, 8), (9, 30), (20, 7)))
    images = open_dataset(f"imagefolder:{tmp_path}", Preprocessing(resize=(6, 24)))
    assert [tuple(x.shape) for x, _ in batches(images, 3)] == [(3, 3, 6, 24)]
    spec = f"imagefolder:{tmp_path}"
    other = open_dataset(spec, Preprocessing(resize=(24, 6)))
    assert images.fingerprint != other.fingerprint


# --- Arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_no_flipped_bit_of_an_archive_is_accepted(tmp_path: Path, write: Any) -> None:
    """Of what its arrays hold, or of what says how they are to be read."""
    path = tmp_path / "a.npz"
    write(path, images=pixels(40, 9, 9), labels=np.arange(40) % 4)
    known = [open_dataset(f"tensors:{path}", PLAIN).source.content(k) for k in range(40)]
    for _ in flipped(path, 600):
        with suppress(DataError):  # a date or an attribute, which no array depends on
            found = open_dataset(f"tensors:{path}", PLAIN).source
            assert [found.content(k) for k in range(len(found))] == known


def test_an_archive_that_lost_a_member_is_refused(tmp_path: Path) -> None:
    """By one bit: the comment of the first member, of no length, becomes the second member."""
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(20, 8, 8), labels=np.arange(20) % 4)
    whole = bytearray(path.read_bytes())
    directory = whole.index(b"PK\x01\x02")
    whole[directory + 32] ^= 64
    path.write_bytes(whole)
    assert np.load(path).files == ["images"]
    with pytest.raises(DataError, match="lists 1 members and announces 2"):
        open_dataset(f"tensors:{path}", PLAIN)


def test_an_array_that_was_shortened_is_refused(tmp_path: Path) -> None:
    """numpy stops before the end of the member, where its checksum would be compared."""
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels(4000, 9, 9))
    whole = path.read_bytes()
    assert whole.count(b"(4000, 9, 9)") == 1
    path.write_bytes(whole.replace(b"(4000, 9, 9)", b"(1000, 9, 9)"))
    with pytest.raises(DataError, match=r"a\.npz cannot be read as arrays: Bad CRC-32"):
        open_dataset(f"tensors:{path}", PLAIN)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
def test_array_layouts_and_scales(tmp_path: Path, name: Any, layout: Any) -> None:
    array = pixels(5, 3, 6, 7) if layout != "NHW" else pixels(5, 6, 7)
    stored = array.transpose(0, 2, 3, 1).copy() if layout == "NHWC" else array
    images = open_dataset(arrays(tmp_path, stored, [0, 1, 2, 1, 0], name), PLAIN)
    expected = torch.tensor(array if layout != "NHW" else array[:, None]) / 255
    (inputs, labels), *rest = batches(images, 5)
    assert not rest
    torch.testing.assert_close(inputs, expected)
    assert labels.tolist() == [0, 1, 2, 1, 0]
    assert images.classes == ("0", "1", "2")
    np.testing.assert_array_equal(images.raw(2), (expected[2] * 255).byte().permute(1, 2, 0))


def test_floating_arrays_are_kept_and_labels_optional(tmp_path: Path) -> None:
    array = RANDOM.normal(size=(4, 1, 5, 5))
    images = open_dataset(arrays(tmp_path, array), PLAIN)
    torch.testing.assert_close(images[1][0], torch.tensor(array[1]).float())
    assert images[1][1] == -1
    assert images.raw(1).dtype == np.uint8
    normalised = open_dataset(arrays(tmp_path, array), Preprocessing((1.0,), (2.0,)))
    torch.testing.assert_close(normalised[1][0], (torch.tensor(array[1]).float() - 1) / 2)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pixels(3, 4), None, r"shape \[3, 4\]; they must be"),
        (pixels(0, 1, 4, 4), None, "holds no images"),
        (pixels(3, 4, 4), [0, 1], r"3 images, but labels of shape \[2\]"),
        (pixels(3, 4, 4), [0, 1, -3], "down to -3"),
        (np.zeros((3, 4, 4), np.int64), None, "int64; save them as uint8"),
        (np.full((3, 4, 4), np.nan), None, "NaN or infinite"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, images: Any, labels: Any, message: Any) -> None:
    spec = arrays(tmp_path, images, labels)
    with pytest.raises(DataError, match=message):
        open_dataset(spec, PLAIN)


def test_array_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    np.savez(tmp_path / "b.npz", image=pixels(2, 4, 4))
    np.savez(tmp_path / "c.npz", images=np.array([{"code": 1}], dtype=object))
    for name, message in {
        "a.npz": "cannot be read as arrays",
        "a.safetensors": "cannot be read as arrays",
        "gone.npz": "No such file",
        "a.csv": "neither .safetensors nor .npz",
        "b.npz": "no array 'images'; it holds image. Did you mean 'image'",
        "c.npz": "allow_pickle=False",
    }.items():
        with pytest.raises(DataError, match=message):
            open_dataset(f"tensors:{tmp_path / name}", PLAIN)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_and_slices(tmp_path: Path, suffix: Any) -> None:
    array, labels = pixels(7, 4, 5), np.arange(7, dtype=np.uint8)
    first = write_idx(tmp_path / f"images{suffix}", array)
    second = write_idx(tmp_path / f"labels{suffix}", labels)
    images = open_dataset(f"idx:{first},{second}?start=2&stop=5", PLAIN)
    assert images.labels == (2, 3, 4)
    torch.testing.assert_close(images[0][0], torch.tensor(array[2])[None] / 255)
    assert open_dataset(f"idx:{first}", PLAIN).labels == (-1,) * 7
    with pytest.raises(DataError, match="1 axes, no images"):
        open_dataset(f"idx:{second},{first}", PLAIN)


def test_idx_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = write_idx(tmp_path / "good.gz", pixels(7, 4, 5))
    (tmp_path / "cut.gz").write_bytes(good.read_bytes()[:60])
    (tmp_path / "short").write_bytes(gzip.decompress(good.read_bytes())[:-1])
    (tmp_path / "text").write_text("hello")
    write_idx(tmp_path / "floats", pixels(7, 4, 5), kind=0x0D)
    for name, message in {
        "cut.gz": "cannot be read",
        "short": r"announces \[7, 4, 5\] values, 140 bytes, and holds 139",
        "text": "not an IDX file of bytes",
        "floats": "not an IDX file of bytes",
        "gone": "No such file",
    }.items():
        with pytest.raises(DataError, match=message):
            open_dataset(f"idx:{tmp_path / name}", PLAIN)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagefoldr", "is not a data spec. Did you mean 'imagefolder'"),
        ("imagefoldr:pets", "no module 'imagefoldr'.*Did you mean 'imagefolder'"),
        ("tensors:{}?begin=3", "no argument 'begin'.*start and stop"),
        ("tensors:{}?start=9", "is empty; it has 3 images"),
        ("tensors:{}?start=-1", "start=-1 is not an index"),
        ("tensors:{}?start=x", "start=x is not an index"),
        ("torchvision:CIFAR11", "no dataset 'CIFAR11'. Did you mean 'CIFAR10"),
        ("torchvision:FakeData?sise=3", "cannot be opened with"),
    ],
)
def test_specs_that_open_nothing(tmp_path: Path, spec: Any, message: Any) -> None:
    arrays(tmp_path, pixels(3, 4, 4))
    with pytest.raises(DataError, match=message):
        open_dataset(spec.format(tmp_path / "a.npz"), PLAIN)


# --- Datasets ----------------------------------------------------------------------------------

USER_FILE = """
import torch
from torch.utils.data import Dataset, IterableDataset

class Floats(Dataset):
    classes = ["x", "y"]
    def __len__(self):
        return 4
    def __getitem__(self, index):
        if index > 3:
            raise IndexError
        return torch.full((3, 4, 4), float(index)), torch.tensor(index % 2)

class Bytes(Floats):
    def __getitem__(self, index):
        return {"image": torch.full((3, 4, 4), index, dtype=torch.uint8), "label": index % 2}

class Alone(Floats):
    def __getitem__(self, index):
        return torch.zeros(3, 4, 4)

class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)

class Words(Floats):
    def __getitem__(self, index):
        return "picture.png", 0

class Broken(Floats):
    def __getitem__(self, index):
        raise OSError("disk gone")

class Empty(Floats):
    def __len__(self):
        return 0
"""


@pytest.fixture
def users(tmp_path: Path) -> Any:
    (tmp_path / "sets.py").write_text(USER_FILE)
    return f"{tmp_path}/sets.py"


def test_users_datasets(users: Any) -> None:
    images = open_dataset(f"{users}:Floats", PLAIN)
    assert images.classes == ("x", "y")
    assert images.labels == (0, 1, 0, 1)
    torch.testing.assert_close(images[3][0], torch.full((3, 4, 4), 3.0))
    in_bytes = open_dataset(f"{users}:Bytes", PLAIN)
    torch.testing.assert_close(in_bytes[3][0], torch.full((3, 4, 4), 3 / 255))
    assert open_dataset(f"{users}:Alone", PLAIN).labels == (-1,) * 4


def test_finished_tensors_are_spared_a_preset_but_not_what_was_asked_for(users: Any) -> None:
    asked = Preprocessing((1.0,) * 3, (2.0,) * 3)
    preset = Preprocessing((1.0,) * 3, (2.0,) * 3, from_preset=True)
    torch.testing.assert_close(
        open_dataset(f"{users}:Floats", asked)[3][0], torch.full((3, 4, 4), 1.0)
    )
    torch.testing.assert_close(
        open_dataset(f"{users}:Floats", preset)[3][0], torch.full((3, 4, 4), 3.0)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Stream", "not a Dataset with __len__"),
        ("Words", "is a str; it must be a tensor"),
        ("Broken", "Item 0 of .* cannot be read: OSError: disk gone"),
        ("Empty", "holds no images"),
        ("Float", "no factory 'Float'. Did you mean 'Floats'"),
    ],
)
def test_users_datasets_that_cannot_be_used(users: Any, name: Any, message: Any) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(f"{users}:{name}", PLAIN)


def test_torchvision_sets_by_name() -> None:
    spec = "torchvision:FakeData?size=20&num_classes=3&image_size=[3, 9, 8]&stop=5"
    images = open_dataset(spec, Preprocessing((0.5,) * 3, (0.5,) * 3))
    torchvision, _ = load_torchvision()
    picture, label = torchvision.datasets.FakeData(20, (3, 9, 8), 3)[4]
    assert len(images) == 5
    assert images[4][1] == int(label)
    expected = torch.tensor(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[4][0], (expected - 0.5) / 0.5)
    grey = open_dataset(spec, Preprocessing(channels=1))
    assert grey[0][0].shape == (1, 9, 8)


def test_torchvision_sets_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    root = tmp_path / "downloads"
    with pytest.raises(DataError, match=r"CIFAR10 is not in root=.*could not be fetched.*no route"):
        open_dataset(f"torchvision:CIFAR10?root={root}&train=false", PLAIN)
    assert not root.exists()


# --- Labels and classes ------------------------------------------------------------------------


def test_labels_are_checked_against_the_outputs(tmp_path: Path) -> None:
    images = open_dataset(arrays(tmp_path, pixels(4, 4, 4), [0, 1, 2, 11]), PLAIN)
    with pytest.raises(DataError, match="number 3 has label 11, but there are 10 outputs"):
        check_labels(images, 10)
    assert check_labels(images, 12) == ()
    (warning,) = check_labels(images, 1000)
    assert "12 classes and the network 1000 outputs" in warning


def test_one_class_only_says_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "up" / "train")
    images = open_dataset(f"imagefolder:{tmp_path / 'up'}", PLAIN)
    with pytest.raises(DataError, match=r"are of one class \('train'\), so accuracy says nothing"):
        check_labels(images, 10)
    (first, second) = check_labels(images.subset([0]), 10)
    assert "one class" in first
    assert "1 classes" in second


@pytest.mark.parametrize("kind", ["json", "text"])
def test_class_map_puts_labels_in_the_models_order(tmp_path: Path, kind: Any) -> None:
    write_folder(tmp_path / "data")
    names = ["cat", "dog", "ant", "bee"]
    path = tmp_path / "classes"
    path.write_text(json.dumps(names) if kind == "json" else "\n".join(names) + "\n\n")
    images = open_dataset(f"imagefolder:{tmp_path / 'data'}", PLAIN, str(path))
    by_name = {images.name(k).split("/")[0]: images.label(k) for k in range(len(images))}
    assert by_name == {"cat": 0, "ant": 2, "bee": 3}
    assert images[0][1] == 2
    assert images.classes == tuple(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["ants", "bee", "cat"]', "The class 'ant' .* not in the class map .*mean 'ants'"),
        ('["ant", "bee", "cat", "ant"]', "names 'ant' twice"),
        ('{"ant": 0}', "must be a JSON list"),
        ("[1, 2]", "must be a JSON list"),
        ("[", "not valid JSON"),
        ("", "must be a JSON list"),
    ],
)
def test_class_maps_that_cannot_be_used(tmp_path: Path, content: Any, message: Any) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "map").write_text(content)
    with pytest.raises(DataError, match=message):
        open_dataset(f"imagefolder:{tmp_path / 'data'}", PLAIN, str(tmp_path / "map"))
    with pytest.raises(DataError, match="gone cannot be read: No such file"):
        open_dataset(f"imagefolder:{tmp_path / 'data'}", PLAIN, str(tmp_path / "gone"))


def test_a_class_map_leaves_pictures_without_labels_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "labelled")
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, picture in enumerate(sorted((tmp_path / "labelled").rglob("*.png"))):
        picture.rename(flat / f"{number}.png")
    (tmp_path / "map").write_text("whatever\n")
    images = open_dataset(f"imagefolder:{flat}", PLAIN, str(tmp_path / "map"))
    assert len(images)
    assert set(images.labels) == {-1}


@pytest.mark.parametrize(
    "settings_",
    [
        {"mean": (0.5,)},
        {"mean": (0.5,), "std": (0.0,)},
        {"interpolation": "bilinar"},
        {"mean": (0.5,), "std": (0.5,), "channels": 3},
    ],
)
def test_preprocessing_that_cannot_be_used(settings_: Any) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        Preprocessing(**settings_)


def test_channels_must_match_the_mean(tmp_path: Path) -> None:
    images = open_dataset(arrays(tmp_path, pixels(2, 4, 4)), Preprocessing((0.5,) * 3, (1.0,) * 3))
    with pytest.raises(DataError, match="number 0 has 1 channels, but --mean and --std have 3"):
        images[0]


# --- Fingerprints, splits, batches -------------------------------------------------------------


def test_fingerprint_is_of_the_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a")
    spec = f"imagefolder:{tmp_path / 'a'}"
    first = open_dataset(spec, PLAIN).fingerprint
    (tmp_path / "a" / "ant" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    assert open_dataset("imagefolder:a", PLAIN).fingerprint == first
    assert open_dataset("imagefolder:a?start=0&stop=6", PLAIN).fingerprint == first
    assert open_dataset("imagefolder:a", Preprocessing(resize=4)).fingerprint != first
    others = {
        open_dataset("imagefolder:a?stop=5", PLAIN).fingerprint,
        open_dataset("imagefolder:a?start=1", PLAIN).fingerprint,
    }
    path = tmp_path / "a" / "cat" / "5.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    others.add(open_dataset("imagefolder:a", PLAIN).fingerprint)
    data[-20] ^= 1
    path.write_bytes(data)
    assert open_dataset("imagefolder:a", PLAIN).fingerprint == first
    path.rename(path.with_name("6.png"))
    others.add(open_dataset("imagefolder:a", PLAIN).fingerprint)
    assert len(others | {first}) == 5


def test_fingerprint_of_a_large_folder_reads_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data.sources.WHOLE_BYTES", 1)
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / "a.bmp"
    path.write_bytes(bytes(20_000))
    changed = set()
    for place in (None, 0, 10_000, 19_999):
        data = bytearray(20_000)
        if place is not None:
            data[place] = 1
        path.write_bytes(data)
        changed.add(open_dataset(f"imagefolder:{tmp_path}", PLAIN).fingerprint)
    assert len(changed) == 3  # the middle is not looked at


def test_fingerprint_of_arrays_and_datasets_sees_pixels_and_labels(
    tmp_path: Path, users: Any
) -> None:
    array = pixels(4, 4, 4)
    prints = {open_dataset(arrays(tmp_path, array, [0, 1, 0, 1]), PLAIN).fingerprint}
    prints.add(open_dataset(arrays(tmp_path, array, [0, 1, 1, 1]), PLAIN).fingerprint)
    array[3, 3, 3] ^= 1
    prints.add(open_dataset(arrays(tmp_path, array, [0, 1, 0, 1]), PLAIN).fingerprint)
    prints.add(open_dataset(f"{users}:Floats", PLAIN).fingerprint)
    prints.add(open_dataset(f"{users}:Alone", PLAIN).fingerprint)
    assert len(prints) == 5
    assert open_dataset(f"{users}:Floats", PLAIN).fingerprint in prints


@settings(derandomize=True, deadline=None, max_examples=40)
@given(count=st.integers(1, 60), size=st.integers(1, 50), seed=st.integers(0, 5))
def test_split_is_disjoint_seeded_and_no_larger_than_asked(
    digits: Any, count: Any, size: Any, seed: Any
) -> None:
    images = digits.subset(range(size))
    drawn = split(images, count, seed)
    fit, validation = list(drawn.fit.indices), list(drawn.validation.indices)
    assert len(fit) + len(validation) == min(count, size)
    assert len(set(fit) | set(validation)) == min(count, size)
    assert set(fit) | set(validation) <= set(range(size))
    assert len(fit) >= 1
    assert len(validation) >= (min(count, size) > 1)
    assert split(images, count, seed).record == drawn.record
    assert (drawn.record["fit"], drawn.record["validation"]) == (len(fit), len(validation))


def test_split_depends_on_the_seed_and_not_on_the_global_state(digits: Any) -> None:
    torch.manual_seed(1)
    first = split(digits, 100, 0)
    torch.manual_seed(2)
    assert split(digits, 100, 0).fit.indices == first.fit.indices
    assert split(digits, 100, 1).fit.indices != first.fit.indices
    assert (len(first.fit), len(first.validation)) == (75, 25)
    json.dumps(first.record)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_count(digits: Any, workers: Any) -> None:
    images = digits.subset(range(50))
    loader = batches(images, 16, workers)
    assert len(loader) == 4
    pairs = list(loader)
    assert [len(x) for x, _ in pairs] == [16, 16, 16, 2]
    inputs, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    items = [images[k] for k in range(50)]
    torch.testing.assert_close(inputs, torch.stack([x for x, _ in items]), rtol=0, atol=1e-6)
    assert labels.tolist() == [label for _, label in items]
    torch.testing.assert_close(list(loader)[3][0], pairs[3][0], rtol=0, atol=0)


def test_batches_of_files_keep_order(tmp_path: Path) -> None:
    write_folder(tmp_path)
    images = open_dataset(f"imagefolder:{tmp_path}", PLAIN)
    inputs = torch.cat([x for x, _ in batches(images, 4)])
    torch.testing.assert_close(inputs, torch.stack([images[k][0] for k in range(6)]))


def test_batches_leave_the_global_random_state(digits: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(batches(digits.subset(range(4)), 2, workers=1))
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


# --- The embedded set --------------------------------------------------------------------------


def test_the_embedded_digits_are_those_of_uci(digits: Any, digits_test: Any) -> None:
    assert (len(digits), len(digits_test)) == (1437, 360)
    assert check_labels(digits, 10) == check_labels(digits_test, 10) == ()
    # All 1,797, by class, as the data set's own description counts them.
    counts = np.bincount(digits.labels + digits_test.labels)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    both = {images.raw(k).tobytes() for images in (digits, digits_test) for k in range(len(images))}
    assert len(both) == 1797  # no image lies in both parts


def test_the_embedded_network_knows_them(digits_test: Any) -> None:
    model = width32().eval()
    load_into(model, read_checkpoint(DEMO / "digits-width32.safetensors"))
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(digits_test, 120))
    assert right >= 0.98 * len(digits_test)
