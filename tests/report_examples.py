"""Synthetic results that hold everything a report can show, names that attack included."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import torch

from compress.measure.paired import compare_logits
from compress.report import build_report, build_sweep_report
from compress.result import (
    Cost,
    CostSummary,
    CustomMetric,
    EndMetric,
    GateResult,
    Latency,
    LayerErrors,
    LayerResult,
    MeasuredError,
    Progressive,
    ProgressivePoint,
    Recovery,
    RecoveryCheck,
    Result,
    SplitRecord,
    SweepPoint,
    SweepResult,
    Versions,
)

ATTACK = '</script><img src=x onerror="window.attacked=1"><b>horse</b>|`'
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", ATTACK, "ship", "truck",
)  # fmt: skip
VERSIONS = Versions(compress="0.1.0", torch="2.13.0", python="3.11.9")
_ORIGINAL = Cost(40_813_184, 272_474, 1_101_888)
FOLDED = Cost(40_551_424, 269_722, 1_080_000)


def metric(images: int = 600, noise: float = 1.0, seed: int = 0, missing: int = -1) -> EndMetric:
    """Compare made-up logits of a good network with noisier ones of the same."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 10
    labels[labels == missing] = (missing + 1) % 10
    before = torch.randn(images, 10, generator=generator)
    before[torch.arange(images), labels] += 3.2
    noisier = noise * (0.3 + labels / 9)[:, None]
    after = before + noisier * torch.randn(images, 10, generator=generator)
    names = [f"test/{i:04d}.jpg" for i in range(images)]
    return compare_logits(1.5 * before, 1.5 * after, labels, CLASSES, names)


def layer(index: int, name: str, channels: int, rank: int, scheme: str = "output") -> LayerResult:
    """Make one layer up; a rank of 0 keeps it."""
    full, d = channels, channels * 9
    macs = d * full * (1024 * 256 // channels**2)
    error = 0.02 / (1 + rank)
    spectrum = tuple(2.5 * 10 ** (-4.5 * i / full) for i in range(full))
    seconds = 1e-4 * (1 + index % 4)
    if not rank:
        return LayerResult(
            name, "Conv2d", f"{channels}→{channels} 3x3 s1", full_rank=full, break_even=0,
            reason="kept: no rank saves MACs", dense_macs=macs, macs=macs, dense_params=d * full,
            params=d * full, dense_bytes=4 * d * full, bytes=4 * d * full, predicted_loss=0.0,
            eigenvalues=spectrum, eigenvalue_count=full, samples=64 * d,
            samples_per_dimension=64.0, dense_seconds=seconds, seconds=seconds,
        )  # fmt: skip
    share = rank * (d + full) / (d * full)
    return LayerResult(
        name,
        "Conv2d",
        f"{channels}→{channels} 3x3 s1",
        scheme=scheme,
        ranks=(rank, rank + 2) if scheme == "two_sided" else (rank,),
        full_rank=full,
        break_even=d * full // (d + full),
        reason=f"eigenvalues at least 0.001 of the largest: {rank}",
        dense_macs=macs,
        macs=int(macs * share),
        dense_params=d * full,
        params=int(d * full * share),
        dense_bytes=4 * d * full,
        bytes=int(4 * d * full * share),
        predicted_mse=error * 0.4,
        predicted_relative_mse=error,
        predicted_loss=error * 0.3,
        measured_loss=error * 0.3 * (1.2 + 0.5 * (-1) ** index),
        errors=LayerErrors(
            fit_alone=MeasuredError(error * 0.4, error),
            fit_in_place=MeasuredError(error * 0.7, error * 1.7),
            validation_alone=MeasuredError(error * 0.42, error * 1.05),
            validation_in_place=MeasuredError(error * 0.8, error * 1.9),
        ),
        eigenvalues=spectrum,
        eigenvalue_count=full,
        samples=64 * d,
        samples_per_dimension=64.0,
        dense_seconds=seconds,
        seconds=seconds * (0.6 + 0.1 * (index % 5)),
    )


def result(**changes: object) -> Result:
    """Make a whole run up, after ResNet-20's layers."""
    layers = [layer(0, "conv1", 16, 0)]
    schemes = ("output", "spatial", "two_sided", "output", "input", "output")
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            for conv in (1, 2):
                i = len(layers)
                rank = 0 if i == 4 else channels // 2 + (i % 3)
                name = f"layer{stage}.{block}.conv{conv}"
                layers.append(layer(i, name, channels, rank, schemes[i % 6]))
    made = Result(
        versions=VERSIONS,
        model="tests/resnet20.py:resnet20",
        config={"threshold": 0.001, "mean": [0.485, 0.456, 0.406], "keep": []},
        source="resnet20-cifar10.safetensors",
        source_sha256="5f0c" * 16,
        model_fingerprint="a1" * 32,
        data_fingerprint="b2" * 32,
        test_fingerprint="c3" * 32,
        split=SplitRecord(seed=0, fit_images=750, validation_images=250),
        calibration_images=1000,
        rule="threshold",
        value=0.001,
        metric="loss",
        layers=tuple(layers),
        validation=metric(250, seed=1),
        test=metric(),
        cost=CostSummary(
            original=_ORIGINAL,
            folded=FOLDED,
            compressed=Cost(20_310_016, 148_210, 596_000),
            latency=(Latency(8, 0.0123, 0.0099, 0.805, 20), Latency(1, 0.0021, 0.0022, 1.05, 20)),
            threads=2,
        ),
        gates=(GateResult("min_agreement", 0.5, 0.91, True),),
        warnings=("layer3.2.conv2 has 8 samples per dimension; its covariance was shrunk.",),
        folded=("bn1", "layer1.0.bn1"),
        rank_correlation=0.93,
        seconds={"calibrate": 14.2, "plan": 0.31, "rewrite": 0.02, "verify": 9.7},
        progressive=progressive(tuple(layers)),
    )
    return dataclasses.replace(made, **changes)


def recovery() -> Recovery:
    """What the held-out images said of a network that learned from its original."""
    distances = (0.52, 0.47, 0.44, 0.41, 0.43)
    return Recovery(
        images=800, held_out_images=200, steps=400, batch_size=64, rate=0.003,
        augmentation="pasted", start=0.52, best=0.41, best_step=300, before=0.88,
        checks=tuple(RecoveryCheck(100 * i, value) for i, value in enumerate(distances)),
        features=("blocks.0", "blocks"), precision="mixed", seconds={"all": 60.0},
    )  # fmt: skip


def progressive(layers: tuple[LayerResult, ...]) -> Progressive:
    """Make a curve up that falls with every layer, most of all with the fifth."""
    names = ["", *(x.name for x in layers if x.rewritten)]
    values = [0.9 - 0.001 * i - (0.05 if i >= 5 else 0.0) for i in range(len(names))]
    points = tuple(ProgressivePoint(*pair) for pair in zip(names, values, strict=True))
    return Progressive("accuracy", "fraction", set="test", images=600, points=points)


def sweep(count: int = 7) -> SweepResult:
    """Make a sweep of thresholds up."""
    names = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(3) for c in (1, 2)]
    made = []
    for i in range(count):
        ratio = 1 - 0.11 * i
        made.append(
            SweepPoint(
                rule="threshold",
                value=10 ** (-4 + 0.5 * i),
                macs=int(FOLDED.macs * ratio),
                params=int(FOLDED.params * ratio),
                bytes=int(FOLDED.bytes * ratio),
                ratio=ratio,
                ranks={n: (max(2, 16 - 2 * i + j % 3),) for j, n in enumerate(names)},
                schemes=dict.fromkeys(names, "output") | {"conv1": "dense"},
                validation=metric(300, noise=0.15 * 1.5**i, seed=5),
                test=metric(300, noise=0.5, seed=6) if i == 3 else None,
                pareto=i != 1,
                chosen=i == 3,
                seconds=2.5,
            )
        )
    return SweepResult(
        versions=VERSIONS,
        model="tests/resnet20.py:resnet20",
        points=tuple(made),
        source="resnet20-cifar10.safetensors",
        folded_cost=FOLDED,
        pick="drop<=0.5",
        calibration_images=1000,
        calibration_seconds=14.2,
    )


def png(value: int, side: int = 8) -> bytes:
    """Encode a grey gradient as PNG by hand."""
    rows = b"".join(
        b"\0" + bytes((value + 16 * x + 8 * y) % 256 for x in range(side)) for y in range(side)
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def thumbnails(found: EndMetric) -> dict[int, bytes]:
    """Make a picture up for each image that flipped."""
    return {flip.index: png(flip.index % 256) for flip in (*found.to_wrong, *found.to_right)}


def thin(kind: str) -> dict[str, object]:
    """Build reports that lack what an unverified, failed or unusual run lacks."""
    if kind in ("one-point", "empty"):
        return build_sweep_report(sweep(1 if kind == "one-point" else 0))
    if kind == "bare":
        return build_report(Result(versions=VERSIONS, model="torchvision:resnet18"))
    if kind == "custom":
        custom = EndMetric(images=64, custom=CustomMetric("mean IoU", 0.612, 0.604))
        return build_report(result(test=custom, validation=None))
    return build_report(result(test=None, gates=()))
