"""What the networks of a sweep come to as files on a runtime, in float and in eight bits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import RunConfig
from compress.data import ImageSet
from compress.deploy.equalise import equalised
from compress.deploy.file import ONNX, ExportedFile, Form, make_file
from compress.errors import ConfigError, DataError, GateError, ModelError
from compress.measure.quality import quality, unbeaten
from compress.pipeline.export import CHECKED_IMAGES, INT8_IMAGES, TOLERANCE
from compress.pipeline.int8 import Calibrated, in_eight_bits
from compress.pipeline.job import Job
from compress.pipeline.parity import compare_outputs
from compress.result import Deployed, EndMetric, SweepPoint
from compress.running.memory_format import in_memory_format
from compress.running.modules import cast, dtype_of
from compress.running.structure import expanded, like_weights
from compress.sweep.evaluate import Judge
from compress.timing.networks import time_network
from compress.timing.turns import Pace

# The runtime that a sweep turns to where none that loads files is asked for.
DEFAULT_RUNTIME = "onnxruntime"
# How long the networks of one point may be timed.
TIMED = Pace(rounds=15, most_seconds=20.0)


def runtime_of(config: RunConfig) -> str:
    """The runtime that files are timed on.

    Raises:
        ConfigError: Networks are not on the CPU.
    """
    if config.device != "cpu":
        raise ConfigError(
            f"--int8 compares files for the CPU, and --device is {config.device}; leave one of "
            "them out."
        )
    return config.runtime if config.runtime in ("onnxruntime", "openvino") else DEFAULT_RUNTIME


@dataclass(frozen=True)
class _Loaded:
    """A network as files, loaded: in float and in eight bits.

    Attributes:
        files: Both.
        networks: Both on the runtime.
        kept: The layers that stay in float in the second.
    """

    files: tuple[ExportedFile, ExportedFile]
    networks: tuple[nn.Module, nn.Module]
    kept: tuple[str, ...]


class Deployer:
    """Exports, quantises, judges and times the networks of a sweep.

    Args:
        job: The dense network and its images.
        judges: What compares networks with the original, by set of images.
        runtime: The runtime, as `runtime_of`.
    """

    def __init__(self, job: Job, judges: Mapping[str, Judge], runtime: str) -> None:
        self.job, self.judges, self.runtime = job, judges, runtime

    def of_dense(self) -> tuple[Deployed, ...]:
        """Return the dense network's files.

        Raises:
            ModelError: It cannot be exported or quantised, the runtime does not take it, or its
                file computes something else than it does.
        """
        return self._both(self._dense, self._judged(self._dense.networks[0]))

    def of_point(
        self, model: nn.Module, chains: Sequence[str], judged: Mapping[str, EndMetric]
    ) -> tuple[Deployed, ...]:
        """Return a compressed network's files; errors as `of_dense`.

        Args:
            model: The network.
            chains: The names of the layers that chains stand for.
            judged: What it comes to in torch, by set of images.
        """
        return self._both(self._loaded(model, chains), judged)

    def _both(self, loaded: _Loaded, judged: Mapping[str, EndMetric]) -> tuple[Deployed, Deployed]:
        in_float, int8 = loaded.networks
        seconds: dict[str, float] = {}
        if not self.job.config.no_latency:
            dense = self._dense.networks[0]
            networks = {"dense": dense, "int8": int8}
            if in_float is not dense:
                networks["float"] = in_float
            inputs = self._inputs(self.job.config.latency_batch)
            seconds = time_network(networks, inputs, pace=TIMED)
            seconds.setdefault("float", seconds["dense"])
        found = (("float", judged, ()), ("int8", self._judged(int8), loaded.kept))
        made = [
            Deployed(
                int8=name == "int8",
                bytes=len(file.content),
                seconds=seconds.get(name),
                ratio=seconds[name] / seconds["dense"] if seconds else None,
                kept=kept,
                validation=metrics.get("validation"),
                test=metrics.get("test"),
            )
            for file, (name, metrics, kept) in zip(loaded.files, found, strict=True)
        ]
        return made[0], made[1]

    def _judged(self, network: nn.Module) -> dict[str, EndMetric]:
        return {name: judge(network) for name, judge in self.judges.items()}

    @cached_property
    def _dense(self) -> _Loaded:
        model = copy.deepcopy(self.job.network.model)
        return self._loaded(cast(model, self.job.inputs.dtype), ())

    @property
    def _weight(self) -> Tensor:
        """A weight, for the device and the type that files compute in."""
        return torch.empty(0, device=self.job.network.device, dtype=self.job.inputs.dtype)

    def _inputs(self, count: int) -> Any:
        return like_weights(expanded(self.job.network.example, count), self._weight)

    @cached_property
    def _images(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Images to calibrate on, to judge layers by and to check files on: all to be fitted to.

        Validation images stay as unseen as they are without eight bits.
        """
        fit = self.job.inputs.split.fit
        count = min(len(fit), INT8_IMAGES)
        judge = count // 4
        if not judge:
            raise DataError(
                f"--int8 needs at least 4 images to calibrate on, and there are {len(fit)}."
            )
        parts = (
            range(count - judge),
            range(count - judge, count),
            range(min(len(fit), CHECKED_IMAGES)),
        )
        calibrate, judging, checked = (fit.subset(list(part)) for part in parts)
        return calibrate, judging, checked

    @cached_property
    def _calibrated(self) -> Calibrated:
        calibrate, judge, _ = self._images
        reading = self.job.network.reading
        return Calibrated.of(calibrate, judge, self.job.loader, (self._weight, reading))

    def _loaded(self, model: nn.Module, chains: Sequence[str]) -> _Loaded:
        job, calibrated = self.job, self._calibrated
        with in_memory_format(model, "contiguous"):
            plain = equalised(model, chains, calibrated.inputs)
            in_float = make_file(plain, self._inputs(2), Form(ONNX), {})
            tolerance = TOLERANCE[dtype_of(model.parameters())]
            try:
                compare_outputs(model, in_float, (self._images[2], job.loader), tolerance)
            except GateError as error:  # no limit of the sweep's, of which its report would tell
                raise ModelError(str(error)) from error
        int8, said = in_eight_bits(in_float, calibrated, job.loader, job.track)
        files = (in_float, int8)
        first, second = map(self._on_runtime, files)
        return _Loaded(files, (first, second), said.kept)

    def _on_runtime(self, file: ExportedFile) -> nn.Module:
        networks, problems = file.on_runtimes([self.runtime])
        if self.runtime not in networks:
            raise ModelError(" ".join(problems))
        return networks[self.runtime]


def with_fronts(
    dense: Sequence[Deployed], points: Sequence[SweepPoint]
) -> tuple[tuple[Deployed, ...], list[SweepPoint]]:
    """Mark the files that no other one beats: as fast (or as small) and better, or the reverse.

    Args:
        dense: The dense network's files.
        points: Points with theirs.
    """
    every = [*dense, *(each for point in points for each in point.deployed)]
    by_time = _front(every, lambda each: each.ratio)
    by_bytes = _front(every, lambda each: float(each.bytes))

    def marked(found: Sequence[Deployed]) -> tuple[Deployed, ...]:
        return tuple(
            dataclasses.replace(each, by_time=id(each) in by_time, by_bytes=id(each) in by_bytes)
            for each in found
        )

    return marked(dense), [
        dataclasses.replace(point, deployed=marked(point.deployed)) for point in points
    ]


def _front(every: Sequence[Deployed], cost: Callable[[Deployed], float | None]) -> set[int]:
    """The identities of those that are on the front of a cost and quality on validation images."""
    known = [(each, cost(each)) for each in every]
    rated = [(each, spent) for each, spent in known if spent is not None]
    front = unbeaten([(spent, quality(each.validation)) for each, spent in rated])
    return {id(each) for (each, _), best in zip(rated, front, strict=True) if best}
