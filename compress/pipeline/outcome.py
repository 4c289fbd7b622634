"""What the main job gives back: its record, its manifest, its result folder."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from compress import __version__
from compress.artefact.manifest import Manifest, Replacement, versions
from compress.calibrate.statistics import Calibration
from compress.config import RunConfig
from compress.inputs.load import Inputs
from compress.measure.assess import Assessment
from compress.network.baseline import Network
from compress.plan import Plan
from compress.report import gate_sentence
from compress.result import CostSummary, Result, Versions


@dataclass
class Clock:
    """Seconds by stage, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Compressed:
    """What the main job gives back.

    Attributes:
        model: The compressed network of plain layers, in the dtype of the source.
        plan: What was done to each layer and why.
        result: Everything measured.
        manifest: How to rebuild the model.
        network: The dense baseline.
    """

    model: nn.Module
    plan: Plan
    result: Result
    manifest: Manifest
    network: Network

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """One sentence for each gate that failed."""
        return tuple(
            gate_sentence(g.name, g.limit, g.value, g.passed, g.where)
            for g in self.result.gates
            if not g.passed
        )


# Settings that are paths or decide only speed: equal models must come out as equal bytes.
_UNRECORDED = {
    "checkpoint", "model", "data", "test", "output", "device", "threads", "batch_size", "workers",
    "calibration", "force", "class_map", "latency_table",
}  # fmt: skip


def make_manifest(
    inputs: Inputs,
    config: RunConfig,
    network: Network,
    plan: Plan,
    calibration: Calibration,
    result: Result,
) -> Manifest:
    """Say how the result is rebuilt and where it came from."""
    settings = dataclasses.asdict(config)
    sites = {site.name: site for site in network.sites}
    test = result.test
    verified = {} if test is None else {
        "images": test.images, "top1_before": test.top1_before, "top1_after": test.top1_after,
        "agreement": test.agreement, "data": result.test_fingerprint,
    }  # fmt: skip
    return Manifest(
        model=inputs.spec,
        source_sha256=inputs.sha256,
        dtype=str(inputs.dtype).removeprefix("torch."),
        unpacked=network.unpacked,
        folded=tuple((pair.layer, pair.norm) for pair in network.folded),
        replacements=tuple(
            Replacement(c.name, sites[c.name].aliases, c.scheme, c.ranks)
            for c in plan.choices
            if c.rewritten
        ),
        settings={k: v for k, v in settings.items() if k not in _UNRECORDED and v is not None},
        calibration={
            "data": calibration.data_fingerprint,
            "images": calibration.images,
            "seed": config.seed,
        },
        verified=verified,
        channels_last=result.cost.memory_format == "channels_last",
        versions=versions(),
    )


def make_result(
    inputs: Inputs,
    config: RunConfig,
    network: Network,
    plan: Plan,
    calibration: Calibration,
    cost: CostSummary,
    assessed: Assessment,
    clock: Clock,
) -> Result:
    """Put everything measured into one record."""
    warnings = [*inputs.warnings, *network.warnings, *calibration.warnings, *assessed.warnings]
    return Result(
        versions=Versions(__version__, torch.__version__, platform.python_version()),
        model=inputs.spec,
        config={k: v for k, v in dataclasses.asdict(config).items() if v is not None},
        source=inputs.source,
        source_sha256=inputs.sha256,
        model_fingerprint=inputs.sha256,
        data_fingerprint=calibration.data_fingerprint,
        test_fingerprint="" if inputs.test is None else inputs.test.fingerprint,
        dtype=str(inputs.dtype).removeprefix("torch."),
        split=inputs.split_record(),
        calibration_images=calibration.images,
        rule=plan.rule,
        value=plan.value,
        metric=plan.metric,
        layers=assessed.layers,
        validation=assessed.validation,
        test=assessed.test,
        cost=cost,
        gates=assessed.gates,
        warnings=tuple(warnings),
        folded=tuple(pair.norm for pair in network.folded),
        rank_correlation=assessed.rank_correlation,
        seconds=clock.seconds,
    )
