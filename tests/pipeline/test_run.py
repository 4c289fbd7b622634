"""The main job for programs: one call, the same verbs, nothing of the user's changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn
from workbench import SPEC, Workbench, made_images, trained

import compress
from compress.errors import ArtefactError, BudgetError, ConfigError, GateError, ModelError
from compress.pipeline.run import compress_model

NETWORK = trained()
RANKS: dict[str, Any] = {"rank": {"conv1": "3", "conv2": "4"}}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    pixels, labels = made_images(count, seed=seed)
    return torch.tensor(pixels).unsqueeze(1).float() / 255, torch.tensor(labels)


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


def test_one_call_does_what_the_command_does(bench: Workbench) -> None:
    ranks = ("--rank", "conv1=3", "--rank", "conv2=4")
    assert bench.run(*ranks).exit_code == 0
    made = compress.compress_model(
        NETWORK,
        images(48, 1),
        test=images(24, 2),
        spec=SPEC,
        output=str(bench.output("api")),
        **RANKS,
    )
    by_command = compress.load(bench.output(), trust_code=True).state_dict()
    by_call = compress.load(bench.output("api"), trust_code=True).state_dict()
    assert by_command.keys() == by_call.keys()
    for name, tensor in by_command.items():
        torch.testing.assert_close(by_call[name], tensor)
    assert made.result.test is not None
    before = bench.report()["result"]
    assert made.result.test.top1_after == before["test"]["top1_after"]
    assert (bench.output("api") / "report.html").exists()
    assert made.failed_gates == ()
    plan = json.loads((bench.output("api") / "plan.json").read_text())
    assert [c["ranks"] for c in plan["choices"]] == [[3], [4], []]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"macs": 0.6, "keep": ("*",)}, BudgetError, "smallest reachable fraction is 1"),
        ({"macs": 0.6, "max_drop": 1.0}, ConfigError, "--max-drop holds .* pass one with --test"),
        ({"macs": 0.6, "min_agreement": 0.9}, ConfigError, "--min-agreement holds"),
    ],
)
def test_what_cannot_be_held_is_an_error(
    settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        compress.compress_model(NETWORK, images(24, 1), **settings)


def test_the_users_model_and_the_random_state_stay_as_they_were() -> None:
    model = copy.deepcopy(NETWORK).train()
    model.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    compress_model(model, images(24, 1), **RANKS)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_full_rank_is_the_identity() -> None:
    made = compress_model(
        NETWORK, images(24, 1), rank={"*": "99"}, force_rank=True, metric="mse", refit=False
    )
    assert [c.rewritten for c in made.plan.choices] == [True, True, True]
    inputs, _ = images(8, 5)
    with torch.no_grad():
        torch.testing.assert_close(made.model(inputs), NETWORK(inputs), atol=1e-4, rtol=1e-4)


def test_predicted_errors_are_those_measured_on_the_same_images() -> None:
    made = compress_model(
        NETWORK,
        images(40, 1),
        metric="mse",
        schemes=("output",),
        refit=False,
        augment=False,
        **RANKS,
    )
    for layer in made.result.layers[:2]:
        assert layer.errors.fit_alone is not None
        assert layer.predicted_mse == pytest.approx(layer.errors.fit_alone.mse, rel=1e-3)


def test_without_norms_folded_the_baseline_is_not_flattered() -> None:
    made = compress_model(NETWORK, images(24, 1), keep=("*",))
    cost = made.result.cost
    assert cost.folded is not None
    assert cost.folded == cost.compressed
    assert cost.original is not None
    assert cost.original.params - cost.folded.params == 8
    assert made.result.folded == ("norm",)


def test_a_failed_gate_raises_and_writes_only_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateError, match="limit is at least"):
        compress_model(
            NETWORK, images(24, 1), test=images(24, 2), output=str(out), min_agreement=1.0,
            rank={"*": "1"}, force_rank=True, refit=False,
        )  # fmt: skip
    assert not (out / "model.safetensors").exists()
    assert (out / "report.json").exists()


def test_a_saved_model_that_differs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline import folder

    real = folder.save

    def flipped(model: nn.Module, *rest: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(other.parameters()).view(-1)[0] += 1e-6
        return real(other, *rest)

    monkeypatch.setattr(folder, "save", flipped)
    with pytest.raises(ArtefactError, match="read back, does not equal"):
        compress_model(NETWORK, images(24, 1), output=str(tmp_path / "out"), **RANKS)
    assert [p.name for p in tmp_path.iterdir()] == ["out.unfinished"]


def test_one_image_is_enough_to_run() -> None:
    made = compress_model(NETWORK, images(1, 1)[0], energy=0.9)
    assert any("fewer than 10 samples" in w for w in made.result.warnings)
    with torch.no_grad():
        assert torch.isfinite(made.model(images(4, 2)[0])).all()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'energy'"):
        compress_model(NETWORK, images(4, 1), enegry=0.9)
    with pytest.raises(ModelError, match="forward failed"):
        compress_model(NETWORK, torch.rand(4, 2, 8, 8))


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"thesis\.tex"):
        compress_model(NETWORK, torch.rand(4, 2, 8, 8), output=str(tmp_path))
