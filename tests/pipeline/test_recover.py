"""``compress recover`` from start to end: better, never worse, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from workbench import SPEC, Workbench, command, made_images, paragraph, trained

import compress
from compress.artefact.manifest import read_manifest
from compress.data import Loader, as_images
from compress.data.held import hold
from compress.errors import ArtefactError, ModelError
from compress.files import RECOVERY_FILE
from compress.network.baseline import prepare
from compress.pipeline import recover as pipeline
from compress.pipeline.recovery_stage import Recovering, Wish, kept_by_user
from compress.pipeline.run import compress_model
from compress.recover import Distance, Division, Task, search

# Ranks that hurt, and no refit, so that there is something to recover.
RANKS = ("--rank", "conv1=1", "--rank", "conv2=1", "--no-refit", "--keep", "head")


@pytest.fixture
def small(bench: Workbench) -> Path:
    found = bench.run(*RANKS, output=str(bench.output("small")))
    assert found.exit_code == 0, found.output
    return bench.output("small")


def recover(bench: Workbench, *flags: str, out: str = "better", **replaced: str) -> Any:
    values = {
        "checkpoint": bench.checkpoint, "data": bench.train, "test": bench.test, "model": SPEC,
        "output": str(bench.output(out)), **replaced,
    }  # fmt: skip
    named = [part for key, value in values.items() if value for part in (f"--{key}", value)]
    return command("recover", str(bench.output("small")), *named, "--no-latency", *flags)


def stop_at(patch: pytest.MonkeyPatch, look: int) -> None:
    """Have Ctrl-C come while the state is written for the nth time."""
    written, looks = pipeline.write_state, []

    def stopped(*arguments: Any) -> None:
        written(*arguments)
        looks.append(1)
        if len(looks) == look:
            raise KeyboardInterrupt

    patch.setattr(pipeline, "write_state", stopped)


def found_report(bench: Workbench, name: str) -> str:
    return (bench.output(name) / "report.html").read_text()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def test_outputs_come_nearer_and_all_else_stays(bench: Workbench, small: Path) -> None:
    found = recover(bench, "--steps", "400")
    assert found.exit_code == 0, found.output
    result = bench.report("better")["result"]
    recovery = result["recovery"]
    assert recovery["best"] < 0.8 * recovery["start"]
    assert recovery["checks"][0] == {"step": 0, "distance": recovery["start"]}
    assert (recovery["images"], recovery["held_out_images"]) == (36, 12)
    assert result["test"]["agreement"] >= bench.report("small")["result"]["test"]["agreement"]
    assert "Recovered in 400 steps on 36 images without labels" in found.stdout
    assert "Recovery, step by step" in (bench.output("better") / "report.md").read_text()
    assert 'id="recovery"' in (bench.output("better") / "report.html").read_text()
    before, after = (read_manifest(x) for x in (small, bench.output("better")))
    assert after.replacements == before.replacements
    assert after.recovered
    assert not before.recovered
    assert result["cost"]["compressed"] == bench.report("small")["result"]["cost"]["compressed"]
    old, new = tensors(small), tensors(bench.output("better"))
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not any(name.startswith("head") for name in changed)  # what the user kept
    assert not bench.output("better.unfinished").exists()
    compress.load(bench.output("better"), trust_code=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_steps_give_the_same_bytes_again_and_after_a_stop(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(search, "_mixed", lambda *_: precision == "mixed")
    assert recover(bench, "--steps", "60", out="first").exit_code == 0
    assert recover(bench, "--steps", "60", out="again").exit_code == 0
    whole = (bench.output("first") / "model.safetensors").read_bytes()
    assert (bench.output("again") / "model.safetensors").read_bytes() == whole

    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        found = recover(bench, "--steps", "60", out="stopped")
    assert found.exit_code == 130
    assert "--resume" in found.stderr
    unfinished = bench.output("stopped.unfinished")
    # A network that can be used as it is, though nothing has verified it.
    compress.load(unfinished, trust_code=True)
    assert not read_manifest(unfinished).verified
    assert recover(bench, "--steps", "60", "--resume", out="stopped").exit_code == 0
    assert (bench.output("stopped") / "model.safetensors").read_bytes() == whole
    recovery = bench.report("stopped")["result"]["recovery"]
    assert recovery["precision"] == precision
    report = found_report(bench, "stopped")
    said = "Both networks computed in mixed precision" in report
    assert said is (precision == "mixed")
    assert not unfinished.exists()


def test_chains_become_the_same_layers_again(bench: Workbench, small: Path) -> None:
    found = recover(bench, "--steps", "60", "--overparam", "2")
    assert found.exit_code == 0, found.output
    recovery = bench.report("better")["result"]["recovery"]
    assert recovery["overparam"] == 2
    assert recovery["best"] < recovery["start"]
    old, new = tensors(small), tensors(bench.output("better"))
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}
    assert torch.equal(old["head.weight"], new["head.weight"])


@pytest.mark.usefixtures("small")
def test_a_loss_of_ones_own_compares_with_the_originals_outputs(
    bench: Workbench, tmp_path: Path
) -> None:
    code = tmp_path / "goal.py"
    code.write_text("def squares(new, old):\n    return (new - old).pow(2).sum()")
    found = recover(bench, "--steps", "60", "--loss-fn", f"{code}:squares")
    assert found.exit_code == 0, found.output
    recovery = bench.report("better")["result"]["recovery"]
    assert recovery["best"] < recovery["start"]


def test_run_recovers_too(bench: Workbench) -> None:
    found = bench.run(*RANKS, "--recover", "0.02")
    assert found.exit_code == 0, found.output
    result = bench.report()["result"]
    assert result["recovery"]["best"] <= result["recovery"]["start"]
    assert result["recovery"]["before"] is not None
    assert "recover" in result["seconds"]
    assert read_manifest(bench.output()).recovered


def test_the_picked_point_of_a_sweep_recovers(bench: Workbench) -> None:
    found = command(
        "sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--test", bench.test,
        "--macs", "0.9,0.5", "--pick", "macs<=0.6", "--recover", "0.02",
        "--output", str(bench.output("sweep")),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    chosen = json.loads((bench.output("sweep") / "chosen" / "report.json").read_text())["result"]
    assert chosen["recovery"]["best"] <= chosen["recovery"]["start"]


def test_a_recovery_that_fails_leaves_the_fitted_network(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArtefactError("The images are gone.")

    monkeypatch.setattr("compress.pipeline.run.recovered_in_run", fail)
    text = paragraph(bench.run(*RANKS, "--recover", "0.02"), 3)
    assert "the fitted model" in text
    assert (bench.output("out.unfinished") / "model.safetensors").is_file()


def test_what_cannot_recover_is_said_before_any_work(bench: Workbench) -> None:
    text = paragraph(bench.run(*RANKS, "--recover", "0.02", **one_image(bench)), 3)
    assert "at least two" in text
    assert bench.leftovers() == ["one.npz"]
    text = paragraph(bench.run("--keep", "*", "--macs", "1", "--recover", "0.02"), 2)
    assert "nothing to learn" in text
    text = paragraph(bench.run(*RANKS, "--recover", "1", "--progressive"), 2)
    assert "contradict each other" in text
    text = paragraph(bench.run(*RANKS, "--recover", "0"), 2)
    assert "minutes above 0" in text


class Detached(torch.nn.Module):
    """No gradient comes back to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.detach())


class Spoiled(Detached):
    """Changes in place what the gradient of a weight needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layers[0](x)
        x.mul_(2)
        return self.layers[2](found.relu())


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("kind", [Detached, Spoiled])
def test_whatever_gives_gradients_of_weights_can_recover(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    given = {"params": 0.5, "recover": 0.01, "refit": False}
    found = compress_model(kind().eval(), torch.randn(60, 16), **given)
    assert found.result.recovery is not None
    assert found.result.recovery.best <= found.result.recovery.start


@pytest.mark.usefixtures("bench")  # for its clock
def test_a_program_can_recover() -> None:
    images = torch.tensor(made_images(48, seed=1)[0]).unsqueeze(1).float() / 255
    made = compress_model(
        trained(), images, rank={"conv1": "1", "conv2": "1"}, refit=False, recover=0.02,
        no_latency=True,
    )  # fmt: skip
    assert made.result.recovery is not None
    assert made.result.recovery.steps >= 1


@pytest.mark.usefixtures("bench")  # for its clock
@pytest.mark.parametrize(("learned", "kept"), [(1e-4, False), (0.5, True)])
def test_what_rounding_undoes_is_not_kept(learned: float, kept: bool) -> None:
    original, model = trained(), trained()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.bfloat16())
        original.head.weight.copy_(model.head.weight * (1 + learned))
    pictures = torch.tensor(made_images(48, seed=1)[0]).unsqueeze(1).float() / 255
    loader = Loader(16)
    sets = [hold(as_images(part), loader) for part in (pictures[:32], pictures[32:])]
    reading = prepare(original, pictures[:1]).reading
    keep = frozenset(name for name, _ in model.named_parameters() if not name.startswith("head"))
    job = Task(original, Division(*sets), loader, Distance(reading), keep)
    recovering = Recovering(model, job, Wish(steps=60), torch.bfloat16)
    course = recovering.begin()
    found = recovering.run(course)
    assert (found is not model) is kept
    assert (course.state.best < course.state.start) is kept
    assert (course.state.best_step > 0) is kept


@pytest.mark.usefixtures("bench")
def test_what_finds_more_or_fewer_things_is_compressed_and_not_recovered_in_a_run() -> None:
    class Finder(torch.nn.Module):
        """Returns as many boxes as an image has bright places."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = trained()

        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            scores = self.layers(x)
            bright = (x > 0.6).flatten(1).sum(1).tolist()
            return [
                {"boxes": s.expand(n, 3), "scores": s[0].expand(n)}
                for s, n in zip(scores, bright, strict=True)
            ]

    pictures = torch.tensor(made_images(48, seed=1)[0]).unsqueeze(1).float() / 255
    made = compress_model(Finder().eval(), pictures, macs=0.6, no_latency=True)
    assert made.network.reading.parts == ()
    assert made.plan.metric == "loss"
    assert made.result.layers[1].scheme != "dense"
    with pytest.raises(ModelError, match="number of outputs differs from image to image"):
        compress_model(Finder().eval(), pictures, macs=0.6, recover=0.02)


def other_checkpoint(bench: Workbench) -> dict[str, str]:
    state = load_file(bench.checkpoint)
    path = bench.folder / "other.safetensors"
    save_file({name: t + 1 if t.is_floating_point() else t for name, t in state.items()}, path)
    return {"checkpoint": str(path)}


def one_image(bench: Workbench) -> dict[str, str]:
    np.savez(bench.folder / "one.npz", images=np.zeros((1, 8, 8), np.uint8))
    return {"data": f"tensors:{bench.folder / 'one.npz'}"}


def larger_images(bench: Workbench) -> dict[str, str]:
    np.savez(bench.folder / "rgb.npz", images=np.zeros((4, 3, 8, 8), np.uint8))
    return {"data": f"tensors:{bench.folder / 'rgb.npz'}"}


def no_checkpoint(bench: Workbench) -> dict[str, str]:
    del bench
    return {"checkpoint": ""}


def nothing(bench: Workbench) -> dict[str, str]:
    del bench
    return {}


BAD: list[tuple[str, Any, tuple[str, ...], int, str]] = [
    ("no original", no_checkpoint, (), 2, "No checkpoint given"),
    ("another original", other_checkpoint, (), 3, "Pass the original that was compressed"),
    ("one image", one_image, (), 3, "at least two"),
    ("other images", larger_images, (), 3, "channels"),
    ("no time", nothing, ("--minutes", "0"), 2, "more than 0"),
    ("two lengths", nothing, ("--minutes", "1", "--steps", "2"), 2, "give one of them"),
    ("nothing to go on from", nothing, ("--steps", "2", "--resume"), 3, "Leave out --resume"),
    ("too deep", nothing, ("--steps", "2", "--overparam", "9999999"), 2, "smaller depth"),
]


@pytest.mark.parametrize(("make", "flags", "code", "said"), [b[1:] for b in BAD],
                         ids=[b[0] for b in BAD])  # fmt: skip
def test_bad_input(
    bench: Workbench, small: Path, make: Any, flags: tuple[str, ...], code: int, said: str
) -> None:
    del small
    text = paragraph(recover(bench, *flags, **make(bench)), code)
    assert said in text
    assert not bench.output("better").exists()
    assert not bench.output("better.unfinished").exists()


def test_a_result_of_which_no_layer_was_rewritten(bench: Workbench) -> None:
    kept = bench.run("--keep", "*", "--macs", "1", output=str(bench.output("small")))
    assert kept.exit_code == 0, kept.output
    assert "nothing to recover" in paragraph(recover(bench, "--steps", "2"), 2)


def test_a_full_disk_loses_nothing(
    bench: Workbench, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ArtefactError("The disk is full.")

    monkeypatch.setattr(pipeline, "write_state", full)
    assert "disk is full" in paragraph(recover(bench, "--steps", "2"), 3)
    assert not bench.output("better").exists()
    assert tensors(small)


def test_a_state_never_takes_the_place_of_what_a_failed_run_left(
    bench: Workbench, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArtefactError("The images are gone.")

    with monkeypatch.context() as patch:
        patch.setattr("compress.pipeline.run.recovered_in_run", fail)
        assert bench.run(*RANKS, "--recover", "0.02").exit_code == 3
    left = bench.output("out.unfinished")
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    text = paragraph(recover(bench, "--steps", "2", out="out"), 3)
    assert "is that of a run that failed" in text
    small.rename(bench.output("other"))
    small.symlink_to(left)
    text = paragraph(recover(bench, "--steps", "2", out="out"), 3)
    assert "is what is to be recovered" in text
    assert {p.name: p.read_bytes() for p in left.iterdir()} == before


@pytest.mark.usefixtures("small")
def test_a_broken_limit_loses_nothing_that_was_learned(bench: Workbench) -> None:
    assert recover(bench, "--steps", "30", out="whole").exit_code == 0
    broken = recover(bench, "--steps", "30", "--max-layer-relative-mse", "0")
    assert broken.exit_code == 1
    assert "--resume" in broken.stderr
    assert not (bench.output("better") / "model.safetensors").exists()
    found = recover(bench, "--steps", "30", "--resume", "--force")
    assert found.exit_code == 0, found.output
    files = [bench.output(name) / "model.safetensors" for name in ("whole", "better")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not bench.output("better.unfinished").exists()


def test_globs_for_layers_do_not_keep_blocks() -> None:
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model = torch.nn.Sequential(block, torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    network = prepare(model.eval(), torch.rand(1, 3, 6, 6))
    assert kept_by_user(network, {"keep": ("*0",)}) == {"0.0"}
    assert kept_by_user(network, {"keep": ("1",)}) == {"1"}
    assert kept_by_user(network, {"keep": ("3.bias",)}) == {"3.bias"}


@pytest.mark.usefixtures("small")
def test_chains_are_the_same_each_time(bench: Workbench) -> None:
    for name in ("first", "second"):
        torch.manual_seed(hash(name) % 1000)
        assert recover(bench, "--steps", "4", "--overparam", "2", out=name).exit_code == 0
    first, second = (tensors(bench.output(name)) for name in ("first", "second"))
    assert all(torch.equal(second[name], t) for name, t in first.items())


@pytest.mark.usefixtures("small")
def test_a_loss_of_ones_own_may_overflow_on_the_way(bench: Workbench, tmp_path: Path) -> None:
    code = tmp_path / "goal.py"
    code.write_text(
        "calls = []\n"
        "def squares(new, old):\n"
        "    calls.append(1)\n"
        "    return (new - old).pow(2).sum() * (float('nan') if len(calls) == 30 else 1)"
    )
    found = recover(bench, "--steps", "60", "--loss-fn", f"{code}:squares")
    assert found.exit_code == 0, found.output
    assert bench.report("better")["result"]["recovery"]["steps_back"] == 1


def test_the_state_of_another_recovery_is_refused(
    bench: Workbench, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert recover(bench, "--steps", "4").exit_code == 130
    text = paragraph(recover(bench, "--steps", "5", "--resume"), 3)
    assert "it differs in steps" in text
    state = bench.output("better.unfinished") / RECOVERY_FILE
    state.write_bytes(state.read_bytes()[:-8])
    assert "damaged" in paragraph(recover(bench, "--steps", "4", "--resume"), 3)
    assert json.loads((small / "report.json").read_text())["kind"] == "run"
