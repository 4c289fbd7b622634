"""Building, reading and rendering reports; limits, baselines and everything that is refused."""

from __future__ import annotations

import copy
import csv
import dataclasses
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_examples as examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.errors import ArtefactError, UsageError
from compress.report import (
    LIMITS,
    build_comparison,
    build_report,
    build_sweep_report,
    check_gates,
    compare_with_baseline,
    gate_sentence,
    read_report,
    render_csv,
    render_html,
    render_json,
    render_junit,
    render_markdown,
    result_of,
    text,
    with_gates,
    with_notes,
    write_report,
)
from compress.report.page import Pictures, embed
from compress.report.plots import SPECTRUM_POINTS, plot_data
from compress.report.points import layer_names, points
from compress.report.schema import SCHEMA_FILE, report_schema, schema_text
from compress.result import (
    ClassResult,
    EndMetric,
    GateResult,
    LayerResult,
    Result,
    SweepResult,
    Versions,
    from_dict,
    from_json,
    to_dict,
    to_json,
)


@pytest.fixture(scope="module")
def result() -> Any:
    return examples.result()


@pytest.fixture(scope="module")
def report(result: Any) -> Any:
    return build_report(result)


class TestRecords:
    def test_results_survive_json(self, result: Any) -> None:
        assert from_json(Result, to_json(result)) == result
        sweep = examples.sweep()
        assert from_json(SweepResult, to_json(sweep)) == sweep

    def test_what_is_not_finite_is_written_as_null(self) -> None:
        layer = LayerResult("a", "Linear", predicted_mse=math.inf, eigenvalues=(1.0, math.nan))
        plain = to_dict(layer)
        assert plain["predicted_mse"] is None
        back = from_dict(LayerResult, plain)
        assert back.predicted_mse is None
        assert math.isnan(back.eigenvalues[1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 99}, "format 99.*update compress"),
            ({"calibration_imagse": 3}, "'calibration_imagse'.*Did you mean 'calibration_images'"),
            ({"calibration_images": "3"}, "calibration_images should be of type int.*str"),
            ({"calibration_images": True}, "should be of type int"),
            ({"layers": [{"name": "a"}]}, r"layers\[0\] lacks 'kind'"),
            ({"layers": {}}, "layers should be of type tuple"),
            ({"split": 3}, "split should be of type SplitRecord"),
        ],
    )
    def test_damage_is_named_with_its_place(self, result: Any, change: Any, message: Any) -> None:
        with pytest.raises(ArtefactError, match=message):
            from_dict(Result, to_dict(result) | change)

    def test_truncated_json_is_refused(self, result: Any) -> None:
        with pytest.raises(ArtefactError, match=r"not valid JSON.*truncated"):
            from_json(Result, to_json(result)[:-50])


class TestSchema:
    def test_the_file_is_up_to_date(self) -> None:
        assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
            "python -m compress.report.schema > compress/report/schema.json"
        )

    def test_every_kind_of_report_is_valid(self, report: Any) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        validator = jsonschema.Draft202012Validator(report_schema())
        validator.check_schema(report_schema())
        compared = compare_with_baseline(report, build_report(examples.result()))
        for one in (
            report,
            compared,
            with_gates(report, check_gates(report, {"max_drop": 1.0})),
            build_comparison([report, report], ["a", "b"]),
            *(examples.thin(k) for k in ("unverified", "custom", "bare", "one-point", "empty")),
        ):
            validator.validate(json.loads(render_json(one)))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda r: r.pop("verdict"),
            lambda r: r.update(verdict="splendid"),
            lambda r: r["result"].update(model=3),
            lambda r: r["result"]["layers"][0].update(extra=1),
            lambda r: r["headline"].pop("drop"),
            lambda r: r["result"]["test"].update(images="many"),
        ],
    )
    def test_it_refuses_what_is_no_report(self, report: Any, damage: Any) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        broken = copy.deepcopy(report)
        damage(broken)
        assert not jsonschema.Draft202012Validator(report_schema()).is_valid(broken)


class TestBuild:
    def test_headline_repeats_the_result(self, result: Any, report: Any) -> None:
        head = report["headline"]
        assert head["before"] == result.test.top1_before
        assert head["drop"] == result.test.drop
        assert head["macs_ratio"] == pytest.approx(20_310_016 / 40_551_424)
        assert (head["rewritten"], head["kept"]) == (17, 2)
        assert head["latency_ratio"] == 0.805

    @pytest.mark.parametrize(
        ("test", "passed", "verdict"),
        [
            (True, True, "passed"),
            (False, True, "unverified"),
            (True, False, "failed"),
            (False, False, "failed"),
        ],
    )
    def test_verdict(self, result: Any, test: Any, passed: Any, verdict: Any) -> None:
        gate = dataclasses.replace(result.gates[0], passed=passed)
        changed = dataclasses.replace(result, gates=(gate,), test=result.test if test else None)
        assert build_report(changed)["verdict"] == verdict

    def test_an_unverified_report_speaks_of_validation_images(self) -> None:
        markdown = render_markdown(examples.thin("unverified"))
        assert "Unverified: no test set" in markdown
        assert "250 validation images" in markdown

    def test_a_report_gives_its_result_back(self, result: Any, report: Any) -> None:
        assert result_of(json.loads(render_json(report))) == result


class TestLimits:
    def test_each_limit_reads_its_own_number(self, result: Any, report: Any) -> None:
        test = result.test
        worst = max(r.before - r.after for r in test.per_class) * 100
        expected = {
            "max_drop": test.drop,
            "max_drop_upper": test.drop_interval.high,
            "max_class_drop": worst,
            "min_agreement": test.agreement,
            "max_kl": test.mean_kl,
            "max_ece_rise": 100 * (test.ece_after - test.ece_before),
            "max_layer_relative_mse": max(
                x.errors.validation_in_place.relative_mse for x in result.layers if x.rewritten
            ),
            "max_latency_ratio": 1.05,
            "max_macs_ratio": 20_310_016 / 40_551_424,
            "max_params_ratio": 148_210 / 269_722,
            "max_bytes_ratio": 596_000 / 1_080_000,
        }
        assert set(expected) | {"max_regression"} == set(LIMITS)
        for name, value in expected.items():
            sign = -1 if LIMITS[name].at_least else 1
            kept, broken = (
                check_gates(report, {name: value + sign * step})[0] for step in (1e-6, -1e-6)
            )
            assert kept.value == pytest.approx(value)
            assert (kept.passed, broken.passed) == (True, False)

    def test_a_broken_limit_says_by_how_much(self, report: Any) -> None:
        (gate,) = check_gates(report, {"max_drop": 0.5})
        drop = report["headline"]["drop"]
        assert gate_sentence(gate) == (
            f"drop of accuracy is {drop:.2f} points; the limit is at most 0.50 points, "
            f"broken by {drop - 0.5:.2f} points"
        )

    def test_the_worst_class_is_named_and_missing_ones_left_out(self, result: Any) -> None:
        rows = (
            ClassResult("cat", 10, 0.9, 0.7, -20.0),
            ClassResult("dog", 0),
            ClassResult("owl", 10, 0.5, 0.6, 10.0),
        )
        test = dataclasses.replace(result.test, per_class=rows)
        report = build_report(dataclasses.replace(result, test=test))
        (gate,) = check_gates(report, {"max_class_drop": 3})
        assert (gate.where, gate.value, gate.passed) == ("cat", 20.0, False)

    @pytest.mark.parametrize("name", list(LIMITS))
    def test_what_was_not_measured_does_not_pass(self, name: Any) -> None:
        bare = build_report(
            Result(Versions("1", "2", "3"), "m", layers=(LayerResult("a", "Linear", scheme="x"),))
        )
        (gate,) = check_gates(bare, {name: 0.0 if LIMITS[name].at_least else 1e9})
        assert (gate.value, gate.passed) == (None, False)
        assert "not measured" in gate_sentence(gate)

    def test_validation_images_vouch_for_nothing(self) -> None:
        (gate,) = check_gates(examples.thin("unverified"), {"max_drop": 100.0})
        assert not gate.passed

    def test_unknown_limits_are_refused_with_near_ones(self, report: Any) -> None:
        with pytest.raises(UsageError, match=r"'max_dorp'.*Did you mean 'max_drop'"):
            check_gates(report, {"max_dorp": 1.0})

    def test_failing_a_limit_fails_the_report(self, report: Any) -> None:
        failed = with_gates(report, check_gates(report, {"max_drop": 0.1, "min_agreement": 0.1}))
        assert failed["verdict"] == "failed"
        assert report["verdict"] == "passed"
        assert "Failed: 1 of 3 limits broken" in render_markdown(failed)

    def test_a_gate_of_another_name_is_still_told(self) -> None:
        words = gate_sentence(GateResult("max_colour", 2.0, 3.5, False, ""))
        assert words == "max colour is 3.5; the limit is at most 2, broken by 1.5"


class TestBaseline:
    def test_changes_are_named(self, result: Any, report: Any) -> None:
        layers = list(result.layers)
        layers[2] = dataclasses.replace(layers[2], ranks=(3,), scheme="output")
        earlier = examples.result(test=examples.metric(noise=0.8), layers=tuple(layers))
        compared = compare_with_baseline(report, build_report(earlier))
        rows = {row["key"]: row for row in compared["baseline"]["rows"]}
        assert rows["after"]["change"] == pytest.approx(
            100 * (result.test.top1_after - earlier.test.top1_after)
        )
        assert rows["after"]["better"] is False
        assert rows["macs_ratio"]["change"] == 0.0
        assert rows["macs_ratio"]["better"] is None
        (changed,) = compared["baseline"]["layers"]
        assert changed["name"] == layers[2].name
        assert changed["ranks_before"] == [3]
        changes = [row["change"] for row in compared["baseline"]["classes"]]
        assert changes == sorted(changes)
        assert "(worse)" in render_markdown(compared)

    def test_a_regression_breaks_its_limit(self, report: Any) -> None:
        better = build_report(examples.result(test=examples.metric(noise=0.2)))
        compared = compare_with_baseline(report, better)
        (gate,) = check_gates(compared, {"max_regression": 0.1})
        drop = better["headline"]["after"] - report["headline"]["after"]
        assert gate.value == pytest.approx(100 * drop)
        assert not gate.passed

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "torchvision:resnet18"}, "different models"),
            ({"model_fingerprint": "other"}, "different models"),
            ({"test": examples.metric(500)}, "600 images.* 500|500 images.* 600"),
            ({"test_fingerprint": "other"}, "different images or labels"),
            (
                {"test": dataclasses.replace(examples.metric(), classes=tuple("abcdefghij"))},
                "different classes",
            ),
            ({"test": None}, "no test set"),
        ],
    )
    def test_other_models_and_test_sets_need_a_flag_and_get_a_banner(
        self, report: Any, change: Any, message: Any
    ) -> None:
        other = build_report(examples.result(**change))
        with pytest.raises(UsageError, match=f"({message}).*--allow-mismatch"):
            compare_with_baseline(report, other)
        with pytest.raises(UsageError, match=message):
            build_comparison([report, other], ["a", "b"])
        banner = compare_with_baseline(report, other, allow_mismatch=True)
        assert len(banner["notes"]) == 1
        assert banner["notes"][0] in html.unescape(render_html(banner))
        assert "> [!WARNING]" in render_markdown(banner)
        side_by_side = build_comparison([report, other], ["a", "b"], allow_mismatch=True)
        assert side_by_side["notes"]

    def test_only_runs_are_compared(self, report: Any) -> None:
        sweep = build_sweep_report(examples.sweep())
        with pytest.raises(UsageError, match="kind 'sweep'"):
            compare_with_baseline(report, sweep)
        with pytest.raises(UsageError, match="at least two"):
            build_comparison([report], ["a"])


class TestReading:
    def test_a_folder_its_model_or_its_report_are_accepted(
        self, report: Any, tmp_path: Path
    ) -> None:
        written = write_report(report, tmp_path)
        assert [p.name for p in written] == ["report.json", "report.md", "report.html"]
        (tmp_path / "model.safetensors").touch()
        for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "report.json"):
            assert read_report(path) == report

    @pytest.mark.parametrize("kind", ["sweep", "several", "baseline"])
    def test_other_kinds_are_read_back(self, report: Any, tmp_path: Path, kind: Any) -> None:
        one = {
            "sweep": lambda: build_sweep_report(examples.sweep()),
            "several": lambda: build_comparison([report, report], ["a", "b"]),
            "baseline": lambda: compare_with_baseline(report, report),
        }[kind]()
        write_report(one, tmp_path)
        assert read_report(tmp_path) == json.loads(render_json(one))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "There is no report at"),
            ("", "not valid JSON"),
            ('{"format": 1, "kind": "run", "verd', "truncated"),
            ("[]", "not a report of compress"),
            ('{"format": 1, "kind": "opera"}', "not a report of compress"),
            ('{"format": 2, "kind": "run"}', "format 2.*reads up to 1; update compress"),
            ('{"format": "x", "kind": "run"}', "format x"),
            ('{"format": 1, "kind": "run", "result": {}}', "lacks baseline, gates, headline"),
            ("\ud800", "not valid JSON"),
        ],
    )
    def test_what_is_no_report_is_refused(self, tmp_path: Path, content: Any, message: Any) -> None:
        path = tmp_path / "report.json"
        if content is not None:
            path.write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(ArtefactError, match=message):
            read_report(path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda r: r["result"]["layers"][0].pop("kind"), r"layers\[0\] lacks 'kind'"),
            (lambda r: r["result"].update(format=7), "format 7.*update compress"),
            (lambda r: r.update(gates=[{}]), r"gates\[0\] lacks 'name'"),
            (lambda r: r.update(gates=3), "gates"),
            (lambda r: r.update(notes=[3]), "notes"),
            (lambda r: r.update(verdict="splendid"), "verdict"),
            (lambda r: r.update(baseline={"rows": []}), "damaged baseline"),
        ],
    )
    def test_damage_inside_is_named(
        self, report: Any, tmp_path: Path, damage: Any, message: Any
    ) -> None:
        broken = copy.deepcopy(report)
        damage(broken)
        (tmp_path / "report.json").write_text(json.dumps(broken))
        with pytest.raises(ArtefactError, match=message):
            read_report(tmp_path)

    def test_writing_into_nowhere_is_an_error_of_ours(self, report: Any, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="cannot be written"):
            write_report(report, tmp_path / "missing")


class TestMarkdown:
    def test_the_verdict_and_the_numbers_come_first(self, report: Any) -> None:
        first = render_markdown(report).split("###")[0]
        head = report["headline"]
        assert "Passed: 1 limit kept" in first
        assert f"{100 * head['before']:.2f}% → {100 * head['after']:.2f}%" in first
        assert text.signed(-head["drop"]) + " points" in first
        assert text.signed(-head["drop_high"]) in first

    def test_names_are_shown_and_never_rendered(self, report: Any) -> None:
        markdown = render_markdown(with_notes(report, ["a <b>bold</b> | *note*"]))
        assert "<img" not in markdown
        assert "<b>" not in markdown
        assert "&lt;/script&gt;&lt;img" in markdown
        assert "\\|\\`" in markdown
        table = [line for line in markdown.splitlines() if "&lt;/script&gt;" in line]
        cells = [line.replace("\\|", "").count("|") for line in table if line.startswith("|")]
        assert cells
        assert set(cells) <= {5, 6}  # four or five columns, however many bars the name holds

    def test_a_drop_that_chance_explains_says_so(self, result: Any) -> None:
        test = examples.metric(noise=0.05)
        assert test.drop_interval.low < 0 < test.drop_interval.high
        markdown = render_markdown(build_report(dataclasses.replace(result, test=test)))
        assert "chance alone could explain" in markdown
        assert "more than chance explains" in render_markdown(build_report(result))

    @pytest.mark.parametrize("kind", ["unverified", "custom", "bare", "one-point", "empty"])
    def test_thin_reports_have_no_stray_none(self, kind: Any) -> None:
        for rendered in (render_markdown(examples.thin(kind)), render_html(examples.thin(kind))):
            body = rendered.split('<script type="application/json"')[0]
            assert "None" not in body.replace("None.", "")
            assert not re.search(r"\bnan\b", body, re.IGNORECASE)

    def test_unlabelled_images_give_agreement_only(self, result: Any) -> None:
        test = EndMetric(images=10, classes=("a", "b"), agreement=0.9, mean_kl=0.1)
        markdown = render_markdown(build_report(dataclasses.replace(result, test=test)))
        assert "agree on 90.00% on 10 test images" in markdown


class TestHtml:
    def test_one_file_with_nothing_from_outside(self, report: Any) -> None:
        page = render_html(report)
        before_scripts = page.split("<script")[0]
        assert "src=" not in before_scripts.replace("img src=x", "")
        assert "<link" not in before_scripts
        assert "default-src 'none'" in html.unescape(before_scripts)
        assert len(page) < 800_000

    def test_thumbnails_are_inside(self, result: Any, report: Any) -> None:
        page = render_html(report, Pictures(examples.thumbnails(result.test)))
        flips = [*result.test.to_wrong[:90], *result.test.to_right[:90]]
        assert page.count("data:image/png;base64,") == len(flips)

    @settings(derandomize=True, deadline=None, max_examples=30)
    @given(st.text(alphabet="<>&/!-script \"'\\\u2028é", max_size=30))
    @example("</script><script>alert(1)</script><!-- &lt;")
    def test_no_text_leaves_the_data_element(self, name: Any) -> None:
        encoded = embed({"name": name})
        assert not set("<>&") & set(encoded)
        assert json.loads(encoded) == {"name": name}

    def test_long_spectra_are_thinned_but_keep_the_cut(self) -> None:
        layer = dataclasses.replace(
            examples.layer(1, "wide", 64, 1234),
            eigenvalues=tuple(0.99**i for i in range(3000)),
            full_rank=3000,
        )
        report = build_report(examples.result(layers=(layer,)))
        (spectrum,) = plot_data(report)["spectra"]
        indexes = [i for i, _ in spectrum["values"]]
        assert len(indexes) <= SPECTRUM_POINTS + 3
        assert {1, 1234, 3000} <= set(indexes)
        assert spectrum["values"][indexes.index(1234)][1] == pytest.approx(0.99**1233, rel=1e-4)


class TestJunit:
    def test_each_limit_is_a_case(self, report: Any) -> None:
        gates = check_gates(report, {"max_drop": 0.5, "max_latency_ratio": 2.0})
        root = ElementTree.fromstring(render_junit(with_gates(report, gates)))
        (suite,) = root
        assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "0")
        failed = [case.get("name") for case in suite if case.find("failure") is not None]
        assert failed == ["max_drop"]
        assert "broken by" in suite.find(".//failure").get("message")

    def test_unverified_is_skipped_not_passed(self) -> None:
        root = ElementTree.fromstring(render_junit(examples.thin("unverified")))
        assert root[0].get("skipped") == "1"

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
    def test_any_name_gives_xml_that_parses(self, name: Any) -> None:
        bare = build_report(Result(Versions("1", "2", "3"), "m"))
        report = build_comparison([bare, bare], [name, "b"])
        root = ElementTree.fromstring(render_junit(report).encode())
        assert [suite.get("tests") for suite in root] == ["1", "1"]


class TestSweep:
    def test_csv_holds_every_point_and_rank(self) -> None:
        sweep = examples.sweep()
        rows = list(csv.DictReader(io.StringIO(render_csv(build_sweep_report(sweep)))))
        assert len(rows) == len(sweep.points)
        for row, point in zip(rows, sweep.points, strict=True):
            assert float(row["value"]) == point.value
            assert int(row["macs"]) == point.macs
            assert float(row["change"]) == -point.validation.drop
            assert row["pareto"] == str(point.pareto).lower()
            assert row["rank layer2.1.conv1"] == str(point.ranks["layer2.1.conv1"][0])
            assert row["rank conv1"] == "dense"
        assert [row["test_after"] != "" for row in rows] == [p.chosen for p in sweep.points]

    def test_a_sweep_folder_holds_the_table(self, tmp_path: Path) -> None:
        write_report(build_sweep_report(examples.sweep()), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "report.html", "report.json", "report.md", "sweep.csv",
        ]  # fmt: skip

    def test_layers_stand_in_the_networks_order(self) -> None:
        made = examples.sweep(1)
        point = dataclasses.replace(
            made.points[0], schemes={"a": "dense", "b": "output"}, ranks={"b": (2,)}
        )
        report = build_sweep_report(dataclasses.replace(made, points=(point,)))
        assert layer_names(points(report)) == ["a", "b"]

    def test_markdown_lists_the_points_and_marks_the_chosen(self) -> None:
        markdown = render_markdown(build_sweep_report(examples.sweep()))
        (chosen,) = [line for line in markdown.splitlines() if "chosen" in line]
        assert chosen.startswith("| threshold 0.003162 |")
        assert "chosen, Pareto" in chosen

    def test_an_empty_sweep_says_so(self) -> None:
        assert "No point of this sweep has finished" in render_markdown(examples.thin("empty"))

    def test_the_verdict_waits_for_the_test_set(self) -> None:
        assert build_sweep_report(examples.sweep())["verdict"] == "passed"
        assert build_sweep_report(examples.sweep(2))["verdict"] == "unverified"


class TestText:
    @pytest.mark.parametrize(
        ("shown", "expected"),
        [
            (text.percent(0.8752), "87.52%"),
            (text.signed(-1.119), "\N{MINUS SIGN}1.12"),
            (text.signed(0.001), "0.00"),
            (text.signed(-0.001), "0.00"),
            (text.count(9999), "9,999"),
            (text.count(40_551_424), "40.55 M"),
            (text.size(1_080_000), "1.08 MB"),
            (text.size(512), "512 B"),
            (text.ratio(0.5), "\N{MULTIPLICATION SIGN}0.50"),
            (text.seconds(0.0123), "12.30 ms"),
            (text.seconds(2e-5), "20.0 µs"),
            (text.seconds(90), "90.00 s"),
            (text.seconds(600), "10.0 min"),
            (text.number(1e-5), "1e\N{MINUS SIGN}05"),
            (text.probability(0.0004), "p < 0.001"),
            (text.probability(1.0), "p = 1.000"),
            (text.plural(1, "class", "classes"), "1 class"),
            (text.plural(1200, "class", "classes"), "1,200 classes"),
            (text.ranks((8, 16)), "8 \N{MULTIPLICATION SIGN} 16"),
            (text.percent(None), text.UNKNOWN),
        ],
    )
    def test_numbers_as_a_reader_wants_them(self, shown: Any, expected: Any) -> None:
        assert shown == expected
