"""Channels taken out by whole runs: by one call, by the command line, and as a plan says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks.narrow import Branching, mobile, settled, vgg, without_biases
from places import NETWORKS
from safetensors.torch import save_file
from stopwatch import stop_the_clock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workbench import Workbench, command, made_images, paragraph

import compress
from compress.artefact.manifest import read_manifest
from compress.choose import check_plan
from compress.errors import PlanError
from compress.measure.layers import measure_layers
from compress.network.baseline import Network
from compress.pipeline.outcome import Compressed
from compress.pipeline.verify import verified_layers
from compress.plan import NARROW, Choice, Plan, read_plan

BUILD: dict[str, Callable[[], nn.Module]] = {
    "mobile": mobile, "vgg": vgg, "no biases": without_biases,
}  # fmt: skip
SPEC = f"{NETWORKS / 'narrow.py'}:mobile"
FEW: dict[str, Any] = {"macs": 0.6, "no_latency": True}


def images(count: int = 64, seed: int = 1) -> Tensor:
    pixels, _ = made_images(count, seed=seed)
    return torch.tensor(pixels).unsqueeze(1).float() / 255


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    return counter.get_total_flops() // 2


def narrow(made: Compressed) -> list[Choice]:
    return [c for c in made.plan.choices if c.width is not None]


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


@pytest.mark.parametrize("refit", [True, False], ids=["refit", "as fitted"])
@pytest.mark.parametrize("name", list(BUILD))
def test_a_run_keeps_its_budget_and_reloads_exactly(
    name: str, tmp_path: Path, *, refit: bool
) -> None:
    model = settled(BUILD[name]())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = [tmp_path / "first", tmp_path / "second"]
    first, second = (
        compress.compress_model(model, images(), output=str(p), refit=refit, **FEW) for p in places
    )
    assert macs(first.model) <= 0.6 * macs(model)
    assert NARROW in {c.scheme for c in narrow(first)}
    assert first.plan == second.plan
    files = [(p / "model.safetensors").read_bytes() for p in places]
    assert files[0] == files[1]
    loaded = compress.load(places[0], model=BUILD[name]())
    with torch.no_grad():
        assert torch.equal(loaded(images(9)), first.model(images(9)))
    assert macs(loaded) == macs(first.model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # No module is added where channels only go.
    for choice in narrow(first):
        was, now = model.get_submodule(choice.name), loaded.get_submodule(choice.name)
        if choice.scheme == NARROW:
            assert type(now) is type(was)
    result = first.result
    assert result.refit_path == ("graph" if refit else "none") or "taken back" in (
        result.refit_reason
    )
    layers = {layer.name: layer for layer in result.layers}
    for choice in first.plan.choices:
        row = layers[choice.name]
        assert row.scheme == choice.scheme
        assert row.width == choice.width
        assert (row.macs, row.params) == (choice.macs, choice.params)
        if choice.width is not None:
            assert row.rewritten
            assert row.bytes == 4 * sum(
                p.numel() for p in loaded.get_submodule(choice.name).parameters()
            )
    assert result.cost.compressed.macs == macs(first.model)
    report = json.loads((places[0] / "report.json").read_text())["result"]
    rows = {row["name"]: row for row in report["layers"]}
    for choice in narrow(first):
        assert rows[choice.name]["width"] == list(choice.width or ())


def test_what_goes_through_a_group_becomes_narrower_with_it() -> None:
    """A norm that nothing takes in, slopes of each channel, a flattened picture."""
    model = settled(vgg())
    made = compress.compress_model(model, images(), macs=0.4, refit=False, no_latency=True)
    widths = {c.name: c.width for c in narrow(made)}
    assert {"0", "3", "6"} <= set(widths)
    new = made.model
    assert isinstance(new[2], nn.BatchNorm2d)
    assert new[2].num_features == len(new[2].running_mean) == len(new[2].weight) < 12
    assert new[4].num_parameters == len(new[4].weight)
    assert new[4].num_parameters == (widths["3"] or (0, 16))[1]
    assert new[2].num_features == (widths["3"] or (12, 0))[0]


def test_schemes_without_it_and_networks_without_a_graph_have_none() -> None:
    made = compress.compress_model(settled(vgg()), images(), schemes=("output",), **FEW)
    assert not narrow(made)
    assert {c.scheme for c in made.plan.choices} <= {"output", "dense"}
    branching = settled(Branching())
    made = compress.compress_model(branching, images(), refit=False, **FEW)
    assert made.network.graph is None
    assert not narrow(made)
    assert macs(made.model) <= 0.6 * macs(branching)


def test_layers_kept_on_request_stay_bit_for_bit() -> None:
    model = settled(mobile())
    made = compress.compress_model(model, images(), keep=("first.3",), **FEW)
    hidden = {c.name for c in narrow(made)} & {"first.0", "first.3"}
    assert not hidden
    assert made.plan["first.3"].locked
    folded = made.network.model.get_submodule("first.3")
    assert torch.equal(
        made.model.get_submodule("first.3").get_parameter("weight"), folded.get_parameter("weight")
    )


@pytest.fixture(scope="module")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan that `plan` wrote and the result that `run` made."""
    folder = tmp_path_factory.mktemp("narrow")
    bench = Workbench.make(folder, settled(mobile()))
    with pytest.MonkeyPatch.context() as patch:
        stop_the_clock(patch)
        found = bench.run("--macs", "0.6", model=SPEC)
    assert found.exit_code == 0, found.stderr
    assert NARROW in found.stdout
    return folder


def apply(folder: Path, plan: Path, output: str) -> Any:
    bench = Workbench(folder)
    return command(
        "apply", str(plan), "--checkpoint", bench.checkpoint, "--data", bench.train,
        "--test", bench.test, "--output", str(bench.output(output)), "--trust-code", "--force",
    )  # fmt: skip


def test_the_plan_of_a_run_gives_the_same_bytes_again(bench_folder: Path) -> None:
    bench = Workbench(bench_folder)
    written = bench.folder / "written.json"
    made = command(
        "plan", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--macs", "0.6",
        "--output", str(written),
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert read_plan(written) == read_plan(bench.output() / "plan.json")
    found = apply(bench_folder, bench.output() / "plan.json", "again")
    assert found.exit_code == 0, found.stderr
    first, again = (bench.output(n) / "model.safetensors" for n in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()
    model = compress.load(bench.output("again"), trust_code=True)
    assert macs(model) <= 0.6 * macs(settled(mobile()))
    verified = command(
        "verify", str(bench.output()), "--test", bench.test, "--checkpoint", bench.checkpoint,
        "--trust-code",
    )  # fmt: skip
    assert verified.exit_code == 0, verified.stderr
    assert NARROW in verified.stdout


Edit = Callable[[dict[str, Any]], None]


def edited(folder: Path, *edits: Edit) -> Path:
    plan = json.loads((folder / "out" / "plan.json").read_text())
    choices = {c["name"]: c for c in plan["choices"]}
    for edit in edits:
        edit(choices)
    path = folder / "edited.json"
    path.write_text(json.dumps(plan))
    return path


def group(choices: dict[str, Any], hidden: int) -> None:
    """Make the second block's hidden channels so many, all members."""
    expand, depthwise, project = (choices[f"second.{i}"] for i in (0, 3, 6))
    for choice, width in (
        (expand, (_inputs(expand), hidden)), (depthwise, (hidden, hidden)),
        (project, (hidden, _outputs(project))),
    ):  # fmt: skip
        choice.update(width=list(width), scheme=NARROW, ranks=[])


def _inputs(choice: dict[str, Any]) -> int:
    return choice["width"][0] if choice["width"] else int(choice["shape"].split("→")[0])


def _outputs(choice: dict[str, Any]) -> int:
    return choice["width"][1] if choice["width"] else int(choice["shape"].split("→")[1].split()[0])


def test_another_width_for_a_whole_group_is_carried_out(bench_folder: Path) -> None:
    plan = edited(bench_folder, lambda choices: group(choices, 7))
    found = apply(bench_folder, plan, "edited")
    assert found.exit_code == 0, found.stderr
    model = compress.load(Workbench(bench_folder).output("edited"), trust_code=True)
    block = model.second
    assert (block[0].out_channels, block[3].groups, block[6].in_channels) == (7, 7, 7)
    assert block[3].weight.shape == (7, 1, 3, 3)


def test_a_group_that_is_whole_again_is_not_narrow(bench_folder: Path) -> None:
    plan = edited(bench_folder, lambda choices: group(choices, 20))
    found = apply(bench_folder, plan, "whole")
    assert found.exit_code == 0, found.stderr
    written = read_plan(Workbench(bench_folder).output("whole") / "plan.json")
    assert written["second.3"].width is None
    assert written["second.3"].scheme == "dense"
    model = compress.load(Workbench(bench_folder).output("whole"), trust_code=True)
    assert model.second[3].weight.shape == (20, 1, 3, 3)


def one(choices: dict[str, Any], name: str, **changes: Any) -> None:
    choices[name].update(changes)


WRONG: dict[str, tuple[list[Edit], list[str]]] = {
    "one member alone": (
        [lambda c: group(c, 7), lambda c: one(c, "second.3", width=[6, 6])],
        ["layer 'second.3': its width is [6, 6], and [7, 7] is what"],
    ),
    "only the first": (
        [lambda c: group(c, 7), lambda c: one(c, "second.0", width=[_inputs(c["second.0"]), 9])],
        ["layer 'second.3': its width is [7, 7], and [9, 9]", "layer 'second.6': its width is [7,"],
    ),
    "larger than the layer": (
        [lambda c: group(c, 21)], ["layer 'second.3': width [21, 21] is outside 1 to [20, 20]"],
    ),
    "zero": (
        [lambda c: group(c, 0)], ["layer 'second.3': width [0, 0] is outside 1 to [20, 20]"],
    ),
    "a layer that cannot be narrowed": (
        [lambda c: one(c, "head", width=[_inputs(c["head"]), 2], scheme=NARROW, ranks=[])],
        ["layer 'head': its width is", "they are an output of the network"],
    ),
    "a sum of two": (
        [lambda c: one(c, "first.6", width=[_inputs(c["first.6"]), 3], scheme=NARROW, ranks=[])],
        ["layers that make the same channels do not keep as many", "3 of 'first.6'"],
    ),
    "narrow without a width": (
        [lambda c: one(c, "second.3", width=None, scheme=NARROW, ranks=[])],
        ["layer 'second.3': a narrow layer has a width"],
    ),
    "dense with a width": (
        [lambda c: group(c, 7), lambda c: one(c, "second.3", scheme="dense")],
        ["layer 'second.3': a dense layer has no width"],
    ),
    "a rank beyond the width": (
        [lambda c: group(c, 3), lambda c: one(c, "second.6", scheme="output", ranks=[8])],
        ["layer 'second.6': ranks [8] are outside 1 to ["],
    ),
    "narrow with ranks": (
        [lambda c: group(c, 3), lambda c: one(c, "second.6", ranks=[1])],
        ["layer 'second.6': a narrow layer has no ranks"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_widths_that_do_not_fit_are_told_before_any_work(
    case: str, bench_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, messages = WRONG[case]
    plan = edited(bench_folder, *edits)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("images were looked at")

    monkeypatch.setattr("compress.pipeline.job.Job.with_images", never)
    monkeypatch.setattr("compress.pipeline.job.Job.calibrate", never)
    said = " ".join(paragraph(apply(bench_folder, plan, "wrong"), 2).split())
    assert "The plan does not fit the model" in said
    for message in messages:
        assert message in said
    assert not Workbench(bench_folder).output("wrong").exists()


def test_all_that_is_wrong_is_listed() -> None:
    made = compress.compress_model(settled(mobile()), images(), refit=False, **FEW)
    network = made.network

    def wrong(choice: Choice) -> Choice:
        if choice.name == "second.3":
            return replace(choice, scheme=NARROW, width=(99, 99), ranks=())
        if choice.name == "head":
            return replace(choice, scheme="outputt", ranks=(1,))
        if choice.name == "stem.0":
            return replace(choice, scheme=NARROW, ranks=(), width=(1, 2))
        return choice

    plan = replace(made.plan, choices=tuple(map(wrong, made.plan.choices)))
    with pytest.raises(PlanError) as caught:
        check_plan(plan, network.sites, network.channels)
    for part in ("[99, 99] is outside", "no scheme 'outputt'", "2 of 'stem.0'"):
        assert part in str(caught.value)
    twice = replace(made.plan, choices=(*made.plan.choices, made.plan.choices[0]))
    with pytest.raises(PlanError, match=r"'stem\.0' is in the plan twice"):
        check_plan(twice, network.sites, network.channels)
    assert check_plan(made.plan, network.sites, network.channels) == made.plan
    assert _without_graph(network, made.plan)


def _without_graph(network: Network, plan: Plan) -> bool:
    """Whether a plan with widths is refused where no channels are known."""
    from compress.network.channels import ChannelMap

    with pytest.raises(PlanError, match="what the widths of the layers around it leave"):
        check_plan(plan, network.sites, ChannelMap())
    return True


def test_weights_in_half_precision(tmp_path: Path) -> None:
    """Saved as they came; the report counts two bytes a number."""
    model = settled(mobile()).bfloat16()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    made = compress.compress_model(model, images(), refit=False, output=str(tmp_path / "o"), **FEW)
    assert narrow(made)
    loaded = compress.load(tmp_path / "o", model=mobile())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for layer in made.result.layers:
        if layer.scheme == NARROW:
            weight = loaded.get_submodule(layer.name)
            assert layer.bytes == 2 * sum(p.numel() for p in weight.parameters())


def test_streams_are_cut_in_directions_unless_that_is_left_out(tmp_path: Path) -> None:
    model = settled(mobile())
    with_slices, without = (
        compress.compress_model(
            model, images(), macs=0.5, refit=False, no_latency=True, schemes=schemes,
            output=str(tmp_path / schemes[-1]),
        )
        for schemes in (("narrow", "slice"), ("narrow",))
    )  # fmt: skip
    assert "slice" in {c.scheme for c in with_slices.plan.choices}
    assert "slice" not in {c.scheme for c in without.plan.choices}
    assert (with_slices.plan.slices, without.plan.slices) == (True, False)
    for made, name in ((with_slices, "slice"), (without, "narrow")):
        assert read_plan(tmp_path / name / "plan.json").slices == made.plan.slices
        loaded = compress.load(tmp_path / name, model=mobile())
        with torch.no_grad():
            assert torch.equal(loaded(images(5)), made.model(images(5)))
        assert macs(loaded) <= 0.5 * macs(model)


def test_narrower_layers_of_a_result_are_compared_with_the_original(tmp_path: Path) -> None:
    """What a run measured is measured again from the file, which says which channels stay."""
    model = settled(mobile())
    made = compress.compress_model(
        model, images(), **FEW, schemes=("output", "narrow"), output=str(tmp_path / "out")
    )
    manifest = read_manifest(tmp_path / "out")
    batches = [(images(40, seed=3), None)]
    read = compress.load(tmp_path / "out", model=mobile())
    found = {x.name: x for x in verified_layers(made.network, manifest, read, batches)}
    names = [c.name for c in made.plan.choices if c.rewritten]
    expected = measure_layers(made.network.model, made.model, names, batches, made.cut)
    assert {w.name for w in manifest.widths} & set(names)
    assert [n for n in found if found[n].errors.validation_alone is not None] == names
    for name, (alone, in_place) in expected.items():
        errors = found[name].errors
        assert errors.validation_alone == alone
        assert errors.validation_in_place == in_place


def test_of_mixtures_nothing_says_what_they_are_compared_with(tmp_path: Path) -> None:
    made = compress.compress_model(
        settled(mobile()), images(), macs=0.85, no_latency=True, schemes=("slice",),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "out")
    assert all(w.inputs_kept == w.outputs_kept == () for w in manifest.widths)
    read = compress.load(tmp_path / "out", model=mobile())
    layers = verified_layers(made.network, manifest, read, [(images(40), None)])
    sliced = [x for x in layers if x.name in {w.name for w in manifest.widths}]
    assert sliced
    assert all(x.errors.validation_alone is None for x in sliced)
