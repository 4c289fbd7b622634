"""What the main job gives back: its record, its manifest, its result folder."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from compress import __version__
from compress.artefact.manifest import Manifest, Replacement, versions
from compress.config import Role, RunConfig, settings_of
from compress.inputs.checkpoint.reading import listed
from compress.measure.assess import Assessment, Rewritten
from compress.network.baking import copied
from compress.network.baseline import Network
from compress.network.mirror import Mirror, replacements_of
from compress.network.narrowing import Cut
from compress.pipeline.job import Job
from compress.plan import Plan
from compress.report import gate_sentence, judged
from compress.result import Recovery, Result, Versions
from compress.running.finite import not_finite


@dataclass
class Clock:
    """Seconds by stage, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all stages that are finished."""
        return sum(self.seconds.values())

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
        cut: Which of the baseline's channels the compressed network still has; None for all.
    """

    model: nn.Module
    plan: Plan
    result: Result
    manifest: Manifest
    network: Network
    cut: Cut | None = None

    def mirror(self) -> Mirror:
        """Return the dense baseline with every layer that changed as something to be switched.

        With all of them replaced it computes what ``model`` does, up to rounding (where channels
        were taken out, those that went are computed as well, and not read). All is in float32.
        """
        layers = self.result.layers
        names = [layer.name for layer in layers if layer.rewritten or layer.refitted]
        compressed = copied(self.model).float()
        return Mirror(
            self.network.model, replacements_of(self.network, compressed, names, self.cut)
        )

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """One sentence for each gate that failed."""
        return tuple(gate_sentence(g) for g in self.result.gates if not g.passed)


# Settings that are places or decide only speed: equal models must come out as equal bytes.
_UNRECORDED = settings_of(Role.PLACE, Role.SPEED, Role.PERMISSION)
# Settings that name a function, perhaps in a file.
_FUNCTIONS = ("metric_fn", "loss_fn")


def _without_folder(spec: str) -> str:
    """Return ``"file.py:function"`` of ``"path/to/file.py:function"``."""
    file, colon, function = spec.partition(":")
    return f"{PurePath(file).name}{colon}{function}"


@dataclass(frozen=True)
class Record:
    """What is written down about a run.

    Attributes:
        job: What it worked on.
        rewritten: What it made.
        assessed: What was measured about that.
        recovery: How it learned from the original, if it did.
    """

    job: Job
    rewritten: Rewritten
    assessed: Assessment
    recovery: Recovery | None = None

    def manifest(self, result: Result) -> Manifest:
        """Say how the result is rebuilt and where it came from."""
        rewritten = self.rewritten
        manifest = manifest_of(self.job, rewritten.plan, rewritten.final, rewritten.replaced.cut)
        if self.recovery is not None:
            fit = self.job.inputs.split.fit
            recovered = {"data": fit.fingerprint, "seed": self.job.config.seed}
            manifest = replace(manifest, recovered=recovered)
        if result.test is None:
            return manifest
        return replace(manifest, verified=verified_by(result))

    def _other_ways(self) -> tuple[str, ...]:
        """Warn where channels are gone that a way through the forward may need that was not run."""
        cut = self.rewritten.replaced.cut
        unseen = [site.name for site in self.job.network.sites if not site.calls]
        if cut is None or not cut.widths or not unseen:
            return ()
        return (
            "Channels were taken out of the network as calibration ran it. Ways through its "
            f"forward that were not taken, such as one to {listed(unseen)}, may not fit it any "
            "more; use --schemes without narrow and slice where you need them.",
        )

    def result(self, clock: Clock) -> Result:
        """Put everything measured into one record, held to the configuration's limits."""
        job, assessed, plan = self.job, self.assessed, self.rewritten.plan
        inputs, network = job.inputs, job.network
        result = Result(
            versions=current_versions(),
            model=inputs.spec,
            config=job.config.settings(),
            source=inputs.source,
            source_sha256=inputs.sha256,
            model_fingerprint=inputs.sha256,
            data_fingerprint=inputs.split.fit.fingerprint,
            test_fingerprint="" if inputs.test is None else inputs.test.fingerprint,
            dtype=str(inputs.dtype).removeprefix("torch."),
            split=replace(job.split_record(), further_images=self.rewritten.replaced.refit.further),
            calibration_images=len(inputs.split.fit),
            rule=plan.rule,
            value=plan.value,
            metric=plan.metric,
            layers=assessed.layers,
            validation=assessed.validation,
            test=assessed.test,
            cost=self.rewritten.cost,
            warnings=(
                *inputs.warnings,
                *network.warnings,
                *self.rewritten.cost.refused,
                *self._other_ways(),
                *job.unread,
                *assessed.warnings,
            ),
            folded=tuple(pair.norm for pair in network.folded),
            outputs=network.reading.why,
            rank_correlation=assessed.rank_correlation,
            refit_path=self.rewritten.replaced.refit.path,
            refit_reason=self.rewritten.replaced.refit.reason,
            recovery=self.recovery,
            seconds=clock.seconds,
            progressive=assessed.progressive,
        )
        return judged(result, limits_of(job.config))


def verified_by(result: Result) -> dict[str, Any]:
    """What a manifest says of the test set, which there has to be."""
    test = result.test
    assert test is not None
    return {
        "images": test.images, "top1_before": test.top1_before, "top1_after": test.top1_after,
        "agreement": test.agreement, "data": result.test_fingerprint,
    }  # fmt: skip


def _biased(model: nn.Module, name: str) -> bool:
    """Whether a layer by itself has a bias; chains have one anyway."""
    return model.get_submodule(name)._parameters.get("bias") is not None


def manifest_of(job: Job, plan: Plan, final: nn.Module, cut: Cut | None) -> Manifest:
    """Say how a model that nothing has verified yet is rebuilt and where it came from.

    Args:
        job: What was worked on.
        plan: What was done to each layer.
        final: The model as it is saved.
        cut: The channels that were taken out of it.
    """
    fit = job.inputs.split.fit
    sites = {site.name: site for site in job.network.sites}
    return Manifest(
        model=job.inputs.spec,
        source_sha256=job.inputs.sha256,
        dtype=str(job.inputs.dtype).removeprefix("torch."),
        baked=job.network.baked.weights,
        unpacked=job.network.unpacked,
        plain=job.network.baked.layers,
        folded=tuple((pair.layer, pair.norm) for pair in job.network.folded),
        widths=tuple(
            replace(width, biased=_biased(final, width.name))
            for width in (() if cut is None else cut.widths)
        ),
        replacements=tuple(
            Replacement(c.name, sites[c.name].aliases, c.scheme, c.ranks)
            for c in plan.choices
            if c.factored
        ),
        settings={
            k: _without_folder(v) if k in _FUNCTIONS else v
            for k, v in job.config.settings().items()
            if k not in _UNRECORDED
        },
        calibration={"data": fit.fingerprint, "images": len(fit), "seed": job.config.seed},
        not_finite=_not_finite(job, final),
        versions=versions(),
    )


def _not_finite(job: Job, final: nn.Module) -> tuple[str, ...]:
    """Names of what is not finite in a model because it was not in the original."""
    original = set(not_finite(job.network.original.state_dict()))
    return tuple(n for n in not_finite(final.state_dict()) if n in original)


def current_versions() -> Versions:
    """Versions that a result was made with."""
    return Versions(__version__, torch.__version__, platform.python_version())


def limits_of(config: RunConfig) -> dict[str, float]:
    """The limits that a configuration sets."""
    settings = config.settings()
    return {name: settings[name] for name in settings_of(Role.GATE) if name in settings}
