"""What a network's outputs stand for, decided once by evidence: classes, answers, or values.

Everything that weighs or compares outputs goes by the same reading: the Fisher information of
calibration, the losses of single layers, and the figures of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import ModelError
from compress.running.structure import floating, tensors

Kind = Literal["classes", "answers", "values"]
# A loss of the user's own: ``(result, targets) -> summed loss``.
LossFunction = Callable[[Any, Any], Tensor]

_SUM = 1e-3
_LEAST = 1e-12
# Masks mark what is not to be judged by this.
_IGNORED = 255
# So many standard deviations above the best guess, and the labels were predicted.
_CLEARLY = 4.0
NAMES_OF_LOGITS = ("logits", "out")


@dataclass(frozen=True)
class Part:
    """One floating output.

    Attributes:
        path: Where it lies in what the forward returns; empty where it is all of it.
        kind: ``"classes"`` of which one is right, axis 1; ``"answers"``, each yes or no; or
            ``"values"``, all alike.
        normalised: Whether a softmax or a sigmoid made probabilities of it already.
        weight: What its squared errors are multiplied by; 1 unless there are several outputs.
    """

    path: str
    kind: Kind
    normalised: bool = False
    weight: float = 1.0

    def logits(self, output: Tensor) -> Tensor:
        """Return the output with the softmax or the sigmoid taken back."""
        if not self.normalised or self.kind == "values":
            return output
        if self.kind == "answers":
            return torch.logit(output, eps=_LEAST if output.dtype == torch.float64 else 1e-6)
        return output.clamp_min(_LEAST).log()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``[images]``: KL of the answers in nats, or half the squared error of values."""
        p, q = (self.logits(output.double()) for output in (before, after))
        if self.kind == "classes":
            log_p, log_q = (x.log_softmax(1) for x in (p, q))
            found = log_p.exp() * (log_p - log_q)
        elif self.kind == "answers":
            yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
            found = yes + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        else:
            found = (p - q).square() * (self.weight / 2)
        # What rounding leaves of two equal distributions may be less than nothing.
        return (found.flatten(1).sum(1) if found.dim() > 1 else found).clamp_min(0.0)


@dataclass(frozen=True)
class Reading:
    """What a network's outputs stand for.

    Attributes:
        parts: The outputs that count; none where all that is returned does, as of a detector.
        why: The evidence, as a sentence for reports.
        ranked: Whether accuracy is the share of images whose largest output is the label.
    """

    parts: tuple[Part, ...]
    why: str
    ranked: bool

    @property
    def kind(self) -> Kind:
        """What the outputs that count are."""
        return self.parts[0].kind if self.parts else "values"

    def scores(self, result: Any) -> Tensor:
        """Return what accuracy is measured by, ``[images, classes]``, as logits."""
        (part,) = self.parts
        return part.logits(tensors(result)[part.path])

    def outputs(self, result: Any) -> list[Tensor]:
        """Return the outputs that count.

        Raises:
            ModelError: The forward returns others than it did when they were read.
        """
        found = tensors(result)
        for part in self.parts:
            if part.path not in found:
                raise ModelError(
                    f"The model's outputs change with its input: {part.path or 'a single tensor'} "
                    f"was among them at first, and now there are {listed_paths(found)}. Let the "
                    "forward return the same structure for every input."
                )
        return [found[part.path] for part in self.parts]

    def divergence(self, before: Any, after: Any) -> Tensor:
        """Return how far results are apart, ``[images]``; see `Part.divergence`."""
        pairs = zip(self.parts, self.outputs(before), self.outputs(after), strict=True)
        return torch.stack([part.divergence(p, q) for part, p, q in pairs]).sum(0)


def listed_by_image(one: Any, several: Any, images: int) -> bool:
    """Whether a network lists what it found in each image, as detectors do.

    Args:
        one: What its forward returned for one image.
        several: And for several.
        images: How many these were.
    """
    return all(
        isinstance(result, list | tuple)
        and len(result) == count
        and all(isinstance(found, Mapping) for found in result)
        for result, count in ((one, 1), (several, images))
    )


def listed_paths(found: dict[str, Tensor]) -> str:
    """Return the paths and shapes of outputs as words."""
    return ", ".join(f"{path or 'output'} {list(t.shape)}" for path, t in found.items())


def read_outputs(
    result: Any,
    targets: Sequence[Any] = (),
    *,
    sigmoid: bool = False,
    beside: Collection[str] = (),
) -> Reading:
    """Decide what outputs stand for.

    Args:
        result: What the original's forward returned for some images.
        targets: What the images' data set says of each, where it says something.
        sigmoid: Whether the network's graph ends in a sigmoid.
        beside: Paths of outputs that do not lie image by image; they count only if no other does.

    Raises:
        ModelError: No output holds real numbers.
    """
    real = {path: t.detach() for path, t in floating(result).items() if t.dim() > 0}
    found = {path: t for path, t in real.items() if path not in beside} or real
    if not found:
        raise ModelError(
            f"The model's forward returned {type(result).__name__}, in which no tensor holds real "
            "numbers; wrap it in a module that returns its scores or values."
        )
    if len(found) == 1:
        ((path, output),) = found.items()
        if path in beside:
            why = f"{f'the output {path}' if path else 'the output'}: values, as its first axis is "
            return Reading((Part(path, "values"),), f"{why}not that of the images", False)
        return _single(path, output, targets, sigmoid=sigmoid)
    return _several(found, targets)


def _single(path: str, output: Tensor, targets: Sequence[Any], *, sigmoid: bool) -> Reading:
    what = f"the output {path}" if path else "the output"
    one_hot = _are_one_hot(output, targets)
    numbered = _class_numbers(output, targets) is not None or (one_hot and output.dim() == 2)
    if _are_yes_or_no(output, targets) or (sigmoid and not numbered):
        why = "a sigmoid gives it" if sigmoid else "each image has as many yes-or-no labels"
        return Reading((Part(path, "answers", sigmoid),), f"{what}: answers, as {why}", False)
    if output.dim() > 2 and (numbered or one_hot):
        why = f"{what}: logits of classes, as every position has a class for a label"
        return Reading((Part(path, "classes", are_probabilities(output)),), why, False)
    if not are_class_scores(output) or not (numbered or _are_class_numbers(targets)):
        why = (
            f"its shape {list(output.shape)} is no classifier's"
            if not are_class_scores(output)
            else "the targets are no class numbers"
        )
        return Reading((Part(path, "values"),), f"{what}: values, as {why}", False)
    if are_probabilities(output):
        why = f"{what}: probabilities of classes, as each row sums to one"
        return Reading((Part(path, "classes", True),), why, True)
    if sigmoid:
        why = f"{what}: answers, as a sigmoid gives it; the largest counts for the accuracy"
        return Reading((Part(path, "answers", True),), why, True)
    return Reading((Part(path, "classes"),), f"{what}: logits, {output.shape[1]} classes", True)


def _several(found: dict[str, Tensor], targets: Sequence[Any]) -> Reading:
    for path, output in found.items():
        if path in NAMES_OF_LOGITS and output.dim() > 1 and output.shape[1] > 1:
            ranked = output.dim() == 2
            why = f"{path}: logits, by its name; the other outputs are compared as values"
            return Reading((Part(path, "classes", are_probabilities(output)),), why, ranked)
    right = {path: _clearly_right(output, targets) for path, output in found.items()}
    predicting = {path: sentence for path, sentence in right.items() if sentence}
    if len(predicting) == 1:
        ((path, sentence),) = predicting.items()
        part = Part(path, "classes", are_probabilities(found[path]))
        return Reading((part,), f"{path}: {sentence}", found[path].dim() == 2)
    parts = tuple(Part(path, "values", weight=_evening(output)) for path, output in found.items())
    return Reading(parts, f"{len(parts)} outputs, all compared as values", False)


def _evening(output: Tensor) -> float:
    """What makes an output's squared errors count as much as another's."""
    spread = float(output.double().var(correction=0)) if output.numel() > 1 else 0.0
    scale = spread or float(output.double().square().mean()) or 1.0
    return len(output) / (scale * output.numel())


def are_class_scores(output: Tensor) -> bool:
    """Whether an output ``[batch, classes]`` can be that of a classifier."""
    return output.dim() == 2 and output.shape[1] > 1


def are_probabilities(output: Tensor) -> bool:
    """Whether the classes' outputs ``[batch, classes, ...]`` sum to one, as a softmax's do."""
    if output.dim() < 2 or output.shape[1] < 2:
        return False
    sums = output.float().sum(1)
    return bool((output >= 0).all()) and bool(((sums - 1).abs() < _SUM).all())


def _are_class_numbers(targets: Sequence[Any]) -> bool:
    return all(isinstance(target, int) for target in targets)


def _class_numbers(output: Tensor, targets: Sequence[Any]) -> Tensor | None:
    """Return targets that are class numbers of an output's positions, ``[images, ...]``."""
    if output.dim() < 2 or output.shape[1] < 2 or not targets:
        return None
    if _are_class_numbers(targets):
        stacked = torch.tensor(targets)
    elif all(isinstance(t, Tensor) and not t.is_floating_point() for t in targets):
        if len({t.shape for t in targets}) > 1:
            return None
        stacked = torch.stack(list(targets)).long()
    else:
        return None
    judged = stacked[(stacked >= 0) & (stacked != _IGNORED)]
    fitting = stacked.shape[1:] == output.shape[2:]
    return stacked if fitting and judged.numel() and int(judged.max()) < output.shape[1] else None


def _zeros_and_ones(output: Tensor, targets: Sequence[Any]) -> Tensor | None:
    """Return targets of zeros and ones in the shape of an output, ``[images, ...]``."""
    if not targets or output.dim() < 2:
        return None
    if not all(isinstance(t, Tensor) and t.shape == output.shape[1:] for t in targets):
        return None
    stacked = torch.stack(list(targets))
    return stacked if bool(((stacked == 0) | (stacked == 1)).all()) else None


def _are_one_hot(output: Tensor, targets: Sequence[Any]) -> bool:
    """Whether of all classes exactly one is marked, everywhere."""
    marked = _zeros_and_ones(output, targets)
    return marked is not None and output.shape[1] > 1 and bool((marked.sum(1) == 1).all())


def _are_yes_or_no(output: Tensor, targets: Sequence[Any]) -> bool:
    """Whether every output of an image has a label of zero or one, and not just one of them."""
    marked = _zeros_and_ones(output, targets)
    return marked is not None and not _are_one_hot(output, targets)


def _clearly_right(output: Tensor, targets: Sequence[Any]) -> str:
    """Say how often the largest output is the label, where that is no accident; else nothing."""
    labels = _class_numbers(output, targets)
    if labels is None or len(labels) != len(output):
        return ""
    judged = (labels >= 0) & (labels != _IGNORED)
    known = labels[judged]
    right, total = int((output.argmax(1).cpu() == labels)[judged].sum()), int(judged.sum())
    guess = max(float(known.bincount().max()) / total, 1 / output.shape[1])
    if right <= guess * total + _CLEARLY * math.sqrt(total * guess * (1 - guess)) or total < 8:
        return ""
    return f"logits, as its largest is the label of {right} of {total}"


def loss_of_all(seed: int) -> LossFunction:
    """Return a loss whose gradients have all that a network returns as their variance.

    Each output counts by the size of its largest number, so that boxes in pixels do not outweigh
    scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(result: Any, _targets: Any) -> Tensor:
        total = torch.zeros(())
        for output in floating(result).values():
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            scale = float(output.detach().abs().max()) if output.numel() else 1.0
            total = total.to(output.device) + (output * signs).sum() / max(scale, 1e-6)
        return total

    return loss
