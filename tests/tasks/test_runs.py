"""Whole runs by task: what is measured, what is held to limits, what the report shows."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn

import compress
from compress.config import TASK_NAMES
from compress.errors import ConfigError, DataError, ModelError
from compress.report import build_report, gate_sentence, render_html, render_markdown, text
from compress.report.page import Pictures
from compress.result import CustomMetric, EndMetric, Example, Interval, Result, Versions
from compress.tasks import TASKS

ATTACK = "<script>attack</script>"


class Items(torch.utils.data.Dataset[Any]):
    """Pictures with what ``kind`` asks for beside them."""

    def __init__(self, kind: str, count: int = 48) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if index >= self.count:
            raise IndexError
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        targets = {
            "segmentation": (image.mean(0) > 0.5).long(),
            "restoration": image.flip(0),
            "regression": float(image.mean()),
            "multilabel": (image.mean((1, 2)) > 0.5).long(),
            "detection": {
                "boxes": torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]][: 1 + index % 2]),
                "labels": torch.ones(1 + index % 2, dtype=torch.long),
            },
        }
        return image, targets.get(self.kind, index % 3)


class Net(nn.Module):
    """One body with the end that a task asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.end = nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor) -> Any:
        found = self.end(self.body(images))
        if self.kind == "segmentation":
            return {"out": found, "aux": found[:, :2]}
        if self.kind == "detection":
            return [
                {
                    "boxes": torch.stack([8 * x.mean() + torch.tensor([0.0, 0, 8, 8])] * 2),
                    "scores": x.mean((1, 2))[:2].sigmoid(),
                    "labels": torch.ones(2, dtype=torch.long),
                }
                for x in found
            ]
        if self.kind == "restoration":
            return found
        return found.mean((1, 2, 3))[:, None] if self.kind == "regression" else found.mean((2, 3))


def run(kind: str, **settings: Any) -> Any:
    pytest.importorskip("lightning_utilities", reason="needs torchmetrics (compress[metrics])")
    images = Items(kind)
    given = {"task": kind, "macs": 0.6, "no_latency": True, "refit": False, **settings}
    try:
        return compress.compress_model(
            Net(kind), images, test=given.pop("test", Items(kind, 24)), **given
        )
    except ModelError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


def test_names_are_those_of_the_tasks() -> None:
    assert set(TASK_NAMES) == {"classification", *TASKS}
    with pytest.raises(ConfigError, match="Did you mean 'segmentation'"):
        compress.RunConfig(task="segmentatio")


@pytest.mark.parametrize("kind", sorted(set(TASKS) - {"detection"}))
def test_a_run_is_measured_by_its_task(kind: str) -> None:
    found = run(kind, max_drop=100.0).result
    test, measure = found.test, TASKS[kind].measures[0]
    assert (test.task, test.custom.name) == (kind, measure.name)
    assert test.drop == pytest.approx(measure.drop(test.custom.before, test.custom.after))
    assert test.drop_interval.low <= test.drop <= test.drop_interval.high
    assert test.top1_before is None
    assert measure.name in gate_sentence(found.gates[0])
    report = build_report(found)
    for page in (render_markdown(report), render_html(report)):
        assert measure.name in page
        assert "McNemar" not in page
        assert "Top-1" not in page


def test_value_of_the_whole_set() -> None:
    """Against the network itself, run on all images at once."""
    found = run("segmentation", batch_size=5).result.test
    pairs = [Items("segmentation", 24)[i] for i in range(24)]
    with torch.no_grad():
        classes = Net("segmentation").eval()(torch.stack([x for x, _ in pairs]))["out"].argmax(1)
    truth = torch.stack([y for _, y in pairs])
    shares = [
        float(((classes == k) & (truth == k)).sum() / ((classes == k) | (truth == k)).sum())
        for k in range(3)
        if bool(((classes == k) | (truth == k)).any())
    ]
    assert found.custom.before == pytest.approx(np.mean(shares), abs=1e-6)


def test_target_drop_goes_by_the_task() -> None:
    found = run("regression", macs=None, target_drop=100.0).result
    assert found.rule == "target_drop"
    assert found.cost.compressed.macs < found.cost.folded.macs


def test_detection() -> None:
    pytest.importorskip("pycocotools", reason="needs pycocotools (compress[metrics])")
    found = run("detection", batch_size=1, refit=True).result
    assert found.test.custom.name == "box mAP"
    assert found.test.drop_interval is None
    assert 0 <= found.test.custom.before <= 1


def test_targets_that_are_not_the_tasks_are_refused() -> None:
    with pytest.raises(DataError, match=r"takes a mask \[H, W\].*does not give that"):
        run("segmentation", test=Items("classes"))


def test_calibration_without_targets_is_enough() -> None:
    images = torch.stack([Items("segmentation")[i][0] for i in range(48)])
    pytest.importorskip("lightning_utilities", reason="needs torchmetrics (compress[metrics])")
    found = compress.compress_model(
        Net("segmentation"), images, test=Items("segmentation", 24), task="segmentation",
        macs=0.6, no_latency=True, refit=False,
    ).result  # fmt: skip
    assert found.validation.custom is None
    assert found.test.custom.name == "mIoU"


@pytest.mark.parametrize("kind", ["segmentation", "restoration"])
def test_pictures_are_in_the_page_and_the_same_each_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch)
    pages = []
    for name in ("one", "two"):
        found = run(kind, output=str(tmp_path / name))
        pages.append((tmp_path / name / "report.html").read_text(encoding="utf-8"))
    shown = [re.findall(r'<img src="(data:image/png[^"]*)"', page) for page in pages]
    assert len(shown[0]) == 4 * len(found.result.test.examples) == 20
    assert shown[0] == shown[1]
    assert sum(map(len, shown[0])) < 1_500_000


# --- Reports, which need no torchmetrics -----------------------------------------------------


def report_of(custom: CustomMetric, drop: float, **others: Any) -> dict[str, Any]:
    found = EndMetric(
        images=40, task="restoration", custom=custom, drop=drop,
        drop_interval=Interval(drop - 0.5, drop + 0.5, 0.95, "drawn"), **others,
    )  # fmt: skip
    return build_report(Result(Versions("1", "2", "3"), "net", test=found))


@pytest.mark.parametrize(
    ("custom", "drop", "says"),
    [
        (CustomMetric("mIoU", 0.61, 0.59, "fraction"), 2.0,
         "mIoU 61.00% → 59.00% on 40 test images: -2.00 points (95% interval -2.50 to -1.50). "
         "The loss is more than chance explains."),
        (CustomMetric("PSNR", 31.5, 31.25, "dB"), 0.25,
         "PSNR 31.5 dB → 31.25 dB on 40 test images: -0.25 dB (95% interval -0.75 to +0.25). "
         "The interval holds zero: chance alone could explain the change."),
        (CustomMetric("MAE", 4.0, 5.0, "", True), 1.0,
         "MAE 4 → 5 on 40 test images: +1.0000 (95% interval +0.5000 to +1.5000); lower is better. "
         "The loss is more than chance explains."),
    ],
)  # fmt: skip
def test_sentences(custom: CustomMetric, drop: float, says: str) -> None:
    assert says.replace("-", text.MINUS) in html.unescape(render_html(report_of(custom, drop)))


def test_panels_are_shown_and_escaped() -> None:
    example = Example(3, 20.0, 19.0, ATTACK)
    report = report_of(CustomMetric("PSNR", 31.5, 31.25, "dB"), 0.25, examples=(example,))
    page = render_html(report, Pictures(panels={3: ((ATTACK, b"png"),)}))
    assert ATTACK not in page
    assert page.count("data:image/png;base64,cG5n") == 1
    assert "20 dB → 19 dB" in page
