"""From a finished network to a file that a runtime loads, checked before it is left behind."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artefact.manifest import is_artefact, read_manifest, versions
from compress.config import RunConfig
from compress.data import ImageSet, Loader, draw
from compress.data.held import hold
from compress.deploy.difference import Difference
from compress.deploy.equalise import equalised
from compress.deploy.file import ExportedFile, Form, make_file
from compress.deploy.parting import first_parting
from compress.errors import ArtefactError, ConfigError, DataError, GateError
from compress.files import check_apart, check_file, write_atomically
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
from compress.measure.outputs import Comparison, results
from compress.measure.speed import most_seconds
from compress.network.baseline import prepare
from compress.pipeline.evaluate import Finished, finished
from compress.pipeline.int8 import Calibrated, Int8, in_eight_bits
from compress.pipeline.verify import with_model
from compress.progress import Track, silent
from compress.result import EndMetric
from compress.running.forward import evaluation_mode, run_model
from compress.running.memory_format import put_in_format
from compress.running.structure import batched, concatenated, expanded, like_weights, tensors
from compress.tasks import TaskMeasure
from compress.timing.runtimes import TORCH, RuntimeSeconds, time_runtimes

# Images whose outputs are compared. What a runtime computes wrong is wrong on any of them.
CHECKED_IMAGES = 64
# Images for eight bits, a quarter of which judges.
INT8_IMAGES = 256
# The largest difference of an output, relative to its largest value, by what is computed in.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Request:
    """What is asked of an export beside the configuration.

    Attributes:
        form: The kind of file.
        tolerance: The largest difference of an output, relative to its largest value; None for one
            by the type that is computed in.
        original: The checkpoint that a result was made from, to be timed beside it; ``""`` for
            none.
        int8: Whether the file computes in eight bits.
        trust_code: As `load_result`.
    """

    form: Form
    tolerance: float | None = None
    original: str = ""
    int8: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class OutputCheck:
    """How far one output is from the original's; see `Difference`."""

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what it was checked by.

    Attributes:
        file: Where it is.
        target: ``"onnx"`` or ``"pt2"``.
        bytes: Its size.
        opset: The version of ONNX's operators; None for a program.
        batch: The batch size that it takes; None for any.
        inputs: The names of its inputs.
        outputs: Its outputs in float, compared with those in torch.
        images: On how many images.
        tolerance: What `OutputCheck.largest` may be.
        agreement: The share of the same predictions there, by the file as it is; None without
            predictions.
        test: The end metric in torch (before) and of the file (after); None without a test set.
        beside_original: The same with the original (before); None where none was given.
        times: Of torch, and of all runtimes that are installed and take the file.
        threads: That they computed with.
        warnings: What the user should know.
        int8: What eight bits did; None in float.
    """

    file: str
    target: str
    bytes: int
    opset: int | None
    batch: int | None
    inputs: tuple[str, ...]
    outputs: tuple[OutputCheck, ...]
    images: int
    tolerance: float
    agreement: float | None
    test: EndMetric | None
    beside_original: EndMetric | None
    times: tuple[RuntimeSeconds, ...]
    threads: int
    warnings: tuple[str, ...]
    int8: Int8 | None = None


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
    _check_output(config)
    config = config.replace(device="cpu")
    model, preprocessing = finished(config, trust_code=request.trust_code)
    module = model.module
    put_in_format(module, "contiguous")
    images = open_images(config.data or config.test, config, module, preprocessing)
    reference = next(module.parameters())
    example = like_weights(batched(images[0][0]), reference)
    loader = Loader(request.form.batch or batch_size_for(config, example), config.workers)
    checked = hold(_checked(images, config, request.form.batch), loader, track)
    traced_with = _example(checked, reference, request)
    for_int8 = (
        _for_int8(images, config, request.form.batch, loader, reference) if request.int8 else None
    )
    shaped = module if for_int8 is None else equalised(module, _chains(config), for_int8.inputs)
    made = make_file(shaped, traced_with, request.form, _metadata(config, model))
    tolerance = request.tolerance or TOLERANCE[reference.dtype]
    outputs = _compared(module, made, checked, loader, tolerance)
    in_float, int8 = made, None
    if for_int8 is not None:
        made, int8 = in_eight_bits(made, for_int8, loader, track)
    alike = Comparison(None)
    alike.add_all(*(results(n, loader.batches(checked), "check") for n in (module, made.network)))
    originals = _original(config, request, example) if request.original else {}
    warnings = [model.runtime.problem] if model.runtime.problem else []
    test = beside = None
    if config.test:
        tested = open_images(config.test, config, module, preprocessing)
        test_set = _in_whole_batches(tested, request.form.batch)
        if len(test_set) < len(tested):
            warnings.append(
                f"{len(tested) - len(test_set)} test images fill no batch, and are left out."
            )
        yardstick = Yardstick(loader, metric_function(config), track)
        test = _tested(module, made.network, test_set, yardstick)
        if originals:
            beside = yardstick.compare(originals[TORCH], made.network, test_set)
        _hold_to_limits(beside or test, config)
    times: tuple[RuntimeSeconds, ...] = ()
    if not config.no_latency:
        networks, problems = in_float.on_runtimes()
        warnings += problems
        if int8 is not None:
            fewer, problems = made.on_runtimes()
            warnings += problems
            for name, network in fewer.items():
                networks[f"{name}, int8"] = network
                if name in originals:  # beside which eight bits are a saving too
                    originals[f"{name}, int8"] = originals[name]
        times = time_runtimes(
            {TORCH: module, **networks},
            originals,
            example,
            [made.traced.batch] if made.traced.batch else sorted({1, config.latency_batch}),
            most_seconds(time.perf_counter() - begun),
        )
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
        test=test,
        beside_original=beside,
        times=times,
        threads=torch.get_num_threads(),
        warnings=tuple(warnings),
        int8=int8,
    )


def _check_output(config: RunConfig) -> None:
    """Refuse what is known to fail before any work."""
    if not config.output:
        raise ConfigError("No output given; pass --output FILE for the exported network.")
    if not (config.data or config.test):
        raise ConfigError(
            "No images given to check the exported network on; pass --data SPEC (or --test SPEC)."
        )
    check_apart(config.output, input_paths(config), image_folders(config))
    check_file(config.output, "exported network")
    if Path(config.output).exists() and not config.force:
        raise ArtefactError(
            f"The file {config.output} exists; pass --force to replace it, or another file."
        )


def _checked(images: ImageSet, config: RunConfig, batch: int | None) -> ImageSet:
    """Images to check on, drawn by the seed; as many as fill batches, where their size is fixed.

    Raises:
        ConfigError: They do not fill one batch.
    """
    size = batch or 1
    if len(images) < size:
        raise ConfigError(
            f"--fixed-batch {size} needs {size} images to check the exported network on, and "
            f"there are {len(images)}."
        )
    fit, validation, _ = draw(len(images), max(CHECKED_IMAGES, size), config.seed)
    return _in_whole_batches(images.subset([*fit, *validation]), batch)


def _in_whole_batches(images: ImageSet, batch: int | None) -> ImageSet:
    """All images, or those that fill batches of a fixed size."""
    return images if batch is None else images.subset(range(len(images) // batch * batch))


def _for_int8(
    images: ImageSet, config: RunConfig, batch: int | None, loader: Loader, reference: Tensor
) -> Calibrated:
    """Inputs to calibrate on and other images to judge by, drawn as a run draws them.

    Raises:
        DataError: There are too few.
    """
    count = min(config.calibration_images, INT8_IMAGES)
    fit, validation, _ = draw(len(images), count, config.seed)
    first, second = (_in_whole_batches(images.subset(part), batch) for part in (fit, validation))
    if not len(first) or not len(second):
        raise DataError(
            "Eight bits need a batch of images to calibrate on and another to judge by, and "
            f"{images.source.described} has {len(images)} in all."
        )
    inputs = tuple(like_weights(given, reference) for given, _ in loader.batches(first))
    return Calibrated(inputs, len(first), hold(second, loader))


def _chains(config: RunConfig) -> list[str]:
    """The chains of layers in a result; a plain checkpoint has none that are known."""
    if not is_artefact(config.checkpoint):
        return []
    replacements = read_manifest(config.checkpoint).replacements
    return [found.name for found in replacements]


def _example(images: ImageSet, reference: Tensor, request: Request) -> Any:
    """The inputs of a batch to trace with: of two images, since torch takes one for a constant."""
    size = request.form.batch or 2
    parts = [batched(images[index % len(images)][0]) for index in range(size)]
    return like_weights(concatenated(parts), reference)


def _metadata(config: RunConfig, model: Finished) -> dict[str, str]:
    """What the file says of itself: the manifest, and its main points by themselves."""
    if not model.compressed:
        source = {"source_sha256": source_sha256(config)}
        return {ARTEFACT_KEY: json.dumps({**source, "versions": versions()}, sort_keys=True)}
    return {ARTEFACT_KEY: read_manifest(config.checkpoint).to_json()}


def _compared(
    module: nn.Module, made: ExportedFile, images: ImageSet, loader: Loader, most: float
) -> tuple[OutputCheck, ...]:
    """Compare the outputs of the network and of its file.

    Raises:
        GateError: They differ by more than ``most``.
    """
    reference = next(module.parameters())
    differences = {name: Difference() for name in made.traced.outputs}
    sizes: dict[str, tuple[int, ...]] = {}
    for given, _ in loader.batches(images):
        inputs = like_weights(given, reference)
        before, after = (_outputs(network, inputs) for network in (module, made.network))
        for name, expected, found in zip(made.traced.outputs, before, after, strict=True):
            if expected.shape != found.shape:
                raise GateError(
                    f"The exported network's output {name!r} has shape {tuple(found.shape)} where "
                    f"the network's has {tuple(expected.shape)}, so it was not left behind."
                )
            sizes[name] = tuple(expected.shape[1:])
            differences[name].add(expected, found)
        worst = max(differences, key=lambda name: differences[name].largest)
        if differences[worst].largest > most:
            raise GateError(_parted(worst, differences[worst].largest, made, inputs, most))
    return tuple(
        OutputCheck(name, sizes[name], each.largest, each.mean)
        for name, each in differences.items()
    )


def _outputs(network: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.inference_mode(), evaluation_mode(network):
        return list(tensors(run_model(network, inputs)).values())


def _parted(output: str, largest: float, made: ExportedFile, inputs: Any, most: float) -> str:
    """What differs too much, where that begins, and what to do."""
    where = ""
    if made.onnx is not None:
        first = first_parting(made.onnx, inputs, made.traced.inputs, most)
        where = f" The first value that differs by more is {first}." if first else ""
    return (
        f"The exported network's output {output!r} differs from the network's by {largest:.2g} of "
        f"its largest value, and at most {most:g} is tolerated, so the file was not left behind."
        f"{where} Pass --tolerance X where that is good enough for you."
    )


def _tested(
    module: nn.Module, network: nn.Module, images: ImageSet, yardstick: Yardstick
) -> EndMetric:
    """The end metric in torch and on the runtime."""
    if isinstance(yardstick.metric, TaskMeasure):
        require_targets(yardstick.metric.task, images)
    elif yardstick.metric is None:
        require_labels(images)
    return yardstick.compare(module, network, images)


def _hold_to_limits(found: EndMetric, config: RunConfig) -> None:
    """Refuse a file that loses more than the user allows.

    Raises:
        GateError: It does, or what a limit is about was not measured.
    """
    limits = (
        ("--max-drop", config.max_drop, found.drop, 1),
        ("--min-agreement", config.min_agreement, found.agreement, -1),
    )
    for flag, limit, value, sign in limits:
        if limit is None:
            continue
        if value is None or sign * value > sign * limit:
            measured = "was not measured" if value is None else f"is {value:.4g}"
            what = "drop of the test set's measure" if sign > 0 else "share of equal predictions"
            raise GateError(
                f"The {what} {measured}, and {flag} is {limit:g}, so the file was not left behind."
            )


def _original(config: RunConfig, request: Request, example: Any) -> dict[str, nn.Module]:
    """The original on all runtimes; in torch with its norms folded, which is no compression.

    Raises:
        ArtefactError: It is not the one that the result was made from.
        ConfigError: What is exported is no result.
    """
    if not is_artefact(config.checkpoint):
        raise ConfigError(
            "--original is what a result was made from, and a plain checkpoint is exported here; "
            "leave it out."
        )
    manifest = read_manifest(config.checkpoint)
    asked = config.replace(checkpoint=request.original)
    found = with_model(asked, manifest, ("model",), trust_code=request.trust_code)
    model, _, dtype, _ = load_model(found)
    model = prepare(model, example).model.to(dtype)
    inputs = expanded(like_weights(example, next(model.parameters())), request.form.batch or 2)
    networks, _ = make_file(model, inputs, request.form, {}).on_runtimes()
    return {TORCH: model, **networks}
