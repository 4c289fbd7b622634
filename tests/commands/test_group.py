"""The command line as such: help, flags, precedence, errors and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from places import DOCS, ROOT
from workbench import command, paragraph

from compress import __version__
from compress.commands.group import cli
from compress.commands.options import GROUPS, Settings
from compress.config import Role, settings_of
from compress.errors import CompressError

COMMANDS = sorted(cli.commands)
ARGUMENTS = {"checkpoint"}


def flags_of(name: str) -> set[str]:
    return {
        option
        for parameter in cli.commands[name].params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = command(name, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    compress {name}" in result.stdout
    assert {"--quiet", "--json", "--config", "--debug"} <= flags_of(name)
    assert result.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_is_documented(name: str) -> None:
    assert f"`compress {name}" in (ROOT / "README.md").read_text()
    page = (DOCS / "reference" / "cli.md").read_text()
    assert f"`compress {name}" in page
    assert [flag for flag in sorted(flags_of(name)) if f"`{flag}" not in page] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_does(name: str) -> None:
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_every_setting_has_a_flag() -> None:
    offered = {p.name for p in cli.commands["run"].params if isinstance(p, click.Option)}
    settings = set(settings_of(*Role))
    assert settings - offered == ARGUMENTS


def test_no_group_of_flags_is_left_over() -> None:
    used = {p.name for name in COMMANDS for p in cli.commands[name].params}
    for group, options in GROUPS.items():
        for option in options:
            holder = option(lambda: None)
            assert holder.__click_params__[0].name in used, group  # type: ignore[attr-defined]


def test_version_and_help_need_no_torch() -> None:
    code = (
        "import sys; from compress.commands.group import cli; import compress.commands\n"
        "for words in (['--help'], ['run', '--help'], ['--version']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"version {__version__}" in done.stdout


def test_the_launcher_runs_the_same_commands() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"compress, version {__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run", "w.pt", "--treshold", "0.1"], "--threshold"),
        (["run", "w.pt", "--threshold", "much"], "'much' is not a valid float"),
        (["run", "w.pt", "--rank", "conv1"], "'conv1' is not NAME=R"),
        (["run", "w.pt", "--scheme", "=output"], "is not GLOB=NAME"),
        (["run", "w.pt", "--mean", "0.5;0.5"], "not a list of numbers"),
        (["run", "w.pt", "more.pt"], "unexpected extra argument"),
        (["inspect", "w.pt", "--input-shape", "3,-1,4"], "not a shape"),
        (["inspect", "w.pt", "--input-shape", "3,²,4"], "not a shape"),
        (["verify"], "Missing argument 'RESULT'"),
    ],
)
def test_wrong_usage_is_code_two(words: list[str], message: str) -> None:
    result = command(*words)
    text = paragraph(result, 2)
    assert message in text
    assert words == ["rnu"] or f"See 'cli {words[0]} --help'." in text


def test_warnings_are_shown_with_debug_alone(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import warnings\nwarnings.warn('mind the gap')\n")
    weights = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1)}, weights)
    for flags, shown in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "compress.commands", "inspect", str(weights), "--model",
             f"{tmp_path / 'net.py'}:missing", *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3
        assert ("mind the gap" in done.stderr) is shown
        assert shown or len(done.stderr.strip().splitlines()) == 1


def test_flags_win_over_the_file_and_the_file_over_the_base() -> None:
    file = {"energy": 0.9, "seed": 3, "keep": ["a"], "resize": 8}
    settings = Settings(file, {"seed": 4, "keep": ["b"]})
    config = settings.config(resize=4, crop=4, seed=1)
    assert (config.rules["energy"], config.seed, config.keep) == (0.9, 4, ("b",))
    assert (config.resize, config.crop) == (8, 4)
    assert config.batch_size is None


def test_a_flag_with_a_rule_replaces_the_rule_of_the_file() -> None:
    config = Settings({"energy": 0.9, "seed": 3}, {"macs": 0.5}).config()
    assert (config.rules.keys(), config.seed) == ({"macs"}, 3)


def test_threads_reach_torch() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        Settings({}, {"threads": 1}).config()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_config_errors_are_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("treshold = 1e-3\n")
    text = paragraph(command("run", "--config", str(file)), 2)
    assert "Did you mean 'threshold'" in text
    assert "cannot be read" in paragraph(command("run", "--config", "no.toml"), 2)
    both = paragraph(command("run", "w.pt", "--energy", "0.9", "--macs", "0.5"), 2)
    assert "energy and macs contradict" in both
    for device in ("quantum", "mps"):
        text = paragraph(command("run", "w.pt", "--device", device), 2)
        assert f"The device {device!r} cannot be used: " in text
        assert ".." not in text
        assert "only available for" not in text  # as torch goes on for a page


@pytest.mark.parametrize("debug", [False, True])
def test_unexpected_exceptions_are_code_seventy(
    monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("three\nlines\nhere")

    monkeypatch.setattr("compress.pipeline.run.run", broken)
    result = command("run", "w.pt", *(["--debug"] if debug else []))
    assert result.exit_code == 70
    assert "unexpected ZeroDivisionError: three lines here." in result.stderr
    assert ("Traceback" in result.stderr) == debug


@pytest.mark.parametrize("debug", [False, True])
def test_expected_errors_show_their_traceback_with_debug_alone(debug: bool) -> None:
    result = command("run", "w.pt", "--output", "out", *(["--debug"] if debug else []))
    assert result.exit_code == 2
    assert "No model given" in result.stderr
    assert ("Traceback" in result.stderr) == debug


def test_every_error_has_one_of_the_documented_codes() -> None:
    def below(kind: type[CompressError]) -> list[type[CompressError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    codes = {kind.exit_code for kind in below(CompressError)}
    page = (DOCS / "reference" / "cli.md").read_text()
    assert codes == {1, 2, 3}
    for code in (0, *codes, 70, 130):
        assert f"| {code} |" in page


def test_interrupts_are_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.run.run", interrupted)
    result = command("run", "w.pt")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted; nothing was left behind."


def test_json_output_is_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.commands.terminal import Terminal

    shown: list[str] = []
    monkeypatch.setattr("click.echo", lambda text, **_: shown.append(text))
    Terminal(as_json=True).show({"a": [1, None]}, ["lines"])
    assert [json.loads(text) for text in shown] == [{"a": [1, None]}]
    Terminal(quiet=True).show({"a": 1}, ["lines"])
    assert len(shown) == 1


def test_progress_bars_keep_off_what_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.commands.terminal import Terminal

    assert list(Terminal().track([1, 2], "work", 2)) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(Terminal().track([1, 2], "work", 2)) == [1, 2]
    assert "work" in capsys.readouterr().err
    assert list(Terminal(quiet=True).track([1], "work", 1)) == [1]
    assert capsys.readouterr().err == ""


def test_tables_line_up_with_wide_characters() -> None:
    from compress.commands.terminal import table

    lines = table(("a", "b"), [("漢", "1"), ("xyz", "22")])
    assert lines == ["a     b", "---  --", "漢    1", "xyz  22"]
