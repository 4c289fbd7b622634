"""The documentation holds: links lead somewhere, examples run, names and figures are current."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import report_examples
import torch
from places import DOCS, ROOT
from stopwatch import stop_the_clock
from workbench import command

import compress
from compress.commands.group import cli
from compress.data import Preprocessing, open_dataset
from compress.demo_data.network import width32
from compress.report import build_report, write_report

TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(p for p in DOCS.rglob("*.md") if p.parent.name != "sample")]
COMPANIONS = ("overparam.md", "flat.md", "hypernet.md")  # run by tests/modules/test_module_docs.py
# What the examples of a page print, where that shows that they did what the page says.
PRINTED = {
    "how-to/python.md": ["best within macs"],
    "reference/report.md": ["drop of accuracy is", "failed"],
    "reference/report-schema.md": ["'layers'"],
    "reference/sweep.md": ["0.001 ", "0.1 "],
}


def title(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [found.split()[0] for found in re.findall(r"\]\(([^)]+)\)", text)]


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_relative_links_resolve(page: Path) -> None:
    paths = [link.partition("#")[0] for link in links(page) if "://" not in link]
    assert [path for path in paths if path and not (page.parent / path).exists()] == []


def test_links_are_found() -> None:
    assert "docs/benchmarks.md" in links(ROOT / "README.md")
    assert "images/stages.svg" in links(DOCS / "architecture.md")


WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and p.name not in COMPANIONS]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=title)
def test_python_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that holds what the pages speak of: results, and the package's own images."""
    monkeypatch.chdir(tmp_path)
    stop_the_clock(monkeypatch)
    (tmp_path / "compress").symlink_to(ROOT / "compress")
    (tmp_path / "result").mkdir()
    write_report(build_report(report_examples.result()), tmp_path / "result")
    digits = open_dataset(
        "tensors:compress/demo_data/digits-train.npz", Preprocessing(resize=28)
    ).subset(range(40))
    compress.compress_model(
        width32(), digits, spec="compress.demo_data.network:width32", output="smaller",
        threshold=0.1, refit=False,
    )  # fmt: skip
    capsys.readouterr()
    for block in blocks(page, "python"):
        exec(compile(block, title(page), "exec"), {"__name__": "example"})
    shown = capsys.readouterr().out
    for words in PRINTED.get(title(page), []):
        assert words in shown


def test_pages_that_print_exist() -> None:
    assert set(PRINTED) <= {title(page) for page in WITH_PYTHON}


def test_your_own_model_data_and_metric_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_the_clock(monkeypatch)
    page = DOCS / "how-to" / "own-code.md"
    for block in blocks(page, "python"):
        found = re.match(r"# (\w+\.py)\n", block)
        assert found
        (tmp_path / found[1]).write_text(block)
    scope: dict[str, object] = {}
    exec((tmp_path / "net.py").read_text(), scope)
    net = scope["net"]
    assert callable(net)
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    torch.save(net(classes=1).state_dict(), tmp_path / "ages.pt")
    for words in commands(page):
        if words[0] == "run":
            done = command(*words, "--force")
            assert done.exit_code == 0, done.stderr


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every ``compress`` command line on a page."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["compress"]:
                yield words[1:]


@pytest.mark.parametrize(
    ("page", "words"),
    [pytest.param(p, words, id=f"{title(p)}-{words[0]}") for p in PAGES for words in commands(p)],
)
def test_command_lines_are_understood(page: Path, words: list[str]) -> None:
    name, *arguments = words
    try:
        cli.commands[name].make_context(name, arguments)
    except click.ClickException as error:
        pytest.fail(f"{title(page)}: compress {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_scripts_and_their_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (scripts/\S+\.py)([^\n`#]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [flag for flag in re.findall(r"--[\w-]+", rest) if f'"{flag}"' not in source] == []


def test_the_table_of_flags_says_which_command_takes_which() -> None:
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    section = text.partition("## Which command takes which flags")[2].partition("\n## ")[0]
    taken: dict[str, set[str]] = {}
    for name, made in cli.commands.items():
        for parameter in made.params:
            for flag in filter(re.compile("--").match, parameter.opts):
                taken.setdefault(flag, set()).add(name)
    rows = re.findall(r"^\| (`--.*) \| (.*) \|$", section, re.M)
    for flags, commands in rows:
        named = set(re.findall(r"`([a-z]+)`", commands))
        wanted = set(cli.commands) - named if commands.startswith("all") else named
        for flag in re.findall(r"`(--[\w-]+)`", flags):
            assert taken.pop(flag) == wanted, flag
    # What is left over has a table of its own, or belongs to every command.
    assert [flag for flag, names in taken.items() if 1 < len(names) < len(cli.commands)] == []
    assert len(rows) > 15


def resolves(dotted: str) -> bool:
    """Whether a dotted name below the package is a module, or something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(("compress", *parts[:count]))
        try:
            found: object = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_code_that_the_architecture_names_exists() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.stem for path in (ROOT / "compress").iterdir()}
    names = [n.removeprefix("compress.") for n in re.findall(r"`([\w.]+\.\w+)`", text)]
    named = [name for name in names if name.split(".")[0] in rooms]
    assert len(named) > 20
    assert [name for name in named if not resolves(name)] == []
    assert not resolves("pipeline.run.walk")


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_files_that_the_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:compress|docs|scripts|tests|configs)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_floors_are_those_of_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.M)
    assert [int(floor) for floor, _ in rows] == list(reversed(range(len(layers))))
    documented = [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows]
    assert documented == [{room.strip() for room in layer.split("|")} for layer in layers]


def test_the_picture_and_the_readme_show_the_measured_table() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_budgets.py"))
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    before, budgets = script["read_table"](page)
    assert script["draw"](before, budgets) == script["PICTURE"].read_text(encoding="utf-8")
    assert [b.fraction for b in budgets] == [0.8, 0.65, 0.5, 0.4, 0.3]
    for budget in budgets:
        losses = [lost for lost, _, _ in budget.seeds]
        assert sum(losses) / len(losses) == pytest.approx(budget.mean, abs=0.0051)
        assert all(low < lost < high for lost, low, high in budget.seeds)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (measured,) = re.findall(r"^\| mean \|(.*)$", page, re.M)
    (shown,) = re.findall(r"^\| points lost \|(.*)$", readme, re.M)
    assert shown == measured
