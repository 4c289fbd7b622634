"""From a finished network to a file that a runtime loads, checked before it is left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artefact.manifest import is_artefact, read_manifest, versions
from compress.config import TORCH, RunConfig
from compress.data import ImageSet, Loader, Preprocessing, draw, in_whole_batches
from compress.data.held import hold
from compress.deploy.compiled import require_compiler
from compress.deploy.equalise import equalised
from compress.deploy.file import COMPILED, ExportedFile, Form, make_file
from compress.errors import ArtefactError, ConfigError
from compress.files import EXPORT_FILES, check_apart, check_file, write_atomically
from compress.inputs.checkpoint.reading import ARTEFACT_KEY
from compress.inputs.functions import metric_function
from compress.inputs.load import (
    batch_size_for,
    image_folders,
    input_paths,
    load_model,
    open_images,
    source_sha256,
)
from compress.measure.accuracy import Yardstick, require_labels
from compress.measure.by_task import require_targets
from compress.measure.outputs import Comparison, result_of, results
from compress.measure.speed import most_seconds
from compress.network.baseline import prepare
from compress.pipeline.evaluate import Finished, finished
from compress.pipeline.exported import Exported, Request
from compress.pipeline.int8 import Calibrated, in_eight_bits
from compress.pipeline.parity import compare_outputs, hold_to_limits
from compress.pipeline.verify import with_model
from compress.progress import Track, silent
from compress.result import EndMetric
from compress.running.memory_format import put_in_format
from compress.running.modules import cast
from compress.running.outputs import Reading, read_outputs
from compress.running.structure import batched, concatenated, count, like_weights, placed, shapes
from compress.tasks import TASKS, TaskMeasure, read_for
from compress.timing.runtimes import RuntimeSeconds, time_runtimes

# Images whose outputs are compared. What a runtime computes wrong is wrong on any of them.
CHECKED_IMAGES = 64
# Images for eight bits, a quarter of which judges.
INT8_IMAGES = 256
# The largest difference of an output, relative to its largest value, by what is computed in.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def export_network(config: RunConfig, request: Request, track: Track = silent) -> Exported:
    """Write a finished network as a file that a runtime loads.

    The file is loaded again and compared with the network before it is left behind.

    Args:
        config: ``checkpoint`` names a result or a checkpoint, ``output`` the file, ``data`` or
            ``test`` images; ``test`` is also measured.
        request: What kind of file.
        track: Progress.

    Raises:
        GateError: The file computes something else than the network; it is not left behind.
        CompressError: Something is missing or cannot be used.
    """
    begun = time.perf_counter()
    _check_output(config, request)
    given = _opened(config.replace(device="cpu"), request)
    originals = _original(given) if request.original else {}
    calibrated = None
    module = given.model.module
    if request.int8:
        calibrated = _calibrated(given)
        module = equalised(module, _chains(config), calibrated.inputs)
    in_float = make_file(module, given.batch, request.form, _metadata(given))
    tolerance = request.tolerance or TOLERANCE[given.reference.dtype]
    checked = hold(_checked(given), given.loader, track)
    outputs, alike = compare_outputs(
        given.model.module, in_float, (checked, given.loader), tolerance, given.reading
    )
    made, int8 = in_float, None
    if calibrated is not None:
        made, int8 = in_eight_bits(in_float, calibrated, given.loader, track)
        alike, pair = Comparison(given.reading), (given.model.module, made.network)
        batches = (given.loader.batches(checked) for _ in pair)
        alike.add_all(*(results(*each, "check") for each in zip(pair, batches, strict=True)))
    tested = _tested(given, made, originals, track) if config.test else _Tested()
    times, problems = _timed(given, (in_float, made), originals, time.perf_counter() - begun)
    write_atomically(config.output, made.content)
    return Exported(
        file=config.output,
        target=request.form.target,
        bytes=len(made.content),
        opset=made.onnx.opset if made.onnx else None,
        batch=request.form.batch,
        inputs=made.traced.inputs,
        outputs=outputs,
        images=len(checked),
        tolerance=tolerance,
        agreement=alike.metric().agreement,
        test=tested.test,
        beside_original=tested.beside_original,
        times=times,
        threads=torch.get_num_threads(),
        warnings=(*given.warnings, *tested.warnings, *problems),
        int8=int8,
    )


def export_result(config: RunConfig, track: Track = silent) -> Exported:
    """Export the result of a run into its own folder; see `export_network`.

    Args:
        config: That the run was made with; ``export`` names the kind of file.
        track: Progress.
    """
    folder = Path(config.output)
    request = Request(Form(config.export), original=config.checkpoint)
    made = config.replace(
        checkpoint=config.output,
        output=str(folder / EXPORT_FILES[config.export]),
    )
    return export_network(made, request, track)


@dataclass(frozen=True)
class _Given:
    """What an export begins with.

    Attributes:
        config: The configuration, on the CPU.
        request: What is asked.
        model: The finished network, contiguous.
        preprocessing: How its pictures are prepared.
        images: Those of ``--data``, else of ``--test``.
        loader: How they reach networks.
    """

    config: RunConfig
    request: Request
    model: Finished
    preprocessing: Preprocessing
    images: ImageSet
    loader: Loader

    @property
    def reference(self) -> Tensor:
        """A weight, for the type that is computed in."""
        return next(self.model.module.parameters())

    @property
    def example(self) -> Any:
        """The inputs of one image ``[1, ...]``."""
        return like_weights(batched(self.images[0][0]), self.reference)

    @cached_property
    def reading(self) -> Reading:
        """What the outputs stand for, by the task or by the images that there are."""
        first = self.images.subset(range(min(self.loader.batch_size, len(self.images))))
        inputs, _ = next(iter(self.loader.batches(first)))
        result = result_of(self.model.module, like_weights(inputs, self.reference), "to check")
        targets = [first.target(index) for index in range(count(inputs))]
        if self.config.task in TASKS:
            return read_for(TASKS[self.config.task], result, targets)
        return read_outputs(result, targets)

    @property
    def batch(self) -> Any:
        """The inputs of a batch to trace with: of two images, as torch takes one for a constant."""
        size = self.request.form.batch or 2
        parts = [batched(self.images[index % len(self.images)][0]) for index in range(size)]
        if any(shapes(one) != shapes(parts[0]) for one in parts):
            parts = parts[:1] * size
        return like_weights(concatenated(parts), self.reference)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the network's files."""
        return (self.model.runtime.problem,) if self.model.runtime.problem else ()


@dataclass(frozen=True)
class _Tested:
    """What a test set says: of torch and the file, of the original and the file."""

    test: EndMetric | None = None
    beside_original: EndMetric | None = None
    warnings: tuple[str, ...] = ()


def _opened(config: RunConfig, request: Request) -> _Given:
    model, preprocessing = finished(config, trust_code=request.trust_code)
    put_in_format(model.module, "contiguous")
    images = open_images(config.data or config.test, config, model.module, preprocessing)
    example = batched(images[0][0])
    loader = Loader(request.form.batch or batch_size_for(config, example), config.workers)
    return _Given(config, request, model, preprocessing, images, loader)


def _check_output(config: RunConfig, request: Request) -> None:
    """Refuse what is known to fail before any work."""
    if not config.output:
        raise ConfigError("No output given; pass --output FILE for the exported network.")
    if not (config.data or config.test):
        raise ConfigError(
            "No images given to check the exported network on; pass --data SPEC (or --test SPEC)."
        )
    if request.form.target == COMPILED:
        require_compiler("--to aoti")
    if request.int8 and not config.data:
        raise ConfigError(
            "Eight bits are decided by images, which those of the test set must not be; pass "
            "--data SPEC."
        )
    inputs = [*input_paths(config), *([request.original] if request.original else [])]
    check_apart(config.output, inputs, image_folders(config))
    check_file(config.output, "exported network")
    if Path(config.output).exists() and not config.force:
        raise ArtefactError(
            f"The file {config.output} exists; pass --force to replace it, or another file."
        )


def _checked(given: _Given) -> ImageSet:
    """Images to check on, drawn by the seed; as many as fill batches, where their size is fixed.

    Raises:
        ConfigError: They do not fill one batch.
    """
    images, size = given.images, given.request.form.batch or 1
    if len(images) < size:
        raise ConfigError(
            f"--fixed-batch {size} needs {size} images to check the exported network on, and "
            f"there are {len(images)}."
        )
    drawn = draw(len(images), max(CHECKED_IMAGES, size), given.config.seed)
    return in_whole_batches(images.subset(drawn.fit + drawn.validation), given.request.form.batch)


def _calibrated(given: _Given) -> Calibrated:
    """Images for eight bits, drawn as a run draws them."""
    images, config = given.images, given.config
    count = min(config.calibration_images, INT8_IMAGES)
    drawn = draw(len(images), count, config.seed)
    batch = given.request.form.batch
    calibrate, judge = (
        in_whole_batches(images.subset(part), batch) for part in (drawn.fit, drawn.validation)
    )
    return Calibrated.of(calibrate, judge, given.loader, (given.reference, given.reading))


def _chains(config: RunConfig) -> list[str]:
    """The chains of layers in a result; a plain checkpoint has none that are known."""
    if not is_artefact(config.checkpoint):
        return []
    replacements = read_manifest(config.checkpoint).replacements
    return [found.name for found in replacements]


def _metadata(given: _Given) -> dict[str, str]:
    """What the file says of itself: the manifest; of a plain checkpoint, where it came from."""
    config = given.config
    if not given.model.compressed:
        source = {"source_sha256": source_sha256(config)}
        return {ARTEFACT_KEY: json.dumps({**source, "versions": versions()}, sort_keys=True)}
    return {ARTEFACT_KEY: read_manifest(config.checkpoint).to_json()}


def _tested(
    given: _Given, made: ExportedFile, originals: Mapping[str, nn.Module], track: Track
) -> _Tested:
    """Measure the file on the test set, and hold it to the limits.

    Raises:
        GateError: A limit is broken.
    """
    config, module = given.config, given.model.module
    images = open_images(config.test, config, module, given.preprocessing)
    metric = metric_function(config)
    if isinstance(metric, TaskMeasure):
        require_targets(metric.task, images)
    elif metric is None:
        require_labels(images)
    warnings = []
    if given.request.int8 and images.fingerprint == given.images.fingerprint:
        warnings.append(
            "The test images are those that decided about eight bits, so that they say nothing "
            "about unseen ones."
        )
    whole = in_whole_batches(images, given.request.form.batch)
    if len(whole) < len(images):
        left = len(images) - len(whole)
        warnings.append(f"{left} test images fill no batch, and are left out.")
    yardstick = Yardstick(given.loader, metric, track)
    test = yardstick.compare(module, made.network, whole)
    beside = yardstick.compare(originals[TORCH], made.network, whole) if originals else None
    hold_to_limits(beside or test, config)
    return _Tested(test, beside, tuple(warnings))


def _original(given: _Given) -> dict[str, nn.Module]:
    """The original on all runtimes; in torch with its norms folded, which is no compression.

    Raises:
        ArtefactError: It is not the one that the result was made from.
        ConfigError: What is exported is no result.
    """
    config, request = given.config, given.request
    if not given.model.compressed:
        raise ConfigError(
            "--original is what a result was made from, and a plain checkpoint is exported here; "
            "leave it out."
        )
    manifest = read_manifest(config.checkpoint)
    asked = config.replace(checkpoint=request.original)
    found = with_model(asked, manifest, ("model",), trust_code=request.trust_code)
    model, _, dtype, _ = load_model(found)
    example = placed(given.example, "cpu", dtype=torch.float32)
    model = cast(prepare(model, example).model, dtype)
    networks, _ = make_file(model, given.batch, request.form, {}).on_runtimes()
    return {TORCH: model, **networks}


def _timed(
    given: _Given,
    files: tuple[ExportedFile, ExportedFile],
    originals: Mapping[str, nn.Module],
    so_far: float,
) -> tuple[tuple[RuntimeSeconds, ...], tuple[str, ...]]:
    """Time torch, the file in float and the file as it is; also say what cannot be timed."""
    if given.config.no_latency:
        return (), ()
    in_float, made = files
    networks, problems = in_float.on_runtimes()
    beside = dict(originals)
    if made is not in_float:
        fewer, more = made.on_runtimes()
        problems += more
        for name, network in fewer.items():
            networks[f"{name}, int8"] = network
            if name in originals:  # beside which eight bits are a saving too
                beside[f"{name}, int8"] = originals[name]
    batch = given.request.form.batch
    times = time_runtimes(
        {TORCH: given.model.module, **networks},
        beside,
        given.example,
        [batch] if batch else sorted({1, given.config.latency_batch}),
        most_seconds(so_far),
    )
    return times, problems
