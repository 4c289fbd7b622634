"""A whole run and a whole sweep, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compress.result.layers import LayerResult
from compress.result.metrics import EndMetric
from compress.result.progressive import Progressive
from compress.result.recovery import Recovery

RESULT_FORMAT = 1


@dataclass(frozen=True)
class Cost:
    """What a model costs: MACs per image, parameters, bytes of its tensors."""

    macs: int
    params: int
    bytes: int


@dataclass(frozen=True)
class Latency:
    """Median seconds per batch, folded dense original against compressed, runs alternating.

    The dense network runs in whichever memory format suits it at this batch, the result in the one
    that it is saved with. ``runs`` are the rounds that the medians are over. Other runtimes than
    torch choose the layout themselves.
    """

    batch_size: int
    dense_seconds: float
    seconds: float
    ratio: float
    runs: int | None = None
    dense_memory_format: str = "contiguous"
    runtime: str = "torch"


@dataclass(frozen=True)
class CostSummary:
    """The original as it came, with its norms folded (the baseline), and compressed.

    ``memory_format`` is the result's, ``"contiguous"`` or ``"channels_last"``. ``too_slow`` are
    batch sizes that were not timed since one round of them would have taken too long. ``latency``
    is measured on the runtime asked for; ``beside`` holds the times on others, where that is not
    torch, and ``refused`` says which ones do not take the networks.
    """

    original: Cost | None = None
    folded: Cost | None = None
    compressed: Cost | None = None
    latency: tuple[Latency, ...] = ()
    memory_format: str = "contiguous"
    device: str = "cpu"
    threads: int | None = None
    too_slow: tuple[int, ...] = ()
    beside: tuple[Latency, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """One limit and how it went. ``value`` is None where it could not be measured: not passed.

    ``label`` and ``unit`` say what a limit on accuracy limits where another measure decides.
    """

    name: str
    limit: float
    value: float | None
    passed: bool
    where: str = ""
    label: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Versions:
    """What made the result."""

    compress: str
    torch: str
    python: str


@dataclass(frozen=True)
class SplitRecord:
    """Which images served for what, so that a split can be repeated.

    Each of those fitted to also came ``copies`` times changed, in the way that ``augmentation``
    names: ``"mirrored"``, ``"shifted"`` or ``"moved"``, which is both; ``"none"`` without copies.
    The joint refit also learned from ``further_images`` of the same set.
    """

    seed: int
    fit_images: int
    validation_images: int
    fit_indices_sha256: str = ""
    validation_indices_sha256: str = ""
    augmentation: str = "none"
    copies: int = 0
    further_images: int = 0


@dataclass(frozen=True)
class Result:
    """Everything one run has to say. A test metric of None means the run is unverified.

    ``refit_path`` is ``"graph"`` where layers were refitted along the network's graph, then
    jointly; ``"modules"`` where they were by watching them in order of execution; ``"none"`` where
    they were not; and empty where that is not known. ``refit_reason`` says why not along the graph.
    """

    versions: Versions
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    source_sha256: str = ""
    model_fingerprint: str = ""
    data_fingerprint: str = ""
    test_fingerprint: str = ""
    dtype: str = "float32"
    split: SplitRecord | None = None
    calibration_images: int = 0
    rule: str = ""
    value: float | None = None
    metric: str = ""
    layers: tuple[LayerResult, ...] = ()
    validation: EndMetric | None = None
    test: EndMetric | None = None
    cost: CostSummary = CostSummary()
    gates: tuple[GateResult, ...] = ()
    warnings: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    outputs: str = ""
    rank_correlation: float | None = None
    refit_path: str = ""
    refit_reason: str = ""
    recovery: Recovery | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    progressive: Progressive | None = None
    format: int = RESULT_FORMAT


@dataclass(frozen=True)
class Deployed:
    """A network of a sweep as an ONNX file, and what a runtime makes of it.

    ``bytes`` are the file's. ``seconds`` are those of a batch, and ``ratio`` is that over the time
    of the dense network in float, taken in turns; None where nothing was timed. ``kept`` names
    the layers that stay in float though others have eight bits. ``by_time`` and ``by_bytes`` say
    that no other file of the sweep costs as little and is better on validation images.
    """

    int8: bool
    bytes: int
    seconds: float | None = None
    ratio: float | None = None
    kept: tuple[str, ...] = ()
    validation: EndMetric | None = None
    test: EndMetric | None = None
    by_time: bool = False
    by_bytes: bool = False


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep; ``ratio`` is its MACs over those of the folded original.

    ``ranks`` are those of every layer that is rewritten, ``widths`` the inputs and outputs of every
    layer that channels are taken out of.
    """

    rule: str
    value: float
    macs: int
    params: int
    bytes: int
    ratio: float
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)
    validation: EndMetric | None = None
    test: EndMetric | None = None
    pareto: bool = False
    chosen: bool = False
    seconds: float | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    deployed: tuple[Deployed, ...] = ()


@dataclass(frozen=True)
class SweepResult:
    """A grid of settings on one calibration, in the order given.

    ``deployed`` are the dense network's files, where the points have some too: for the runtime
    ``deployed_on``, timed at ``deployed_batch``.
    """

    versions: Versions
    model: str
    points: tuple[SweepPoint, ...]
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    source_sha256: str = ""
    model_fingerprint: str = ""
    data_fingerprint: str = ""
    test_fingerprint: str = ""
    folded_cost: Cost | None = None
    layers: tuple[str, ...] = ()
    pick: str = ""
    calibration_images: int = 0
    calibration_seconds: float | None = None
    warnings: tuple[str, ...] = ()
    deployed: tuple[Deployed, ...] = ()
    deployed_on: str = ""
    deployed_batch: int | None = None
    format: int = RESULT_FORMAT
