"""Two networks on the same images, by the measures of a task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.data import ImageSet, Loader
from compress.data.targets import UNLABELLED
from compress.errors import ModelError
from compress.measure.outputs import Comparison, result_of
from compress.measure.resampling import paired_bootstrap
from compress.progress import Track, silent
from compress.result import ClassResult, CustomMetric, EndMetric, Example
from compress.running.outputs import Reading
from compress.running.structure import count
from compress.tasks import Scorer, Task, TaskMeasure, read_for

# Targets that are looked at for what all have in common, such as the range of pictures.
LOOKED_AT = 32
# Images that stand for the set in a report: those that lost most, the middle one, the best one.
_WORST = 3


def has_targets(task: Task, images: ImageSet) -> bool:
    """Whether a set gives what a task is measured by, as its first image shows."""
    if not len(images):
        return False
    target = images.target(0)
    unlabelled = isinstance(target, int) and target == UNLABELLED
    return not unlabelled and task.accepts(target)


def require_targets(task: Task, images: ImageSet) -> None:
    """Raise `DataError` where a set does not give what a task is measured by."""
    if not has_targets(task, images):
        raise task.misfit(
            f"{images.source.described} does not give that: name a function that returns a "
            "Dataset of (input, target), or a file of arrays 'images' and 'targets'"
        )


def some_targets(images: ImageSet) -> list[Any]:
    """Return the targets of some images, spread over the set."""
    step = max(len(images) // LOOKED_AT, 1)
    return [images.target(i) for i in range(0, len(images), step)[:LOOKED_AT]]


@dataclass(frozen=True)
class ByTask:
    """What networks are compared by where the task is known.

    Attributes:
        measure: The measures.
        loader: How images reach the networks.
        track: Progress.
        reading: What the outputs stand for; by default what the first look like.
    """

    measure: TaskMeasure
    loader: Loader
    track: Track = silent
    reading: Reading | None = None

    def scored(self, model: nn.Module, images: ImageSet, describe: str) -> Scorer:
        """Return one network's results on a set of images.

        Raises:
            DataError: The set does not give the task's targets, or they do not fit the outputs.
            ModelError: The forward fails, or returns what the task cannot judge.
        """
        require_targets(self.measure.task, images)
        scorer: Scorer | None = None
        targets = some_targets(images)
        for given, target, where in self._batches(images, describe):
            result = result_of(model, given, where)
            if scorer is None:
                reading = self.reading or read_for(self.measure.task, result, targets)
                scorer = self.measure.scorer(reading, targets)
            scorer.add(result, target)
        assert scorer is not None
        return scorer

    def compare(
        self,
        before: nn.Module,
        after: nn.Module,
        images: ImageSet,
        describe: str,
        known: Iterable[Any] | None = None,
    ) -> EndMetric:
        """Compare two networks; a set without the task's targets only tells how outputs changed.

        Args:
            before: The original.
            after: The compressed network.
            images: The set.
            describe: What the images are, for the progress bar.
            known: What the original returns for each batch, where that is known already.

        Raises:
            DataError: The targets do not fit the outputs.
            ModelError: A forward fails, or the two return different structures.
        """
        task, judged = self.measure.task, has_targets(self.measure.task, images)
        targets = some_targets(images) if judged else []
        comparison = Comparison(self.reading, beside=True)
        scorers: tuple[Scorer, ...] = ()
        left = None if known is None else iter(known)
        for given, target, where in self._batches(images, describe):
            first = result_of(before, given, where) if left is None else next(left)
            second = result_of(after, given, where)
            comparison.reading = comparison.reading or read_for(task, first, targets)
            comparison.add(first, second)
            if judged and not scorers:
                reading = comparison.reading
                scorers = tuple(self.measure.scorer(reading, targets) for _ in range(2))
            for scorer, result in zip(scorers, (first, second), strict=False):
                scorer.add(result, target)
        outputs = comparison.outputs()
        found = EndMetric(
            images=len(images),
            agreement=next((o.agreement for o in outputs if o.agreement is not None), None),
            outputs=outputs,
        )
        return self._with_measures(found, scorers, images) if scorers else found

    def _batches(self, images: ImageSet, describe: str) -> Iterator[tuple[Any, Any, str]]:
        seen, loaded = 0, self.loader.batches(images)
        for given, target in self.track(loaded, describe, len(loaded)):
            yield given, target, f"on the images from number {seen} ({describe})"
            seen += count(given)

    def _with_measures(
        self, found: EndMetric, scorers: tuple[Scorer, ...], images: ImageSet
    ) -> EndMetric:
        before, after = scorers
        first, *further = records(self.measure.task, before.values(), after.values())
        measure = self.measure.first
        return EndMetric(
            images=found.images,
            agreement=found.agreement,
            outputs=found.outputs,
            task=self.measure.task.name,
            custom=first,
            further=tuple(further),
            drop=measure.drop(first.before, first.after),
            drop_interval=paired_bootstrap(measure, before, after, len(images)),
            per_class=_by_class(before, after, images),
            examples=_examples(self.measure, before, after, images),
        )


def records(
    task: Task, before: tuple[float | None, ...], after: tuple[float | None, ...]
) -> list[CustomMetric]:
    """Return a task's measures of two networks, without those that are not defined.

    Raises:
        ModelError: The first is no finite number.
    """
    found = [
        measure.record(first, second)
        for measure, first, second in zip(task.measures, before, after, strict=True)
        if first is not None and second is not None
    ]
    decisive = found[0]
    if not (math.isfinite(decisive.before) and math.isfinite(decisive.after)):
        raise ModelError(
            f"{decisive.name} came to {decisive.before} before and {decisive.after} after, so the "
            "networks cannot be compared by it; check the targets."
        )
    return found


def _by_class(before: Scorer, after: Scorer, images: ImageSet) -> tuple[ClassResult, ...]:
    rows = []
    pairs = zip(before.by_class(), after.by_class(), strict=True)
    names = images.classes
    for index, ((number, first), (_, second)) in enumerate(pairs):
        name = names[index] if index < len(names) else str(index)
        change = None if first is None or second is None else 100.0 * (second - first)
        rows.append(ClassResult(name, number, first, second, change))
    return tuple(rows)


def _examples(
    measure: TaskMeasure, before: Scorer, after: Scorer, images: ImageSet
) -> tuple[Example, ...]:
    """Choose images that stand for the set: the greatest losses, the middle one, the best one."""
    first, second = before.each(), after.each()
    if first is None or second is None:
        return ()
    lost = measure.first.drop(first, second).tolist()
    order = sorted((i for i, x in enumerate(lost) if math.isfinite(x)), key=lambda i: -lost[i])
    places = [*range(min(_WORST, len(order))), len(order) // 2, len(order) - 1]
    chosen = [order[place] for place in sorted(set(places)) if 0 <= place < len(order)]
    return tuple(Example(i, float(first[i]), float(second[i]), images.name(i)) for i in chosen)
