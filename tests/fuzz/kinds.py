"""The kinds of file that are fuzzed: how a valid one is made, how it is damaged, who reads it."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import report_examples
import torch
from fuzz import makers
from fuzz.mutate import BYTE_MUTATORS, TEXT_MUTATORS, ByteMutator, mutated
from networks.tiny import tiny
from PIL import Image
from places import NETWORKS

from compress.artefact.manifest import is_artefact, read_manifest, recorded_settings
from compress.artefact.model import load
from compress.artefact.runtime import read_runtime
from compress.calibrate.file import read_calibration
from compress.calibrate.problems import fit_problem
from compress.calibrate.statistics import misfits
from compress.choose.edited import check_plan
from compress.commands.report import _lines as report_lines
from compress.commands.terminal import Terminal
from compress.config import make_config, read_toml
from compress.data import ImageSet, Preprocessing, check_channels, check_labels, open_dataset
from compress.errors import ArtefactError, PlanError, UsageError
from compress.files import RUNTIME_FILE
from compress.inputs.checkpoint import load_into, read_checkpoint
from compress.plan import read_plan
from compress.report import (
    build_sweep_report,
    check_gates,
    compare_with_baseline,
    read_report,
    render_csv,
    render_html,
    render_json,
    render_junit,
    render_markdown,
    with_gates,
)
from compress.report.gates import LIMITS
from compress.rules import RULE_NAMES
from compress.sweep.store import PointStore
from compress.timing.layers import LatencyTable
from compress.trust import require_trusted_model

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: What it is called.
        suffix: How its files end.
        make: Makes valid files.
        read: What the command line reads it with; raises errors of this package, or none.
        crafted: Mutators that know the format.
        mutators: Mutators that do not.
        arguments: A command line that reads it, from the path and a folder of other inputs.
        payload: Where in a valid file a flipped bit can only be seen by a digest, as slices of
            the whole; None where there is no such place.
    """

    name: str
    suffix: str
    make: Callable[[], list[bytes]]
    read: Read
    crafted: Sequence[ByteMutator] = ()
    mutators: tuple[ByteMutator, ...] = BYTE_MUTATORS
    arguments: Callable[[Path, Path], list[str]] | None = None
    payload: Callable[[bytes], range] | None = None

    def valid(self) -> list[bytes]:
        """The valid files, made once."""
        return _valid(self.name)

    def case(self, rng: random.Random) -> bytes:
        """Return one damaged file."""
        data = rng.choice(self.valid())
        if self.crafted and rng.random() < 0.5:
            data = rng.choice(self.crafted)(rng, data)
            return data if rng.random() < 0.8 else mutated(rng, data, self.mutators[:1])
        return mutated(rng, data, self.mutators)


@functools.cache
def _valid(name: str) -> list[bytes]:
    return KINDS[name].make()


# --- Readers -----------------------------------------------------------------------------------


def _checkpoint(path: Path) -> None:
    is_artefact(path)
    load_into(tiny(), read_checkpoint(path))


def _with_shards(path: Path) -> Path:
    for name, data in makers.shards().items():
        path.with_name(name).write_bytes(data)
    return path


def _index(path: Path) -> None:
    _checkpoint(_with_shards(path))


def _use(images: ImageSet) -> None:
    """What commands do with images before and while a network sees them."""
    check_channels(images, 1)
    check_labels(images, 3)
    assert images.fingerprint
    images.stack(range(min(3, len(images))))
    images.raw(0)


IDENTITY = Preprocessing()


def _arrays(path: Path) -> None:
    _use(open_dataset(f"tensors:{path}", IDENTITY))


def _idx(path: Path) -> None:
    labels = path.with_name("labels.idx")
    if not labels.exists():
        labels.write_bytes(makers.idx_labels())
    if path.read_bytes()[3:4] == b"\x01":  # of one axis, as labels are
        good = path.with_name("images.idx")
        good.write_bytes(makers.idx_files()[0])
        _use(open_dataset(f"idx:{good},{path}", IDENTITY))
    else:
        _use(open_dataset(f"idx:{path},{labels}", IDENTITY))


def _picture(path: Path) -> None:
    folder = path.parent / "pictures" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / path.name
    place.write_bytes(path.read_bytes())
    try:
        for preprocessing in (Preprocessing(resize=8, crop=8), Preprocessing(channels=1)):
            images = open_dataset(f"imagefolder:{folder.parent}", preprocessing)
            assert images.fingerprint
            images.stack([0])
            images.raw(0)
    finally:
        place.unlink()


def _plan(path: Path) -> None:
    from compress.commands.plan import _lines

    plan = read_plan(path)
    if plan.model:
        require_trusted_model(plan.model, "The plan", PlanError)
    rule = {plan.rule: plan.value} if plan.rule in RULE_NAMES else {}
    make_config({"model": plan.model, "metric": plan.metric, **rule})
    network = makers.network()
    fitting = check_plan(plan, network.sites, network.channels)
    _shown(json.loads(plan.to_json()), _lines(fitting))


def _shown(plain: object, lines: list[str]) -> None:
    """Print as a command does, both ways, into nothing."""
    for as_json in (False, True):
        Terminal(as_json=as_json).show(plain, lines)


def _report(path: Path) -> None:
    report = read_report(path)
    render_json(report)
    render_html(report)
    render_markdown(report)
    _shown(report, report_lines(report, "somewhere"))
    if report["kind"] in ("run", "several"):
        render_junit(report)
    if report["kind"] == "sweep":
        render_csv(report)
    if report["kind"] != "run":
        return
    judged = with_gates(report, check_gates(report, dict.fromkeys(LIMITS, 0.5)))
    _shown(judged, report_lines(judged, ""))
    for one, other in ((report, _reference()), (_reference(), report)):
        try:
            compared = compare_with_baseline(one, other, allow_mismatch=True)
        except UsageError:
            continue
        render_markdown(compared)
        render_html(compared)
        _shown(compared, report_lines(compared, ""))


@functools.cache
def _reference() -> dict[str, object]:
    return dict(json.loads(makers.reports()[0]))


def _calibration(path: Path) -> None:
    found = read_calibration(path, makers.KEY)
    network = makers.network()
    wrong = misfits(network, found)  # which a job refuses
    for site in network.sites:
        if site.skip is None and site.name not in wrong:
            module = network.model.get_submodule(site.name)
            problem = fit_problem(site, module, found.statistics[site.name])
            assert problem.matrix.ndim == 3


def _latency(path: Path) -> None:
    LatencyTable.read(path).to_json()


def _sweep_state(path: Path) -> None:
    store = PointStore(path.parent, makers.SWEEP_KEY)
    point = json.loads(makers.sweep_points()[0])["point"]
    place = store.path(point["rule"], point["value"])
    place.parent.mkdir(exist_ok=True)
    path.replace(place)
    found = store.read(point["rule"], point["value"])
    if found is not None:
        from compress.commands.sweep import _point

        _shown({}, [_point(found, None)])
        sweep = report_examples.sweep(1)
        report = build_sweep_report(dataclasses.replace(sweep, points=(found,)))
        render_csv(report)
        render_markdown(report)
        render_html(report)
        render_json(report)


def _class_map(path: Path) -> None:
    folder = path.parent / "classes"
    if not folder.exists():
        for name in makers.CLASSES:
            (folder / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / name / "a.png")
    images = open_dataset(f"imagefolder:{folder}", IDENTITY, str(path))
    check_labels(images, 3)


def _toml(path: Path) -> None:
    make_config(read_toml(path)).to_toml()


def _result(path: Path) -> None:
    assert is_artefact(path) in (True, False)
    manifest = read_manifest(path)
    make_config(recorded_settings(manifest))
    if manifest.model:
        require_trusted_model(manifest.model, "The result", ArtefactError)
    model = load(path, model=tiny())
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8, dtype=next(model.parameters()).dtype))


def _runtime(path: Path) -> None:
    place = path.with_name(RUNTIME_FILE)
    path.replace(place)
    found = read_runtime(place)
    _shown({}, [found.problem])
    if found.problem:  # of which a model is loaded all the same, with a warning
        raise ArtefactError(found.problem)


# --- Command lines -----------------------------------------------------------------------------

SPEC = f"{NETWORKS / 'tiny.py'}:tiny"


def _inspect(path: Path, _: Path) -> list[str]:
    return ["inspect", str(path), "--model", SPEC, "--input-shape", "1,8,8"]


def _inspect_index(path: Path, folder: Path) -> list[str]:
    return _inspect(_with_shards(path), folder)


def _evaluate(spec: Callable[[Path], str], path: Path, folder: Path) -> list[str]:
    weights = folder / "weights.safetensors"
    return ["evaluate", str(weights), "--model", SPEC, "--test", spec(path)]


def _job(name: str, path: Path, folder: Path) -> list[str]:
    """A plan on the bench's inputs, with one flag more."""
    weights, train = folder / "weights.safetensors", f"tensors:{folder / 'train.npz'}"
    rule = "--latency" if name == "--latency-table" else "--macs"
    made = ["plan", str(weights), "--model", SPEC, "--data", train, rule, "0.9"]
    return [*made, name, str(path)]


def _apply(path: Path, folder: Path) -> list[str]:
    weights, train = folder / "weights.safetensors", f"tensors:{folder / 'train.npz'}"
    made = ["apply", str(path), "--model", SPEC, "--checkpoint", str(weights), "--data", train]
    return [*made, "--no-refit", "--force", "--output", str(folder / "applied")]


def _show_report(path: Path, folder: Path) -> list[str]:
    return ["report", str(path), "--force", "--output", str(folder / "reported")]


def _verify(path: Path, folder: Path) -> list[str]:
    return ["evaluate", str(path), "--model", SPEC, "--test", f"tensors:{folder / 'test.npz'}"]


def _folder_of(path: Path) -> str:
    place = path.parent / "shown"
    for name in ("a", "b", "c"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "a" / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "b" / "good.png")
    return f"imagefolder:{place}"


def _tensors_of(path: Path) -> str:
    return f"tensors:{path}"


def _pixels(data: bytes) -> range:
    """The second half of a file, which in those that hold tensors is numbers."""
    return range(len(data) * 5 // 8, len(data) * 7 // 8)


def _member(data: bytes) -> range:
    """The content of the largest member of a zip archive, without its last byte.

    What pads members, and the last bits of a deflated one, have no checksum and no meaning.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.compress_size)
    at = largest.header_offset
    names = sum(int.from_bytes(data[at + k : at + k + 2], "little") for k in (26, 28))
    start = at + 30 + names
    return range(start, start + largest.compress_size - 1)


_ALL = (
    Kind("safetensors", ".safetensors", makers.safetensors_files, _checkpoint,
         (makers.crafted_safetensors, makers.renamed_safetensors, makers.extreme_tensors),
         arguments=_inspect),
    Kind("torch-zip", ".pt", partial(makers.torch_files, legacy=False), _checkpoint,
         (partial(makers.crafted_torch, legacy=False),), arguments=_inspect, payload=_member),
    Kind("torch-legacy", ".pth", partial(makers.torch_files, legacy=True), _checkpoint,
         (partial(makers.crafted_torch, legacy=True), makers.hostile_pickle), arguments=_inspect),
    Kind("index", ".json", makers.index_files, _index, (makers.crafted_json, makers.crafted_index),
         TEXT_MUTATORS, _inspect_index),
    Kind("npz", ".npz", makers.npz_files, _arrays, (makers.crafted_npz,),
         arguments=partial(_evaluate, _tensors_of), payload=_member),
    Kind("arrays", ".safetensors", makers.array_safetensors_files, _arrays,
         (makers.crafted_safetensors, makers.extreme_tensors),
         arguments=partial(_evaluate, _tensors_of)),
    Kind("idx", ".gz", makers.idx_files, _idx, (makers.crafted_idx,),
         arguments=partial(_evaluate, lambda path: f"idx:{path}")),
    Kind("picture", ".png", makers.pictures, _picture, (makers.crafted_picture,),
         arguments=partial(_evaluate, _folder_of)),
    Kind("plan", ".json", makers.plans, _plan, (makers.crafted_json,) * 2, TEXT_MUTATORS, _apply),
    Kind("report", ".json", makers.reports, _report, (makers.crafted_json,) * 2, TEXT_MUTATORS,
         _show_report),
    Kind("calibration", ".safetensors", makers.calibrations, _calibration,
         (makers.crafted_safetensors, makers.extreme_tensors),
         arguments=partial(_job, "--calibration"), payload=_pixels),
    Kind("latency", ".json", makers.latency_tables, _latency, (makers.crafted_json,) * 2,
         TEXT_MUTATORS, partial(_job, "--latency-table"), payload=_pixels),
    Kind("sweep", ".json", makers.sweep_points, _sweep_state, (makers.crafted_json,) * 2,
         TEXT_MUTATORS, payload=_pixels),
    Kind("class-map", ".txt", makers.class_maps, _class_map, (makers.crafted_class_map,),
         TEXT_MUTATORS),
    Kind("toml", ".toml", makers.configurations, _toml, (makers.crafted_toml,) * 2, TEXT_MUTATORS,
         partial(_job, "--config")),
    Kind("result", ".safetensors", makers.results, _result,
         (makers.crafted_safetensors,) * 2 + (makers.extreme_tensors,), arguments=_verify,
         payload=_pixels),
    Kind("runtime", ".json", makers.runtimes, _runtime, (makers.crafted_json,), TEXT_MUTATORS),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _ALL}

# Kinds that carry a digest or a checksum: a flipped bit in what they hold must be refused.
DIGESTED = frozenset(("torch-zip", "npz", "calibration", "latency", "sweep", "result"))
