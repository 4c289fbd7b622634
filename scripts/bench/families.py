"""Which networks work: one of every family of timm and torchvision, through ``compress run``.

    python scripts/bench/families.py survey --log families.jsonl   # resumes where it stopped
    python scripts/bench/families.py table --log families.jsonl    # the table of docs/networks.md

A family is a file of the library that defines networks, or the file with the first word of their
names (``--words``). A small network of it is built with random weights, its BatchNorms get the
statistics of random pictures, and it is compressed to 0.8 of its MACs at the smallest input size
that it takes. Each network has a process of its own with a time limit, so that a crash becomes a
row. timm has to be installed for its rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from compress.commands.group import cli
from compress.libraries.record import require, without_memory
from compress.vision.torchvision import load_torchvision

HERE = Path(__file__).resolve()
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 384)
IMAGES = 16
# Families of timm that are neither convolutional nor hybrids: what they compute with beyond the
# first cut into patches is attention or matrix products alone.
NO_CONVOLUTIONS = frozenset((
    "beit", "cait", "convit", "crossvit", "deepseek_vit", "deit", "eva", "gemma4_vit", "hiera",
    "hieradet_sam2", "mlp_mixer", "naflexvit", "qwen3_vit", "swin_transformer",
    "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "vision_transformer",
    "vision_transformer_relpos", "vision_transformer_sam",
))  # fmt: skip
# Small networks of families that have many: looking for the smallest would take long.
SMALL = frozenset((
    "lambda_resnet26t", "repvgg_a0", "coat_lite_tiny", "convmixer_768_32", "convnext_atto",
    "cpubone_nano", "csatv2", "cspresnet50", "cspnext_tiny", "davit_tiny", "densenet121",
    "dla46_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_lite0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "hardcorenas_a",
    "hgnetv2_b0", "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2",
    "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0",
    "mambaout_femto", "coatnet_pico_rw_224", "poolformer_s12", "lcnet_035", "mobilenetv5_base",
    "mobilevit_xxs", "mvitv2_tiny", "nasnetalarge", "nest_tiny", "nextvit_small", "nf_resnet26",
    "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050",
    "repvit_m0_9", "res2net50_48w_2s", "resnest14d", "resnet10t", "resnetv2_18", "rexnetr_100",
    "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050",
    "swiftformer_xs", "tiny_vit_5m_224", "tresnet_m", "twins_svt_small", "vgg11_bn",
    "visformer_tiny", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim_dw", "legacy_xception", "xception41", "xcit_nano_12_p16_224",
    "regnet_y_400mf",
))  # fmt: skip
# Detectors by backbone: those of a line have the same one, of which the first is measured.
DETECTION = (
    ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn"),
    ("fasterrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"),
    ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"),
    ("fcos_resnet50_fpn", "retinanet_resnet50_fpn"),
    ("retinanet_resnet50_fpn_v2",),
    ("ssd300_vgg16",),
    ("ssdlite320_mobilenet_v3_large",),
)  # fmt: skip


@dataclass
class Row:
    """What became of one network. ``reachable`` is the smallest fraction where 0.8 is not."""

    group: str
    family: str
    network: str
    size: int = 0
    code: int | None = None
    path: str = ""
    refitted: bool = False
    macs: int = 0
    torch_macs: int = 0
    share: float = 0.0
    budget: float = 0.8
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    problem: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether it is as it must be."""
        return self.code == 0 and self.refitted and self.macs == self.torch_macs > 0


def network(name: str) -> nn.Module:
    """Build a segmentation network or a detector's backbone of torchvision.

    Args:
        name: Such as ``"detection.ssd300_vgg16"`` or ``"segmentation.fcn_resnet50"``.
    """
    torchvision, _ = load_torchvision()
    kind, _, bare = name.partition(".")
    build = getattr(getattr(torchvision.models, kind), bare)
    made: nn.Module = build(weights=None, weights_backbone=None)
    backbone = getattr(made, "backbone", made) if kind == "detection" else made
    assert isinstance(backbone, nn.Module)
    return backbone


def spec_of(group: str, name: str) -> str:
    """The model spec of a network."""
    if group in ("segmentation", "detection"):
        return f"{HERE}:network?name={group}.{name}"
    return f"{'timm' if group == 'timm' else 'torchvision'}:{name}"


def build(group: str, name: str) -> nn.Module:
    """The network itself, with random weights."""
    if group in ("segmentation", "detection"):
        return network(f"{group}.{name}")
    if group == "timm":
        made: nn.Module = require("timm", "timm", "Models of timm:").create_model(
            name, pretrained=False
        )
        return made
    torchvision, _ = load_torchvision()
    given = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    built: nn.Module = torchvision.models.get_model(name, weights=None, **given)
    return built


# --- Which networks ----------------------------------------------------------------------------


def listed(group: str, *, words: bool) -> dict[str, list[str]]:
    """The names of a group's networks by family."""
    if group == "segmentation":
        torchvision, _ = load_torchvision()
        names = torchvision.models.list_models(module=torchvision.models.segmentation)
        return {name: [name] for name in names}
    if group == "detection":
        return {", ".join(names): [names[0]] for names in DETECTION}
    found: dict[str, list[str]] = {}
    for family, name in _of_timm() if group == "timm" else _of_torchvision():
        if not name.startswith("test_"):
            word = re.match(r"(?:tf_|legacy_|dm_)?[a-z]+", name)
            key = f"{family}/{word[0] if word else name}" if words else family
            found.setdefault(key, []).append(name)
    return found


def _of_timm() -> Iterator[tuple[str, str]]:
    timm = require("timm", "timm", "Models of timm:")
    for family in sorted(timm.list_modules()):
        for name in timm.list_models(module=family):
            yield family, name


def _of_torchvision() -> Iterator[tuple[str, str]]:
    torchvision, _ = load_torchvision()
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        yield builder.__module__.rpartition(".")[2], name


def smallest(group: str, names: Iterable[str]) -> str:
    """The network of fewest parameters, as far as they can be built without memory."""
    names, sizes = list(names), {}
    names = [name for name in names if name in SMALL] or names
    for name in names:
        # A network that needs values while it is built is not comparable; another is chosen.
        with contextlib.suppress(Exception), without_memory():
            sizes[name] = sum(p.numel() for p in build(group, name).parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else names[0]


# --- One network -------------------------------------------------------------------------------


def pictures(size: int) -> Tensor:
    """Random pictures ``[N, 3, size, size]`` of large and small patches, as bytes."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(IMAGES, 3, size, size)
    for side in (4, 16, size):
        patches = torch.randn(IMAGES, 3, side, side, generator=generator)
        total += nn.functional.interpolate(patches, size=(size, size), mode="bilinear")
    return ((total / total.std() * 0.25 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def as_if_trained(model: nn.Module, size: int) -> None:
    """Give BatchNorms the statistics of pictures, and scales that start at zero another value."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.momentum = None  # the mean of all that follow
            if module.weight is not None and not module.weight.any():
                nn.init.ones_(module.weight)
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()
    with torch.no_grad():
        model((pictures(size).float() / 255 - 0.45) / 0.23)
    model.eval()


def smallest_size(model: nn.Module) -> int:
    """The side of the smallest square input that a network takes."""
    problem: Exception | None = None
    for size in SIZES:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            problem = error
        else:
            return size
    raise RuntimeError(f"it takes none of the sizes: {problem}")


def torch_macs(model: nn.Module, size: int) -> int:
    """MACs of one image by torch's counter.

    It knows attention and recurrent layers by their plain operations, and not the fused ones.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.requires_grad_(False)  # the counter fails at some views of parameters
    counter = FlopCounterMode(display=False)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    plain = torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), plain, counter:
        model.eval()(torch.zeros(1, 3, size, size))
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def compress(arguments: list[str]) -> tuple[int, str]:
    """Run the command line; return its exit code and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def commit() -> str:
    """The commit that is measured, with ``-dirty`` where the code is not what it says."""
    command = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measured(row: Row, folder: Path) -> Row:
    """Compress one network and say what became of it."""
    torch.manual_seed(0)
    model = build(row.group, row.network)
    row.size = smallest_size(model)
    as_if_trained(model, row.size)
    row.torch_macs = torch_macs(model, row.size)
    state = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    np.savez(folder / "pictures.npz", images=pictures(row.size).numpy())
    del model, state
    while True:
        arguments = [
            "run", str(folder / "weights.safetensors"),
            "--model", spec_of(row.group, row.network),
            "--data", f"tensors:{folder / 'pictures.npz'}",
            "--resize", str(row.size), "--crop", str(row.size),
            "--macs", str(row.budget), "--calibration-images", str(IMAGES),
            "--no-latency", "--threads", "1",
            "--output", str(folder / "result"), "--force",
        ]  # fmt: skip
        row.code, said = compress(arguments)
        reachable = re.search(r"smallest reachable fraction is (0\.\d+)", said)
        if row.code == 0 or reachable is None or row.budget > 0.8:
            break
        row.budget = min(0.99, round(float(reachable[1]) + 0.02, 2))
    row.problem = "" if row.code == 0 else " ".join(said.split())[-1500:]
    if row.code == 0:
        _read(row, json.loads((folder / "result/report.json").read_text()))
    return row


def _read(row: Row, report: dict[str, Any]) -> None:
    result = report["result"]
    row.path, row.problem = result["refit_path"], result["refit_reason"]
    row.refitted = row.path in ("graph", "modules")
    row.macs = result["cost"]["folded"]["macs"]
    seen = (each["dense_macs"] for each in result["layers"] if each["samples"] is not None)
    row.share = sum(seen) / max(1, row.macs)
    row.warnings = result["warnings"]
    row.stages = {name: round(took, 1) for name, took in result["seconds"].items()}


# --- The command -------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Take a network of every family through the command line."""


@main.command()
@click.argument("group")
@click.argument("family")
@click.argument("name")
def one(group: str, family: str, name: str) -> None:
    """Measure one network and print its row as JSON."""
    start = time.perf_counter()
    row = Row(group, family, name, commit=commit())
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = measured(row, Path(folder))
        except Exception as error:  # whatever a network does becomes its row
            row.problem = f"{type(error).__name__}: {error}"[:1500]
    row.seconds = round(time.perf_counter() - start, 1)
    row.cpu_seconds = round(time.process_time(), 1)
    print(json.dumps(asdict(row)))


def apart(row: Row, limit: int) -> Row:
    """Measure one network in a process of its own."""
    command = [sys.executable, str(HERE), "one", row.group, row.family, row.network]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        row.problem, row.seconds = f"not done after {limit} s", float(limit)
        row.commit = commit()
        return row
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith("{"):
            return Row(**json.loads(line))
    row.problem = f"ended with {ended.returncode}: {' '.join(ended.stderr.split())[-500:]}"
    return row


def read_log(path: Path) -> dict[tuple[str, str], Row]:
    """The rows that are there, the last of each family."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.group, row.family): row for row in rows}


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Rows as JSON lines.")
@click.option("--groups", default="torchvision,segmentation,detection,timm")
@click.option("--limit", default=300, help="Seconds for a network.")
@click.option("--words", is_flag=True, help="Also tell families apart by the names' first words.")
@click.option("--transformers", is_flag=True, help="Also those of timm without convolutions.")
@click.option("--again", is_flag=True, help="Repeat what failed.")
@click.option("--only", default="", help="Families, with commas; all without it.")
def survey(log: Path, groups: str, only: str, **options: Any) -> None:
    """Measure every family that the log does not have yet."""
    done = read_log(log)
    for group in groups.split(","):
        for family, names in listed(group, words=options["words"]).items():
            bare = family.partition("/")[0]
            known = done.get((group, family))
            skipped = (
                (known is not None and (known.works or not options["again"]))
                or (bare in NO_CONVOLUTIONS and not options["transformers"])
                or (only and family not in only.split(","))
            )
            if skipped:
                continue
            name = known.network if known else smallest(group, names)
            row = apart(Row(group, family, name), options["limit"])
            with log.open("a") as file:
                print(json.dumps(asdict(row)), file=file)
            said = "works" if row.works else f"exit {row.code} {row.path} {row.problem[:300]}"
            print(f"{group} {family} {name} {row.seconds:.0f} s: {said}", flush=True)


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True)
def table(log: Path) -> None:
    """Print the table of families in Markdown."""
    rows = read_log(log).values()
    titles: dict[str, Callable[[Row], bool]] = {
        "torchvision, classification": lambda r: r.group == "torchvision",
        "torchvision, segmentation": lambda r: r.group == "segmentation",
        "torchvision, backbones of detectors": lambda r: r.group == "detection",
        "timm, convolutional and hybrid": lambda r: r.group == "timm" and not _plain(r),
        "timm, transformers and MLPs": lambda r: r.group == "timm" and _plain(r),
    }
    for title, belongs in titles.items():
        chosen = [row for row in rows if belongs(row)]
        if chosen:
            at = ", ".join(sorted({r.commit for r in chosen}))
            print(f"### {title}\n")
            print(f"{sum(r.works for r in chosen)} of {len(chosen)} work (commit {at}).\n")
            print("\n".join(_markdown(chosen)) + "\n")


def _plain(row: Row) -> bool:
    return row.family.partition("/")[0] in NO_CONVOLUTIONS


def _markdown(rows: Iterable[Row]) -> Iterator[str]:
    yield "| family | network | input | exit | refit | MACs | torch's | rewritable | s |"
    yield "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for row in rows:
        budget = "" if row.budget == 0.8 else f" (at {row.budget})"
        cells = [
            row.family, row.network, str(row.size), f"{row.code}{budget}", row.path or "none",
            f"{row.macs / 1e6:.1f} M", "equal" if row.macs == row.torch_macs else
            f"{row.torch_macs / 1e6:.1f} M", f"{row.share:.0%}", f"{row.seconds:.0f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
