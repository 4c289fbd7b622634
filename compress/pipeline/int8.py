"""Which layers of an exported network have eight bits, decided by what that does to its outputs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.data import ImageSet, Loader
from compress.data.held import hold
from compress.deploy.file import ExportedFile
from compress.deploy.int8 import Quantiser
from compress.deploy.runtimes import onnx_session
from compress.errors import DataError
from compress.measure.outputs import Comparison, results
from compress.progress import Track
from compress.running.outputs import Reading
from compress.running.structure import like_weights, tensors

# Layers in float may hold this share of the MACs, which is what they cost in time.
FLOAT_SHARE = 0.1
# More layers stay in float only where that brings the outputs nearer by so much.
WORTH = 0.9
# And only as long as predictions move by more than this, in nats, which changes about one in a
# hundred: every change between eight bits and float costs time.
NEGLIGIBLE = 0.002
METADATA_KEY = "compress.int8"


@dataclass(frozen=True)
class Int8:
    """What became of a network in eight bits.

    Attributes:
        layers: How many layers have weights.
        kept: The names of those that stay in float.
        kept_macs: Their share of the MACs.
        distance: Between the outputs in float and in eight bits, on images that were not
            calibrated on: the mean KL divergence of predictions, or the relative squared error of
            other outputs.
        distance_of_all: The same with all layers in eight bits.
        images: How many images were calibrated on, and how many decided.
    """

    layers: int
    kept: tuple[str, ...]
    kept_macs: float
    distance: float
    distance_of_all: float
    images: tuple[int, int]


@dataclass(frozen=True)
class Calibrated:
    """What decides about eight bits.

    Attributes:
        inputs: Batches that decide the ranges of activations.
        images: How many images these hold.
        judge: Other images, that decide which layers stay in float.
        reading: What the outputs stand for, by which they are judged.
    """

    inputs: tuple[Any, ...]
    images: int
    judge: ImageSet
    reading: Reading

    @classmethod
    def of(
        cls, calibrate: ImageSet, judge: ImageSet, loader: Loader, network: tuple[Tensor, Reading]
    ) -> Calibrated:
        """Read some images to calibrate on, and others to judge by.

        Args:
            calibrate: The former.
            judge: The latter.
            loader: How they reach the network.
            network: A weight of it, and what its outputs stand for.

        Raises:
            DataError: There are none of one of them.
        """
        if not len(calibrate) or not len(judge):
            raise DataError(
                "Eight bits need a batch of images to calibrate on and another to judge by, which "
                f"{calibrate.source.described} does not hold."
            )
        weight, reading = network
        inputs = tuple(like_weights(given, weight) for given, _ in loader.batches(calibrate))
        return cls(inputs, len(calibrate), hold(judge, loader), reading)


def in_eight_bits(
    made: ExportedFile, given: Calibrated, loader: Loader, track: Track
) -> tuple[ExportedFile, Int8]:
    """Quantise an exported network and choose the layers that stay in float.

    Where all layers together move the outputs by more than is negligible, each is quantised alone,
    and its effect on the outputs is measured. Those that lose most for their MACs stay in float: as
    many, doubling, as make the whole network better.

    Args:
        made: An ONNX file in float.
        given: What it is decided by.
        loader: How images reach the network.
        track: Progress.

    Raises:
        ModelError: There is nothing to quantise, or ONNX Runtime cannot.
    """
    reference = next(made.network.parameters())
    names, judge = made.traced.inputs, given.judge
    batches = [dict(zip(names, tensors(inputs).values(), strict=True)) for inputs in given.inputs]
    assert made.onnx is not None
    expected = list(results(made.network, loader.batches(judge), "int8"))

    def network(content: bytes) -> nn.Module:
        return made.traced.on(onnx_session(content), reference)

    def compared(content: bytes) -> Comparison:
        comparison = Comparison(given.reading)
        comparison.add_all(expected, results(network(content), loader.batches(judge), "int8"))
        return comparison

    def distance(content: bytes) -> float:
        return _distance(compared(content))

    with tempfile.TemporaryDirectory() as folder:
        quantiser = Quantiser(made.onnx, batches, Path(folder))
        nodes = list(quantiser.layers)
        content = quantiser.without(())
        everything = compared(content)
        enough = NEGLIGIBLE if everything.ranked else 0.0
        of_all = best = _distance(everything)
        kept: tuple[str, ...] = ()
        if best > enough:
            lost = {n: distance(quantiser.only(n)) for n in track(nodes, "int8 layers", len(nodes))}
            for candidate in _candidates(lost, quantiser.macs):
                tried = quantiser.without(candidate)
                found = distance(tried)
                if found < WORTH * best:
                    kept, content, best = candidate, tried, found
                if best <= enough:
                    break
        layers = tuple(quantiser.layers[node] for node in kept)
        model = quantiser.finished(content, {METADATA_KEY: json.dumps({"float": layers})})
    total = sum(quantiser.macs.values())
    share = sum(quantiser.macs[node] for node in kept) / max(total, 1)
    images = (given.images, len(judge))
    said = Int8(len(nodes), layers, share, best, of_all, images)
    content = model.content()
    return ExportedFile(content, network(content), made.traced, model), said


def _distance(comparison: Comparison) -> float:
    """The mean divergence of predictions, or how far other outputs are apart."""
    if comparison.ranked and comparison.reading is not None:
        return float(comparison.reading.parts[0].divergence(*comparison.logits()).mean())
    found = comparison.metric()
    if found.mean_kl is not None:
        return found.mean_kl
    return sum(output.relative_mse or 0.0 for output in found.outputs)


def _candidates(lost: dict[str, float], macs: dict[str, int]) -> list[tuple[str, ...]]:
    """Layers that could stay in float: the first one, two, four … by loss for their MACs."""
    order = sorted(lost, key=lambda node: lost[node] / max(macs[node], 1), reverse=True)
    most = FLOAT_SHARE * sum(macs.values())
    chosen: list[str] = []
    for node in order:
        if sum(macs[n] for n in (*chosen, node)) <= most:
            chosen.append(node)
    counts = [2**power for power in range(len(chosen).bit_length())]
    return [tuple(chosen[:count]) for count in (*counts, len(chosen)) if chosen]
