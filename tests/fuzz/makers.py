"""Small valid files of every kind that is read, and crafted ones that are no accident."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import io
import json
import pickle
import random
import struct
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report_examples
import safetensors.torch
import torch
from fuzz.mutate import HOSTILE_TEXTS, HUGE_NUMBERS, mutate_tree, to_json
from networks.tiny import tiny
from PIL import Image

from compress.artefact.manifest import Manifest, Replacement
from compress.artefact.model import restructure, save
from compress.artefact.runtime import Runtime, write_runtime
from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, write_calibration
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Source
from compress.choose.choices import make_choice
from compress.config import make_config
from compress.files import RUNTIME_FILE, SEAL_KEY, sealed_record, sealed_tensors
from compress.network.baseline import Network, prepare
from compress.plan import DENSE, NARROW, Plan
from compress.report import build_comparison, build_report, build_sweep_report, render_json
from compress.result import SweepResult, to_dict
from compress.timing.layers import LatencyTable, Setting

MEGABYTE = 1 << 20


# --- What everything is made of ----------------------------------------------------------------


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """The state dict of the tiny network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(tiny().state_dict())


@functools.cache
def network() -> Network:
    """The tiny network, prepared."""
    model = tiny()
    model.load_state_dict(weights())
    return prepare(model.eval(), torch.zeros(1, 1, 8, 8))


SWEEP_KEY = {"a": 1}
KEY = CalibrationKey("model", "data", {"seed": 0, "statistics": ["output", "spatial"]})


def in_a_file(write: Callable[[Path], object], suffix: str = "") -> bytes:
    """Return what a function writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"made{suffix}")
        write(path)
        return path.read_bytes()


def torch_file(content: object, *, legacy: bool = False) -> bytes:
    """Write as torch.save does."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


# --- Valid files -------------------------------------------------------------------------------


def safetensors_files() -> list[bytes]:
    """Checkpoints as safetensors."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights().items()}
    return [
        safetensors.torch.save(weights()),
        safetensors.torch.save(half, metadata={"format": "pt"}),
        safetensors.torch.save({f"module.{k}": v for k, v in weights().items()}),
    ]


SHARDS = ("part-1.safetensors", "part-2.safetensors")


def shards() -> dict[str, bytes]:
    """The two files that hold the weights which an index divides among them."""
    names = sorted(weights())
    halves = (names[::2], names[1::2])
    return {
        shard: safetensors.torch.save({n: weights()[n] for n in half})
        for shard, half in zip(SHARDS, halves, strict=True)
    }


def index_files() -> list[bytes]:
    """Indices of a checkpoint in two files."""
    names = sorted(weights())
    places = {n: SHARDS[k % 2] for k, n in enumerate(names)}
    size = sum(t.numel() * t.itemsize for t in weights().values())
    whole = {"metadata": {"total_size": size}, "weight_map": places}
    return [json.dumps(whole, indent=2).encode(), json.dumps({"weight_map": places}).encode()]


def crafted_index(rng: random.Random, data: bytes) -> bytes:
    """Let an index lead elsewhere, to nothing, or to the wrong file."""
    tree = json.loads(data)
    places = tree["weight_map"]
    name = rng.choice(sorted(places))
    places[name] = rng.choice(
        (
            "../part-1.safetensors", "/dev/zero", "..", ".", "", "a\\b", "part-3.safetensors",
            "C:part-1.safetensors", "index.json", "\x1b[2J", "x" * 5000, 3, None, [SHARDS[0]],
            *SHARDS, rng.choice(HOSTILE_TEXTS),
        )
    )  # fmt: skip
    if rng.random() < 0.3:
        places[rng.choice(HOSTILE_TEXTS)] = SHARDS[0]
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def torch_files(*, legacy: bool) -> list[bytes]:
    """Checkpoints of torch.save."""
    state = OrderedDict(weights())
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "lr": 0.1}
    model = tiny()
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimiser.step()
    training: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimiser.state_dict()}
    training |= {"best": np.float64(0.5), "args": argparse.Namespace(lr=0.1, seen=np.zeros(3))}
    parameters = {k: torch.nn.Parameter(v) for k, v in state.items() if v.is_floating_point()}
    return [torch_file(c, legacy=legacy) for c in (state, wrapped, training, parameters)]


def _images(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (count, 1, 8, 8)).astype(np.uint8), np.arange(count) % 3


def npz_files() -> list[bytes]:
    """Images and labels as npz."""
    images, labels = _images()
    files = []
    for save_npz in (np.savez, np.savez_compressed):
        for arrays in (
            {"images": images, "labels": labels},
            {"images": images.astype(np.float32) / 255, "labels": labels.astype(np.uint8)},
        ):
            buffer = io.BytesIO()
            save_npz(buffer, **arrays)
            files.append(buffer.getvalue())
    return files


def array_safetensors_files() -> list[bytes]:
    """Images and labels as safetensors."""
    images, labels = (torch.from_numpy(a) for a in _images())
    return [
        safetensors.torch.save({"images": images, "labels": labels}),
        safetensors.torch.save({"images": images.half(), "labels": labels.int()}),
    ]


def idx(array: np.ndarray) -> bytes:
    """Write an array of bytes as IDX."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def idx_files() -> list[bytes]:
    """Images as IDX, plain and gzipped."""
    images, _ = _images()
    plain = idx(images[:, 0])
    return [plain, gzip.compress(plain, mtime=0), idx(images), idx_labels()]


def idx_labels() -> bytes:
    """Labels that belong to `idx_files`."""
    return idx(_images()[1].astype(np.uint8))


PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")


def pictures() -> list[bytes]:
    """Small pictures in every format and mode."""
    made = []
    colours = np.random.default_rng(1).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        image = Image.fromarray(colours).convert(mode)
        for form in PICTURE_FORMATS:
            if (form, mode) in {("JPEG", "P"), ("JPEG", "RGBA"), ("PPM", "P"), ("PPM", "RGBA")}:
                continue
            buffer = io.BytesIO()
            image.save(buffer, form)
            made.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray(colours[..., 0].astype(np.uint16) * 200).save(buffer, "PNG")
    return [*made, buffer.getvalue()]


def a_plan() -> Plan:
    """A plan for the tiny network."""
    choices = []
    for site in network().sites:
        if site.skip is None and "output" in site.schemes:
            choices.append(make_choice(site, "output", (2,), "asked", 3))
        else:
            choices.append(make_choice(site, DENSE, (), "kept", 0))
    return Plan("threshold", 0.01, "loss", tuple(choices), "torchvision:resnet18", "ab", "cd")


def a_narrow_plan() -> Plan:
    """A plan that takes channels out between the convolutions of the tiny network."""
    widths = {"conv1": (1, 4), "conv2": (4, 12)}
    choices = [
        make_choice(site, NARROW, (), "asked", 0, widths[site.name]) if site.name in widths
        else make_choice(site, DENSE, (), "kept", 0)
        for site in network().sites
    ]  # fmt: skip
    return Plan("macs", 0.5, "loss", tuple(choices))


def plans() -> list[bytes]:
    """Plans as JSON."""
    return [plan.to_json().encode() for plan in (a_plan(), a_narrow_plan())]


def reports() -> list[bytes]:
    """Reports of every kind."""
    run = build_report(report_examples.result())
    made = [
        run,
        build_report(report_examples.result(test=None, gates=())),
        report_examples.thin("bare"),
        report_examples.thin("custom"),
        build_sweep_report(_short_sweep()),
        build_comparison([run, run], ["a", "b"]),
    ]
    return [render_json(report).encode() for report in made]


def _short_sweep() -> SweepResult:
    return report_examples.sweep(3)


def sweep_points() -> list[bytes]:
    """Finished points of a sweep, all of them under the name of the first."""
    points = _short_sweep().points
    first = points[0]
    named = [dataclasses.replace(p, rule=first.rule, value=first.value) for p in points]
    records = [sealed_record({"key": SWEEP_KEY, "point": to_dict(point)}) for point in named]
    return [json.dumps(record).encode() for record in records]


def calibrations() -> list[bytes]:
    """Statistics of the tiny network."""
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made = calibrate(
        network().model,
        network().sites,
        [(images, torch.zeros(16))],
        Source(16),
        Recipe(schemes=("output", "spatial"), weigh=True),
    )
    return [in_a_file(lambda path: write_calibration(path, made, KEY))]


def latency_tables() -> list[bytes]:
    """A table of two layers."""
    setting = Setting("cpu", "a machine", 1, "float32", "contiguous", "2.13")
    layers = (torch.nn.Linear(3, 4), torch.nn.Conv2d(1, 8, 3))
    known = {LatencyTable.key(layer, (8, 3), setting): 1e-4 for layer in layers}
    return [LatencyTable(known).to_json().encode()]


def runtimes() -> list[bytes]:
    """How a model is run, in both formats."""
    return [_runtime("contiguous"), _runtime("channels_last")]


def _runtime(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_runtime(folder, Runtime(name))
        return Path(folder, RUNTIME_FILE).read_bytes()


CLASSES = ("ant", "bee", "cat")


def class_maps() -> list[bytes]:
    """Class names in an order of their own, as JSON and as lines."""
    return [json.dumps(["cat", "ant", "bee"]).encode(), b"cat\nant\nbee\n"]


CONFIGURATION: dict[str, Any] = {
    "checkpoint": "w.pt", "model": "torchvision:resnet18", "data": "imagefolder:d", "mean": [0.5],
    "std": [0.25], "resize": 28, "seed": 3, "macs": 0.5, "schemes": ["output", "spatial"],
    "rank": {"conv*": "8", "head": "4,4"}, "keep": ["a"], "refit": True, "max_drop": 1.0,
}  # fmt: skip


def configurations() -> list[bytes]:
    """Settings as TOML."""
    return [make_config(CONFIGURATION).to_toml().encode(), b"macs = 0.5\n[rank]\nconv1 = '8'\n"]


def results() -> list[bytes]:
    """A compressed model with its manifest."""
    made = network()
    manifest = Manifest(
        model="torchvision:resnet18",
        source_sha256="ab" * 32,
        dtype="float32",
        folded=tuple((pair.layer, pair.norm) for pair in made.folded),
        replacements=(Replacement("conv2", ("conv2",), "output", (2,)),),
        settings={"mean": [0.5], "std": [0.5], "max_drop": 1.0},
        versions={"compress": "0.1.0", "torch": "2.13.0"},
    )
    model = tiny()
    model.load_state_dict(weights())
    model = restructure(model.float().eval(), manifest)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.get_submodule("conv2").parameters():
        # `restructure` leaves memory as it was, for a state dict to fill.
        torch.nn.init.normal_(parameter, generator=draw)
    return [in_a_file(lambda path: save(model, manifest, path))]


# --- Crafted files -----------------------------------------------------------------------------


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any], rng: random.Random) -> bytes:
    """Return a safetensors file with its header changed, its length brought up to date."""
    length = int.from_bytes(data[:8], "little")
    header = to_json(change(json.loads(data[8 : 8 + length])), rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def sealed_anew(data: bytes, rng: random.Random) -> bytes:
    """Mostly bring the digest of a safetensors file up to date, where it has one.

    Else nothing behind the check of the digest would ever see a crafted file.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__")
        if rng.random() < 0.2 or metadata.pop(SEAL_KEY, None) is None:
            return data
        table = json.dumps(header).encode()
        plain = struct.pack("<Q", len(table)) + table + data[8 + length :]
        return b"".join(bytes(part) for part in sealed_tensors(plain, metadata))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


def _record_sealed_anew(tree: Any, rng: random.Random) -> Any:
    """Mostly bring the digest of a record up to date, where it has one."""
    if not isinstance(tree, dict) or "sha256" not in tree or rng.random() < 0.2:
        return tree
    try:
        return sealed_record({k: v for k, v in tree.items() if k != "sha256"})
    except (ValueError, TypeError, RecursionError):
        return tree


def crafted_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header as a tree, or one of its JSON strings as a tree of its own."""

    def change(header: dict[str, Any]) -> Any:
        metadata = header.get("__metadata__", {})
        inner = [k for k in metadata if metadata[k].startswith("{")]
        if inner and rng.random() < 0.8:
            key = rng.choice(inner)
            tree = mutate_tree(rng, json.loads(metadata[key]))
            metadata[key] = to_json(tree, rng).decode("utf-8", "replace")
            return header
        return mutate_tree(rng, header)

    return sealed_anew(with_header(data, change, rng), rng)


def renamed_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Give the entries hostile names."""
    text = rng.choice(HOSTILE_TEXTS)
    names = (lambda k: text + k, lambda k: k + text, lambda k: f"module.{text}.{k}")
    name = rng.choice(names)
    return with_header(
        data, lambda h: {k if k == "__metadata__" else name(k): v for k, v in h.items()}, rng
    )


def extreme_tensors(rng: random.Random, data: bytes) -> bytes:
    """Replace one tensor by another of an extreme shape, type or value; metadata stays."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    state = dict(safetensors.torch.load(data))
    name = rng.choice(sorted(state))
    state[name] = rng.choice(
        (
            torch.zeros(0),
            torch.zeros(0, 1 << 40),
            torch.zeros(1, 1 << 20),
            torch.tensor(-1),
            torch.tensor(float("nan")),
            torch.full((2, 3), float("inf")),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(2, dtype=torch.bool),
            torch.zeros(2, dtype=torch.float8_e4m3fn),
            torch.zeros(2, dtype=torch.uint16),
            torch.zeros((1,) * 70),
            torch.full(state[name].shape, 100_000_000),
        )
    )
    return sealed_anew(safetensors.torch.save(state, metadata=metadata), rng)


class Call:
    """Pickled as a call of a function that weights-only loading allows."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def _view(storage: object, offset: int, size: tuple[int, ...]) -> Call:
    """A tensor at some place of a storage, as torch pickles it."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, (1,), False, {})


def _nested_tuple(levels: int) -> bytes:
    """A pickle of ``{((((...),),),): 1}``."""
    return b"\x80\x02})" + b"\x85" * levels + b"K\x01s."


def _crafted_content(rng: random.Random) -> Any:
    one = torch.zeros(1)
    itself: dict[str, Any] = dict(weights())
    itself[rng.choice(("state_dict", "model", "ema"))] = itself
    empty: dict[str, Any] = {}
    empty["model"] = {"state_dict": empty}
    chain: dict[str, Any] = dict(weights())
    for _ in range(rng.choice((3, 30, 400))):
        chain = {"model": chain, "ema": chain, "state_dict": chain}
    text = rng.choice(HOSTILE_TEXTS).encode("utf-8", "replace").decode()
    return rng.choice(
        (
            {**weights(), "conv1.weight": one.expand(1 << rng.choice((20, 30, 40)))},
            {f"w{i}": one.as_strided((1 << 18, 1 << 18), (0, 0)) for i in range(9)},
            itself,
            empty,
            chain,
            {text + k: v for k, v in weights().items()},
            {("a", 1): one, 3: one, None: one, 10**3000: one},
            {"w": Call(bytearray, 1 << 40)},
            {"w": Call(torch.FloatTensor, 1 << 38)},
            {"w": _view(one.untyped_storage(), 0, (1 << 30,))},
            {"w": _view(one.storage(), 0, (1 << 32,))},
            {"w": _view(one.storage(), 1 << 40, (2,))},
            {"w": torch.zeros(4, device="meta")},
            {"w": one.to_sparse(), "v": one},
            {"w": torch.zeros(3, dtype=torch.complex64)},
            [weights()],
            one,
            {"state_dict": {}},
            dict.fromkeys(range(1000), one),
        )
    )  # fmt: skip


def crafted_torch(rng: random.Random, data: bytes, *, legacy: bool) -> bytes:
    """Return a file of torch.save whose content is a trap, or whose pickle was edited."""
    how = rng.randrange(10)
    if how < 5:
        return torch_file(_crafted_content(rng), legacy=legacy)
    if legacy:
        return _edited_pickle(rng, data)
    if how == 5:
        return _rebuilt(data, {"data.pkl": lambda _: _nested_tuple(rng.choice((500, 300_000)))})
    if how == 6:
        return _bomb(rng, data)
    if how == 7:
        return _twice(rng, data)
    return _rebuilt(data, {"data.pkl": lambda pkl: _edited_pickle(rng, pkl)})


def _edited_pickle(rng: random.Random, pkl: bytes) -> bytes:
    """Change a small number of a pickle, which are sizes, strides, offsets and lengths."""
    places = [i for i in range(min(len(pkl), 4000) - 6) if pkl[i : i + 1] in b"KMJ"]
    if not places:
        return pkl
    place = rng.choice(places)
    size = {b"K": 2, b"M": 3, b"J": 5}[pkl[place : place + 1]]
    number = rng.choice((-1, 0, 1, 2, 1 << 20, (1 << 31) - 1, -(1 << 31)))
    new = b"J" + struct.pack("<i", number)
    if rng.random() < 0.3:
        new = b"\x8a\x08" + struct.pack("<q", rng.choice((1 << 40, 1 << 62, -(1 << 62))))
    return pkl[:place] + new + pkl[place + size :]


def _rebuilt(data: bytes, change: dict[str, Callable[[bytes], bytes]], **settings: Any) -> bytes:
    """Write a zip archive anew with some members changed, by the end of their name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", **settings) as new:
        for info in old.infolist():
            body = old.read(info)
            for end, function in change.items():
                body = function(body) if info.filename.endswith(end) else body
            new.writestr(info.filename, body)
    return out.getvalue()


def _bomb(rng: random.Random, data: bytes) -> bytes:
    """Deflate, bzip or lzma a member that grows a thousand times."""
    end = rng.choice(("data.pkl", "data/0", "version", "images.npy", "labels.npy"))
    size, how = rng.choice((1, 64, 300)) * MEGABYTE, zipfile.ZIP_DEFLATED
    if rng.random() < 0.3:
        size, how = MEGABYTE, rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return _rebuilt(data, {end: lambda body: body + bytes(size)}, compression=how, compresslevel=1)


def _twice(rng: random.Random, data: bytes) -> bytes:
    """Hold one name twice, with other content."""
    out = io.BytesIO(data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        info = rng.choice(old.infolist())
    with zipfile.ZipFile(out, "a") as new:
        new.fp.seek(0, 2)
        name = rng.choice((info.filename, info.filename.upper()))
        new.NameToInfo.pop(name, None)  # else it warns
        new.writestr(name, rng.randbytes(rng.choice((0, 3, 5000))))
    return out.getvalue()


def npy(header: str | bytes, body: bytes = b"", version: int = 1) -> bytes:
    """Write an npy file with any header."""
    text = header.encode() if isinstance(header, str) else header
    text += b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) & (0xFFFF if version == 1 else -1))
    return b"\x93NUMPY" + bytes((version, 0)) + size + text + body


def crafted_npz(rng: random.Random, data: bytes) -> bytes:
    """Return an npz with an edited header, hostile labels, a bomb, or members that no one wants."""
    how = rng.randrange(7)
    if how == 0:
        return _bomb(rng, data)
    if how == 1:
        return _twice(rng, data)
    images, labels = _images()
    if how == 2:
        odd = rng.choice(
            (
                labels * 0 + 100_000_000,
                labels.astype(np.uint64) + np.uint64(2**63),
                labels.astype(np.int64) - 2**62,
                labels.astype(np.uint16),
                labels.astype("U5"),
                labels.astype("M8[s]"),
                labels[:0],
                np.array(3),
                labels.astype(">i4"),
            )
        )
        return _npz(images=images, labels=odd)
    if how == 3:
        odd = rng.choice(
            (
                np.zeros((3, 0, 8), np.uint8),
                np.zeros((3, 1, 8, 0), np.uint8),
                np.zeros((0, 1, 8, 8), np.uint8),
                images.astype(np.float16) * np.inf,
                np.asfortranarray(images),
                images.astype(">f4"),
                images.astype(np.longdouble),
                np.zeros((1,) * 40, np.uint8),
                np.zeros((), np.uint8),
                np.array([b"x"]),
                np.zeros(3, [("a", "u1"), ("b", "f4")]),
            )
        )
        return _npz(images=odd, labels=labels)
    shape = tuple(rng.choice((0, 1, 8, 12, *HUGE_NUMBERS)) for _ in range(rng.randint(0, 5)))
    descr = rng.choice(
        ("|u1", "<f4", "|O", "<U9", "|V0", "<f16", "|S0", "<u1", "x", "[('a','u1')]")
    )
    order = rng.choice((True, False, 3))
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"
    if rng.random() < 0.3:
        header = rng.choice(
            ("(" * 3_000, "[" * 60_000, "-" * 9_000 + "1", "{}", "1" * 9_000, "é\0")
        )
    version = rng.choice((1, 1, 2, 3, 9))
    member = npy(header, images.tobytes(), version)
    return _rebuilt(data, {rng.choice(("images.npy", "labels.npy")): lambda _: member})


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def crafted_idx(rng: random.Random, data: bytes) -> bytes:
    """Return an IDX file with sizes that its content does not hold, or a bomb."""
    how = rng.randrange(4)
    if how == 0:
        size = rng.choice((1, 64, 300)) * MEGABYTE
        head = struct.pack(">HBB", 0, 8, 3) + struct.pack(">3I", size >> 20, 1 << 10, 1 << 10)
        return gzip.compress(rng.choice((head, b"")) + bytes(size), 1, mtime=0)
    axes = rng.choice((0, 1, 3, 3, 3, 4, 200, 255))
    sizes = [rng.choice((0, 1, 12, 1 << 16, 1 << 31, (1 << 32) - 1)) for _ in range(axes)]
    body = data[16:] if how < 3 else b""
    made = struct.pack(">HBB", 0, 8, axes) + struct.pack(f">{axes}I", *sizes) + body
    return gzip.compress(made, mtime=0) if rng.random() < 0.3 else made


def _png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def crafted_picture(rng: random.Random, data: bytes) -> bytes:
    """Return a picture of no pixels, of very many, or with sizes that are not its own."""
    how = rng.randrange(4)
    side = rng.choice((0, 1, 5_000, 20_000, 60_000, (1 << 31) - 1))
    other = rng.choice((0, 1, 3, 12_000, 60_000))
    if how == 0:
        return _png(side, other, bytes(min((side + 1) * other, 30 * MEGABYTE)))
    if how == 1:
        return f"P{rng.choice((4, 5, 6))}\n{side} {other}\n255\n".encode() + bytes(1000)
    if how == 2:
        sizes = struct.pack("<ii", rng.choice((side, -side)), other)
        return data[:18] + sizes + data[26:]
    return data[:16] + struct.pack(">II", side & 0x7FFFFFFF, other) + data[24:]


def crafted_class_map(rng: random.Random, _: bytes) -> bytes:
    """Return very many names, or hostile ones."""
    names = [*CLASSES, *(rng.choice(HOSTILE_TEXTS) for _ in range(3))]
    if rng.random() < 0.3:
        names = [*CLASSES, *map(str, range(200_000))]
    if rng.random() < 0.3:
        names = ["".join(rng.choice("ab") for _ in range(20_000)) for _ in range(20)]
    if rng.random() < 0.5:
        return "\n".join(names).encode("utf-8", "surrogatepass")
    return json.dumps(names).encode()


def crafted_toml(rng: random.Random, _: bytes) -> bytes:
    """Return TOML with changed values, deep tables or very long keys."""
    import tomli_w

    how = rng.randrange(6)
    if how == 0:
        return ("a." * rng.choice((100, 20_000)) + "b = 1\n").encode()
    if how == 1:
        many = rng.choice((100, 3_000))
        return b"keep = " + b"[" * many + b"]" * many + b"\n"
    if how == 2:
        return b"seed = " + str(rng.choice(HUGE_NUMBERS)).encode() + b"\n"
    if how == 3:
        word = rng.choice(
            ("nan", "inf", "-inf", "1979-05-27", "1e400", "9" * 5_000, "0x" + "f" * 99)
        )
        return f"{rng.choice(('macs', 'max_drop', 'resize', 'mean', 'model'))} = {word}\n".encode()
    tree = mutate_tree(rng, CONFIGURATION, plain=True)
    try:
        return tomli_w.dumps(tree).encode("utf-8", "surrogatepass")
    except (TypeError, AttributeError, ValueError, RecursionError):
        return repr(tree).encode("utf-8", "surrogatepass")


def crafted_json(rng: random.Random, data: bytes) -> bytes:
    """Change JSON as a tree."""
    try:
        tree = json.loads(data)
    except ValueError:
        return data
    return to_json(_record_sealed_anew(mutate_tree(rng, tree), rng), rng)


def hostile_pickle(rng: random.Random, _: bytes) -> bytes:
    """Return bare pickles, which are no checkpoints."""
    return rng.choice(
        (
            pickle.dumps({"a": 1}, 4),
            _nested_tuple(100_000),
            b"\x80\x02" + b"(" * 100_000,
            b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
            b"\x80\x02X\xff\xff\xff\x7fabc.",
            b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
            b"\x80\x02r\xff\xff\xff\x7f.",
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\xff\xff\xff\xff\xff\x00\x85R.",
        )
    )
