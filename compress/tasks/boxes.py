"""Detection: boxes with scores and classes, in torchvision's form, judged by the mean precision."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.errors import CompressError, DataError, ModelError
from compress.libraries.record import quiet
from compress.tasks.record import (
    EXTRA,
    Measure,
    Scorer,
    Setup,
    Task,
    as_values,
    require_package,
    require_torchmetrics,
)

_TARGET, _FOUND = ("boxes", "labels"), ("boxes", "scores", "labels")
# What torchmetrics can count with, by package.
_BACKENDS = {"pycocotools": "pycocotools", "faster_coco_eval": "faster_coco_eval"}


class _Scorer(Scorer):
    """All boxes of all images: precision depends on the order of their scores."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        package = require_torchmetrics(DETECTION.name)
        importlib.import_module("torchmetrics.detection")
        backend = _backend()
        with quiet():
            self.metric = package.detection.MeanAveragePrecision(
                box_format="xyxy", iou_type="bbox", backend=backend
            )
            self.metric.warn_on_many_detections = False
        self.objects = 0

    def add(self, result: Any, targets: Any) -> None:
        found = _as_list(result)
        if found is None or not all(_has(item, _FOUND) for item in found):
            raise ModelError(
                "--task detection judges a list with one dict an image, of 'boxes' [N, 4] as "
                "x1, y1, x2, y2 in pixels, 'scores' [N] and 'labels' [N], as torchvision's "
                f"detectors return it; the model returned {type(result).__name__}. Wrap it in a "
                "module that does, or pass --metric-fn."
            )
        given = _as_list(targets)
        if given is None or not all(_has(item, _TARGET) for item in given):
            raise DETECTION.misfit(f"a batch has {type(targets).__name__} in their place")
        if len(found) != len(given):
            raise DETECTION.misfit(
                f"a batch has {len(given)} targets beside {len(found)} results: boxes differ in "
                "number, so pass --batch-size 1, or a DataLoader whose collate_fn lists the targets"
            )
        self.objects += sum(len(item["labels"]) for item in given)
        self.metric.update(
            [{key: item[key] for key in _FOUND} for item in found],
            [{key: item[key] for key in item if key in (*_TARGET, "iscrowd")} for item in given],
        )

    def values(self) -> tuple[float | None, ...]:
        if not self.objects:
            raise DataError("No image has a box, so --task detection has no measure.")
        with quiet():
            found = self.metric.compute()
        # -1 stands for what there is nothing of.
        return tuple(max(float(found[key]), 0.0) for key in ("map", "map_50", "map_75"))


def _backend() -> str:
    """Return the package that matches boxes.

    Raises:
        ModelError: None is installed.
    """
    for name in _BACKENDS:
        try:
            require_package(name, DETECTION.name)
        except CompressError:
            continue
        return _BACKENDS[name]
    raise ModelError(
        "--task detection needs the package pycocotools or faster-coco-eval, and neither is "
        f"installed; install one with pip install '{EXTRA}', or pass a measure of your own with "
        "--metric-fn."
    )


def _has(item: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(item, Mapping) and all(isinstance(item.get(key), Tensor) for key in keys)


def _as_list(value: Any) -> list[Any] | None:
    """Return one dict an image, of a list of them or of a batch of one with that axis or not."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("boxes"), Tensor):
        return None
    if value["boxes"].dim() == 2:
        return [value]
    known = {key: part for key, part in value.items() if isinstance(part, Tensor)}
    images = range(len(value["boxes"]))
    return [{key: part[image] for key, part in known.items()} for image in images]


DETECTION = Task(
    name="detection",
    measures=(
        Measure("box mAP", "fraction"),
        Measure("box mAP at IoU 0.5", "fraction"),
        Measure("box mAP at IoU 0.75", "fraction"),
    ),
    targets="a dict of 'boxes' [N, 4] as x1, y1, x2, y2 and 'labels' [N] for each image",
    accepts=lambda target: _has(target, _TARGET),
    looks_for="",
    fits=lambda _output, _target: False,
    read=as_values,
    scorer=_Scorer,
)
