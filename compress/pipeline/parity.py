"""Whether an exported file computes what the network does, and loses no more than is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.config import RunConfig
from compress.data import ImageSet, Loader
from compress.deploy.difference import Difference
from compress.deploy.file import ExportedFile
from compress.deploy.parting import first_parting
from compress.errors import GateError
from compress.measure.outputs import Comparison, result_of
from compress.result import EndMetric
from compress.running.outputs import Reading
from compress.running.structure import like_weights, tensors


@dataclass(frozen=True)
class OutputCheck:
    """How far one output is from the original's; see `Difference`."""

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float


def compare_outputs(
    module: nn.Module,
    made: ExportedFile,
    given: tuple[ImageSet, Loader],
    most: float,
    reading: Reading | None = None,
) -> tuple[tuple[OutputCheck, ...], Comparison]:
    """Compare the outputs of a network and of its file, as numbers and as predictions.

    Args:
        module: The network.
        made: Its file.
        given: Images, and how they reach both.
        most: How far outputs may be apart, in parts of the largest number.
        reading: What the outputs stand for; by default what the first look like.

    Raises:
        GateError: They differ by more than ``most``.
    """
    images, loader = given
    reference, alike = next(module.parameters()), Comparison(reading)
    differences = {name: Difference() for name in made.traced.outputs}
    sizes: dict[str, tuple[int, ...]] = {}
    for given, _ in loader.batches(images):
        inputs = like_weights(given, reference)
        before, after = (result_of(each, inputs, "to check") for each in (module, made.network))
        pairs = zip(tensors(before).values(), tensors(after).values(), strict=True)
        for name, (expected, found) in zip(made.traced.outputs, pairs, strict=True):
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
        alike.add(before, after)
    checks = (OutputCheck(n, sizes[n], each.largest, each.mean) for n, each in differences.items())
    return tuple(checks), alike


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


def hold_to_limits(found: EndMetric, config: RunConfig) -> None:
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
