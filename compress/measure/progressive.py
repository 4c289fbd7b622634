"""What the network gives after each further layer is replaced, in the order of the forward.

Networks that differ only from some layer on compute the same up to there. Where the network has a
graph, one walk along it therefore serves all prefixes: at each layer that is replaced, what is
known there is taken to the end once through the layers that are not replaced yet, and the walk goes
on through the replacement. For L layers that is about L / 2 forward passes instead of L.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from compress.data import Batches, ImageSet
from compress.fit.lockstep import Lockstep, call_node
from compress.inputs.functions import Metric
from compress.inputs.load import Inputs
from compress.measure.accuracy import Yardstick, custom_value
from compress.measure.by_task import has_targets, some_targets
from compress.measure.outputs import Comparison
from compress.network.baseline import Network
from compress.network.mirror import Mirror, replacements_of
from compress.network.narrowing import Cut
from compress.result import Progressive, ProgressivePoint
from compress.running.forward import evaluation_mode, run_model
from compress.running.outputs import Reading
from compress.running.structure import cloned, like_weights, mapped, rebuilt
from compress.tasks import Measure, Scorer, TaskMeasure

ACCURACY = Measure("accuracy", "fraction")
AGREEMENT = Measure("agreement with the original", "fraction")
ERROR = Measure("relative error of the outputs", lower_is_better=True)

Results = Callable[[Any], Iterator[Any]]


@dataclass(frozen=True)
class Replacing:
    """A rewritten network whose layers are put into the dense one, one after the other.

    Attributes:
        compressed: The rewritten model, in float32.
        names: Its layers that are not those of the dense network.
        cut: Which channels it still has; by default all.
    """

    compressed: nn.Module
    names: tuple[str, ...]
    cut: Cut | None = None


def measure_progressive(
    network: Network, replacing: Replacing, inputs: Inputs, yardstick: Yardstick
) -> Progressive | None:
    """Measure the network after each further layer is replaced.

    Args:
        network: The dense baseline.
        replacing: What it became.
        inputs: The test images are used, or without them the validation images.
        yardstick: What networks are compared by. Where it needs targets that the images lack, it
            is how far the outputs are from those of the dense network.

    Returns:
        The curve; None where no layer was replaced, or there are no images.

    Raises:
        DataError: The targets do not fit the outputs.
        ModelError: The forward fails.
    """
    which = "validation" if inputs.test is None else "test"
    images = inputs.split.validation if inputs.test is None else inputs.test
    replacements = replacements_of(network, replacing.compressed, replacing.names, replacing.cut)
    if not replacements or not len(images):
        return None
    loaded = yardstick.loader.batches(images)
    own = yardstick.metric if isinstance(yardstick.metric, Metric) else None
    shared = None if own else _shared_walk(network, replacements)
    mirror = Mirror(network.model, {} if shared else replacements)
    names = shared.names if shared else mirror.names
    with torch.no_grad(), ExitStack() as modes:
        for model in (network.model, mirror, *replacements.values()):
            modes.enter_context(evaluation_mode(model))
        if own:
            measure, values = Measure(own.name), _own_values(own, mirror, loaded)
        else:
            measure, judges = _judges(network, images, yardstick, len(names) + 1)
            results = shared.results if shared else _whole_runs(mirror)
            tracked = yardstick.track(loaded, "layer by layer", len(loaded))
            values = _judged(results, tracked, judges, next(network.model.parameters()))
    points = zip(("", *names), values, strict=True)
    return Progressive(
        measure.name, measure.unit, measure.lower_is_better, which, len(images),
        tuple(ProgressivePoint(name, value) for name, value in points),
    )  # fmt: skip


def _own_values(metric: Metric, mirror: Mirror, loaded: Batches) -> list[float | None]:
    """What a measure of the user's own gives, which runs the network itself."""
    values: list[float | None] = []
    for replaced in range(len(mirror.names) + 1):
        mirror.replace_first(replaced)
        values.append(custom_value(metric, mirror.model, loaded))
    return values


def _judged(
    results: Results, batches: Iterable[tuple[Any, Any]], judges: list[_Judge], like: Tensor
) -> list[float | None]:
    """Hand what every prefix gives for every batch to its judge."""
    for given, targets in batches:
        before = None
        found = results(like_weights(given, like))
        for judge, result in zip(judges, found, strict=True):
            after = mapped(result, lambda t: (t.float() if t.is_floating_point() else t).cpu())
            before = after if before is None else before
            judge.add(before, after, targets)
    return [judge.value() for judge in judges]


def _whole_runs(mirror: Mirror) -> Results:
    """Every prefix by a forward pass of its own."""

    def results(inputs: Any) -> Iterator[Any]:
        for replaced in range(len(mirror.names) + 1):
            mirror.replace_first(replaced)
            yield run_model(mirror.model, inputs)

    return results


def _shared_walk(network: Network, replacements: Mapping[str, nn.Module]) -> _Walk | None:
    """The walk that serves all prefixes; None where the graph does not name every layer."""
    if network.graph is None:
        return None
    step = Lockstep(network.model, network.graph)
    starts: dict[str, int] = {}
    for name in replacements:
        aliases = network.site(name).aliases
        calls = [
            i for i, node in enumerate(step.nodes)
            if node.op == "call_module" and node.target in aliases
        ]  # fmt: skip
        if not calls:
            return None
        starts[name] = min(calls)
    ordered = dict(sorted(starts.items(), key=lambda item: item[1]))
    chains = {n: dict.fromkeys(network.site(n).aliases, replacements[n]) for n in ordered}
    return _Walk(step, ordered, chains, network.result)


@dataclass(frozen=True)
class _Walk:
    """A walk along the graph that gives what the network does with every prefix replaced.

    Attributes:
        step: The dense network's nodes and modules.
        starts: Where each layer is first called, in order.
        chains: What stands in each layer's places.
        like: What the forward returns for some image.
    """

    step: Lockstep
    starts: Mapping[str, int]
    chains: Mapping[str, Mapping[str, nn.Module]]
    like: Any

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in order."""
        return tuple(self.starts)

    def results(self, inputs: Any) -> Iterator[Any]:
        """Yield what the forward returns with no layer replaced, with the first, and so on."""
        modules: dict[str, nn.Module] = dict(self.step.modules)
        values: dict[str, Any] = {self.step.nodes[0].name: cloned(inputs)}
        position = 1
        for name, start in self.starts.items():
            self._run(values, modules, self.step.nodes[position:start])
            position = start
            # A copy, since what is ahead may change it in place; views stay views of one tensor.
            yield self._result(copy.deepcopy(values), modules, position)
            modules.update(self.chains[name])
        yield self._result(values, modules, position)

    def _result(
        self, values: dict[str, Any], modules: Mapping[str, nn.Module], position: int
    ) -> Any:
        self._run(values, modules, self.step.nodes[position : self.step.result])
        output = self.step.nodes[self.step.result]
        return rebuilt(self.like, fx.node.map_arg(output.args[0], lambda n: values[n.name]))

    def _run(
        self, values: dict[str, Any], modules: Mapping[str, nn.Module], nodes: Iterable[fx.Node]
    ) -> None:
        for node in nodes:
            if node.op == "get_attr":
                values[node.name] = self.step.attribute(node)
            else:
                values[node.name] = call_node(node, lambda source: values[source.name], modules)
            for name in self.step.last_use.get(node, ()):
                values.pop(name, None)


class _Judge(Protocol):
    """Measures one prefix."""

    def add(self, before: Any, after: Any, targets: Any) -> None:
        """Take in what the dense network and this one return for a batch, and its targets."""

    def value(self) -> float | None:
        """Return the measure over all batches."""


def _judges(
    network: Network, images: ImageSet, yardstick: Yardstick, number: int
) -> tuple[Measure, list[_Judge]]:
    """What the prefixes are measured by, and one judge for each."""
    reading, task = network.reading, yardstick.metric
    if isinstance(task, TaskMeasure) and has_targets(task.task, images):
        targets = some_targets(images)
        return task.first, [_Scored(task.scorer(reading, targets)) for _ in range(number)]
    if task is None and reading.ranked:
        labels = torch.tensor(images.labels)
        classes = reading.scores(network.result).shape[1]
        if min(images.labels) >= 0 and max(images.labels) < classes:
            return ACCURACY, [_Right(reading, labels) for _ in range(number)]
        return AGREEMENT, [_Right(reading, None) for _ in range(number)]
    return ERROR, [_Apart(Comparison(reading, beside=True)) for _ in range(number)]


@dataclass
class _Right:
    """Share of images whose class is the label, or without labels the dense network's."""

    reading: Reading
    labels: Tensor | None
    images: int = 0
    right: int = 0

    def add(self, before: Any, after: Any, targets: Any) -> None:
        del targets
        found = self.reading.scores(after).argmax(1)
        if self.labels is None:
            expected = self.reading.scores(before).argmax(1)
        else:
            expected = self.labels[self.images : self.images + len(found)]
        self.images += len(found)
        self.right += int((found == expected).sum())

    def value(self) -> float:
        return self.right / self.images


@dataclass
class _Scored:
    """The first measure of a task."""

    scorer: Scorer

    def add(self, before: Any, after: Any, targets: Any) -> None:
        del before
        self.scorer.add(after, targets)

    def value(self) -> float | None:
        return self.scorer.values()[0]


@dataclass
class _Apart:
    """Relative error of the first output."""

    comparison: Comparison

    def add(self, before: Any, after: Any, targets: Any) -> None:
        del targets
        self.comparison.add(before, after)

    def value(self) -> float | None:
        outputs = self.comparison.outputs()
        return outputs[0].relative_mse if outputs else None
