"""The walk from cut to cut of the graph, and training what lies between two cuts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.fisher import Objective
from compress.data.targets import joined
from compress.data.targets import part as part_of_targets
from compress.errors import GradientError
from compress.fit.blend import blended, can_be_blended
from compress.fit.cuts import Segment
from compress.fit.frontier import Frontier, Pair
from compress.fit.lockstep import holds_numbers
from compress.fit.values import Value, channel_axes
from compress.fit.walk import Labelled, RefitSettings, Traced, Walk
from compress.linalg.moments import Moments
from compress.linalg.problem import roots_of
from compress.linalg.spectrum import regularise
from compress.linalg.steps import Steps, falling, operations_for
from compress.network.sites import LayerSite
from compress.running.forward import backward, changes_allowed
from compress.running.structure import (
    cloned,
    concatenated,
    count,
    part,
    rebuilt,
    shapes,
    with_gradients,
)

# A stretch takes as many steps as show each image that layers were fitted to so often. Further
# images share these steps, as many as leave each so often at least.
EPOCHS, LEAST_EPOCHS = 12, 3
# Images a step, whatever the batches are: results must not depend on what fits into memory.
STEP_IMAGES = 32
# Large maps tell as much with fewer of them: positions a step, and the fewest images.
STEP_POSITIONS = 1 << 16
LEAST_IMAGES = 4
# The largest steps, relative to each weight's root mean square; see `compress.linalg.steps`. They
# grow to that over this share of all, and then fall to nothing.
STEP, WARM_UP = 0.005, 1 / 20


class StretchWalk(Walk):
    """The walk that stops at the cuts of the graph.

    Attributes:
        layers: The compressed network's layers that may change, by name.
        number_nodes: Names of the nodes that give numbers, once `values` was called.
    """

    def __init__(self, traced: Traced, frontier: Frontier) -> None:
        super().__init__(traced, frontier)
        self.layers: dict[str, nn.Module] = {}
        self.number_nodes: set[str] = set()
        self._further: set[int] = set()
        self._numbers: dict[tuple[int, bool], dict[str, Any]] = {}

    def place(self, site: LayerSite, module: nn.Module) -> nn.Module:
        """Put a module in a layer's place in the compressed network; it may change."""
        self.layers[site.name] = module.requires_grad_(False)
        return super().place(site, module)

    def free(self, site: LayerSite) -> None:
        """Let a dense layer differ between the networks."""
        self.place(site, copy.deepcopy(self.layer(site)))

    def values(self, *, whole: bool = False) -> list[Value]:
        """What each node gives for the first batch; notes which of them give numbers.

        Args:
            whole: Whether batches must stay as they are.
        """
        nodes = self.lockstep.nodes
        images = cloned(self.frontier.look(0)[nodes[0].name].dense)
        size = self.sizes[0]
        shapes = self._shapes(images)
        # What does not follow the number of images along its first axis cannot be parted there.
        other = {}
        if not whole:
            other = self._shapes(part(concatenated([images, images]), 0, size + 1))
        axes = channel_axes(nodes, self.lockstep.modules, shapes)
        found = []
        for node in nodes:
            if node.name in self.number_nodes:
                found.append(Value.numbers())
                continue
            shape, second = shapes.get(node.name), other.get(node.name)
            by_image = _follows(shape, second, size)
            found.append(Value.of(shape, axes.get(node.name), size, by_image=by_image))
        return found

    @torch.no_grad()
    def _shapes(self, images: Any) -> dict[str, torch.Size]:
        """Shapes of all tensors that nodes give for some images, by node."""
        nodes = self.lockstep.nodes
        environment = {nodes[0].name: Pair(images, images)}
        found: dict[str, torch.Size] = {}
        for node in nodes:
            if node.name not in environment:
                self.lockstep.run(environment, [node])
            value = environment[node.name].dense
            if isinstance(value, Tensor):
                found[node.name] = value.shape
            elif node.op != "output" and holds_numbers(value):
                self.number_nodes.add(node.name)
        return found

    def add_further(
        self, batches: Labelled, segments: Iterable[Segment], values: Sequence[Value]
    ) -> int:
        """Put further batches to learn from at the first node.

        Only as many as can be kept in memory with the others on the whole way, since what each
        stretch takes from a disk it reads at every step; and as many as are worth it.

        Args:
            batches: They.
            segments: The stretches.
            values: What each node gives.

        Returns:
            How many images were added.
        """
        # Of each image: what a stretch should give, and what both networks feed it.
        ends = [values[s.end].bytes + 2 * values[s.start].bytes for s in segments]
        fitted = sum(self.sizes[batch] for batch in self.batches(held_out=False))
        room = self.frontier.cap // max(ends, default=0) if any(ends) else 0
        most = min(room - sum(self.sizes), (EPOCHS // LEAST_EPOCHS - 1) * fitted)
        images = 0
        for inputs, labels in batches if most > 0 else ():
            if images + count(inputs) > most:
                break
            images += count(inputs)
            self._further.add(len(self.sizes))
            self.add(inputs, labels, held_out=False)
        return images

    def fitted(self) -> list[int]:
        """Numbers of the batches that layers were fitted to, further ones apart."""
        return [batch for batch in self.batches(held_out=False) if batch not in self._further]

    def reads_numbers(self, segment: Segment) -> bool:
        """Whether a stretch reads numbers that came before it."""
        nodes = self.lockstep.nodes
        before = {n for n in nodes[: segment.start + 1] if n.name in self.number_nodes}
        inside = nodes[segment.start + 1 : segment.end + 1]
        return any(source in before for node in inside for source in node.all_input_nodes)

    def numbers(self, batch: int, *, compressed: bool) -> dict[str, Any]:
        """What nodes gave a batch that are no part of what a cut carries on."""
        return self._numbers.setdefault((batch, compressed), {})

    def across(self, batch: int, value: Any, start: int, end: int, *, compressed: bool) -> Any:
        """Take a batch's value through one of the networks; see `Lockstep.across`."""
        numbers = self.numbers(batch, compressed=compressed)
        return self.lockstep.across(value, start, end, numbers, compressed=compressed)

    def metrics(
        self, segments: Mapping[Segment, Value], settings: RefitSettings
    ) -> dict[int, Tensor]:
        """Return ``R [channels, channels]``, ``Rᵀ R = G``, by where stretches end.

        Args:
            segments: The stretches, with what they end with.
            settings: Loss and seed.
        """
        values = {segment.end: value for segment, value in segments.items()}
        moments: dict[int, Moments] = {}
        fitted = self.batches(held_out=False)
        images = sum(self.sizes[batch] for batch in fitted)
        objective = Objective(images, settings.seed, settings.loss, settings.reading)
        for batch in fitted:
            found = self._gradients(batch, segments, objective, in_place=settings.in_place)
            for end, gradient in found:
                rows = values[end].rows(gradient)
                into = moments.setdefault(end, Moments(1, rows.shape[1], self.device))
                into.update(rows.unsqueeze(0))
        return {
            end: roots_of(regularise(self._kept(end, found.second_moment)))[0][0].float()
            for end, found in moments.items()
        }

    def _kept(self, end: int, weighting: Tensor) -> Tensor:
        """``G [1, channels, channels]`` of the channels that stay at a node."""
        name = self.lockstep.nodes[end].name
        if name not in self.cut.nodes:
            return weighting
        return self.cut.nodes[name][1].of_matrix(weighting)

    def _gradients(
        self, batch: int, segments: Iterable[Segment], objective: Objective, *, in_place: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Gradients of a batch's loss where stretches end."""
        nodes = self.lockstep.nodes
        value = with_gradients(self.frontier.look(batch)[nodes[0].name].dense)
        ends, at = {}, 0
        with changes_allowed(in_place=in_place):
            for segment in segments:
                value = self.across(batch, value, at, segment.end, compressed=False)
                if not value.requires_grad:  # nothing before it is a real number, such as words
                    value = value.detach().requires_grad_()
                ends[segment.end], at = value, segment.end
            outputs = self.across(batch, value, at, self.lockstep.result, compressed=False)
            total = objective(rebuilt(self.traced.result, outputs), self.labels[batch])
            gradients = torch.autograd.grad(total, list(ends.values()), allow_unused=True)
        for end, gradient in zip(ends, gradients, strict=True):
            if gradient is not None:
                yield end, gradient

    def advance(self, segment: Segment) -> None:
        """Bring all batches to a stretch's start with what it should give.

        Those to learn from also keep what the original network has there.
        """
        with torch.no_grad():
            for batch in range(len(self.held_out)):
                (pair,) = self.frontier.take(batch).values()
                dense, given = (
                    self.across(batch, value, self.position, segment.start, compressed=second)
                    for value, second in ((pair.dense, False), (pair.compressed, True))
                )
                target = self.across(batch, dense, segment.start, segment.end, compressed=False)
                self.frontier.put(batch, {"stretch": Pair(target, given)})
                if dense is not given and not self.held_out[batch]:
                    original = self.cut.of_node(self.lockstep.nodes[segment.start].name, dense)
                    if can_be_blended(given, original):
                        self.frontier.put(batch, {"original": Pair(original, original)})
        self.position = segment.start

    def finish(self, segment: Segment) -> None:
        """Take all batches to the end of a stretch."""
        with torch.no_grad():
            for batch in range(len(self.held_out)):
                pair = self.frontier.take(batch)["stretch"]
                reached = self.through(segment, batch, pair.compressed)
                self.frontier.put(batch, {"cut": Pair(pair.dense, reached)})
        self.position = segment.end

    def through(self, segment: Segment, batch: int, given: Any) -> Tensor:
        """What the compressed network's stretch makes of a batch's input."""
        found: Tensor = self.across(batch, given, segment.start, segment.end, compressed=True)
        return found


def _follows(shape: torch.Size | None, another: torch.Size | None, images: int) -> bool:
    """Whether a first axis follows the images: shapes are of so many, and of one more."""
    if not shape or not another:
        return False
    return shape[0] * (images + 1) == another[0] * images and shape[1:] == another[1:]


@dataclass(frozen=True)
class Stretch:
    """One stretch of the compressed network, with all batches at its start.

    Attributes:
        walk: The walk that stands there.
        segment: Where it is, and its layers.
        root: ``R [channels, channels]``, with ``Rᵀ R = G`` what its error is weighted by; None
            where all channels count alike.
        ends: What it gives.
        by_image: Whether a batch can be parted where it begins and where it ends.
    """

    walk: StretchWalk
    segment: Segment
    root: Tensor | None
    ends: Value
    by_image: bool

    def parameters(self) -> list[nn.Parameter]:
        """All weights that may change."""
        return [p for n in self.segment.layers for p in self.walk.layers[n].parameters()]

    @torch.no_grad()
    def error(self) -> float:
        """Weighted error on the held-out batches, the mean over their images."""
        found = [self._loss(batch) for batch in self.walk.batches(held_out=True)]
        return sum(float(e) * n for e, n in found) / max(sum(n for _, n in found), 1)

    def train(self, scale: float, seed: int) -> None:
        """Take falling steps over the fit images, in a seeded order.

        Layers that no gradient reaches from the stretch's end, as where the forward detaches what
        lies between, stay as they are.

        Args:
            scale: What errors are divided by, of their order.
            seed: Of the order.
        """
        parameters = self.parameters()
        for parameter in parameters:
            parameter.requires_grad_()
        for in_place in (False, True):  # copying what gradients need takes time
            with contextlib.suppress(GradientError):
                self._train(parameters, scale, seed, in_place=in_place)
                break
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _train(
        self, parameters: list[nn.Parameter], scale: float, seed: int, *, in_place: bool
    ) -> None:
        sizes, batches = self.walk.sizes, self.walk.batches(held_out=False)
        each = max(STEP_IMAGES // sizes[0], 1)
        total = EPOCHS * -(-len(self.walk.fitted()) // each)
        steps = [batches[i : i + each] for i in range(0, len(batches), each)]
        most = max(STEP_POSITIONS // max(self.ends.positions, 1), LEAST_IMAGES)
        # Numbers may be those of a whole batch.
        if self.walk.reads_numbers(self.segment) or not self.by_image:
            most = STEP_IMAGES
        macs = sum(self.walk.traced.sites[name].macs for name in self.segment.layers)
        moving = Steps.begin(
            {str(number): parameter for number, parameter in enumerate(parameters)},
            operations_for(macs * min(STEP_IMAGES, most)),
        )
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for number in range(total):
            order = order or torch.randperm(len(steps), generator=generator).tolist()[::-1]
            chosen = steps[order.pop()]
            for parameter in parameters:
                parameter.grad = None
            parts = _drawn([(b, sizes[b]) for b in chosen], most, generator)
            images = sum(end - start for _, start, end in parts)
            for batch, start, end in parts:
                with changes_allowed(in_place=in_place):
                    error, count = self._loss(batch, start, end, generator)
                    backward(error * (count / images / scale))
            warm = min(1.0, (number + 1) / max(1, WARM_UP * total))
            moving.step(STEP * warm * falling(number / total))

    def _loss(
        self,
        batch: int,
        start: int = 0,
        end: int | None = None,
        draws: torch.Generator | None = None,
    ) -> tuple[Tensor, int]:
        """Weighted error of images of a batch, their mean, and how many they are.

        With ``draws``, the input is blended with the original network's.
        """
        here = self.walk.frontier.look(batch)
        pair = here["stretch"]
        size = self.walk.sizes[batch]
        whole = start == 0 and end in (None, size)
        # Where frames or tokens lie in the axis of images, each image has several rows, and not
        # always as many at both ends.
        whole = (
            whole
            or not self.by_image
            or any(count(value) % size for value in (pair.compressed, pair.dense))
        )

        def of_images(value: Any) -> Any:
            rows = count(value) // size
            return value if whole else part(value, rows * start, rows * (end or size))

        given = of_images(pair.compressed)
        if draws is not None and "original" in here:
            given = blended(given, of_images(here["original"].dense), draws)
        output = self.walk.through(self.segment, batch, given)
        images = size if whole else (end or size) - start
        last = self.walk.lockstep.nodes[self.segment.end].name
        wanted = self.walk.cut.of_node(last, of_images(pair.dense))
        errors = self.ends.rows(output - wanted)
        if self.root is not None:
            errors = errors @ self.root.mT
        return errors.square().sum() / images, images


def _drawn(
    batches: Sequence[tuple[int, int]], most: int, generator: torch.Generator
) -> list[tuple[int, int, int]]:
    """At most so many images of batches that hold some: batch, first and end.

    Drawn anew for each step, in one run of a batch; all where there are no more.
    """
    if sum(size for _, size in batches) <= most:
        return [(batch, 0, size) for batch, size in batches]
    batch, size = batches[int(torch.randint(len(batches), (), generator=generator))]
    if size <= most:
        return [(batch, 0, size)]
    start = int(torch.randint(size - most + 1, (), generator=generator))
    return [(batch, start, start + most)]


def pieces(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Cut batches anew, into the largest equal parts of a step that are no larger than the first.

    Only the last piece may be smaller, and those before which the size of inputs changes.
    """
    size, inputs, targets = 0, None, None
    for more, more_targets in batches:
        if not size:
            size = 1 << (min(count(more), STEP_IMAGES).bit_length() - 1)
        if inputs is not None and shapes(part(inputs, 0, 1)) != shapes(part(more, 0, 1)):
            # Of another size, as where a collate function pads to the longest of a batch.
            yield inputs, targets
            inputs = None
        if inputs is None:
            inputs, targets = more, more_targets
        else:
            inputs = concatenated([inputs, more])
            targets = joined(targets, more_targets)
        while inputs is not None and count(inputs) >= size:
            yield part(inputs, 0, size), part_of_targets(targets, 0, size)
            rest = count(inputs) - size
            inputs = part(inputs, size, None) if rest else None
            targets = part_of_targets(targets, size, None) if rest else None
    if inputs is not None:
        yield inputs, targets
