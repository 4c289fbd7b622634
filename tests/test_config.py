"""The configuration: defaults, ranges, TOML both ways, and errors that name the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from compress.config import Role, RunConfig, make_config, read_toml, settings_of
from compress.errors import ConfigError
from compress.rules import RULE_NAMES, RULES, Rule

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_the_rule_is_threshold_unless_another_is_given() -> None:
    assert (RunConfig().rule, RunConfig().rule_value) == ("threshold", 1e-3)
    assert (make_config({"energy": 0.9}).rule, make_config({"energy": 0.9}).rule_value) == (
        "energy",
        0.9,
    )
    by_hand = RunConfig(rank={"conv1": "4"})
    assert (by_hand.rule, by_hand.rule_value) == ("rank", None)
    assert make_config({"rank": {"conv1": "4"}, "threshold": 0.01}).rule == "threshold"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0.0}, "energy = 0.0 is outside"),
        ({"energy": 1.1}, "energy = 1.1 is outside"),
        ({"macs": -0.1}, "macs = -0.1 is outside"),
        ({"threshold": 1.0}, "threshold = 1.0 is outside"),
        ({"threshold": 1e-3, "macs": 0.5}, "threshold and macs contradict"),
        ({"max_drop": -1.0}, "max_drop = -1.0"),
        ({"min_agreement": 1.5}, "min_agreement = 1.5"),
        ({"batch_size": 0}, "batch_size = 0 is not a positive"),
        ({"threads": 0}, "threads = 0"),
        ({"round_to": 0}, "round_to = 0"),
        ({"workers": -1}, "workers = -1"),
        ({"metric": "mae"}, "metric = 'mae' is not one of"),
        ({"schemes": ("outptu",)}, "Did you mean 'output'"),
        ({"schemes": ()}, "schemes is empty"),
        ({"scheme": {"conv1": "narrow"}}, "scheme conv1=narrow names one layer"),
        ({"scheme": {"conv1": "tucker"}}, "scheme 'tucker' is unknown"),
        ({"rank": {"conv1": "0"}}, "rank conv1=0"),
        ({"rank": {"conv1": "four"}}, "rank conv1=four"),
        ({"mean": (0.5,)}, "mean has 1 numbers and std has 0"),
        ({"seed": -1}, "seed = -1 is outside"),
        ({"seed": 1 << 64}, "is outside 0 to 4294967295"),
        ({"max_layer_relative_mse": -1.0}, "max_layer_relative_mse = -1.0"),
        ({"max_layer_relative_mse": float("nan")}, "max_layer_relative_mse = nan"),
        ({"max_drop": float("nan")}, "max_drop = nan"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "not finite"),
        ({"mean": (0.5,), "std": (float("inf"),)}, "not finite"),
        ({"mean": (0.5,), "std": (0.0,)}, "std holds a number that is not positive"),
        ({"resize": 0}, "resize = 0 is not a positive"),
        ({"resize": (64,)}, "resize = (64,) has 1 numbers; give one, or a height and a width"),
        ({"crop": (4, 5, 6)}, "crop = (4, 5, 6) has 3 numbers"),
        ({"crop": (64, 0)}, "crop = (64, 0) holds a number that is not positive"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(settings)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"energy": 2.0, "workers": -1, "metric": "x"})
    assert all(name in str(caught.value) for name in ("energy", "workers", "metric"))


@pytest.mark.parametrize("settings", [{"task": "x"}, {"schemes": ("x",)}, {"workers": -1}])
def test_a_problem_ends_with_one_full_stop(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"[^.]\.$"):
        make_config(settings)


def test_toml_gives_back_what_was_written(tmp_path: Path) -> None:
    config = make_config(
        {
            "checkpoint": "w.pt", "energy": 0.99, "mean": (0.5, 0.4), "std": (0.1, 0.2),
            "rank": {"a.*": "4,8"}, "keep": ("head",), "schemes": ("output", "spatial"),
            "refit": False, "max_drop": 0.5, "batch_size": 4, "resize": (64, 256), "crop": 60,
        }
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert make_config(read_toml(path)) == config
    assert "threshold" not in path.read_text()


def test_every_default_survives_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(RunConfig().to_toml())
    assert make_config(read_toml(path)) == RunConfig()


def test_an_unknown_key_is_an_error_with_the_valid_ones(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("treshold = 0.1\n")
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    text = str(caught.value)
    assert "'treshold'" in text
    assert "Did you mean 'threshold'" in text
    assert all(name in text for name in settings_of(*Role))


@pytest.mark.parametrize(
    ("content", "message"), [("threshold = ", "is not valid TOML"), (None, "cannot be read")]
)
def test_unreadable_files_are_errors(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_toml(path)


@pytest.mark.parametrize(
    "values",
    [{"energy": "0.9"}, {"seed": True}, {"refit": 1}, {"keep": "head"}, {"seed": 1.5},
     {"checkpoint": 3}, {"seed": None}, {"keep": [3]}, {"mean": ["half"]},
     {"resize": "64"}, {"resize": [64, 2.5]}, {"crop": [True, 4]}],
)  # fmt: skip
def test_values_of_the_wrong_type_are_errors(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} = "):
        make_config(values)


def test_whole_numbers_do_for_fractions_and_lists_become_tuples() -> None:
    config = make_config({"macs": 1, "keep": ["a", "b"], "rank": {"c": "3"}, "energy": None})
    assert config.rules == {"macs": 1.0}
    assert isinstance(config.rule_value, float)
    assert config.keep == ("a", "b")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_committed_configurations_are_valid(path: Path) -> None:
    config = make_config(read_toml(path))
    assert config.model
    assert config.data
    assert config.output


def test_there_are_committed_configurations() -> None:
    assert CONFIGS


def test_every_setting_has_one_role_and_every_list_of_settings_follows() -> None:
    by_role = [settings_of(role) for role in Role]
    listed = [name for names in by_role for name in names]
    assert sorted(listed) == sorted(set(listed)), "a setting has one role"
    flat = make_config({"macs": 0.5}).settings()
    assert set(flat) <= set(listed)
    assert set(settings_of(Role.RULE)) == set(RULE_NAMES)
    assert settings_of(Role.GATE) == ("max_drop", "max_layer_relative_mse", "min_agreement")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_a_setting_like_any_other(rule: Rule, tmp_path: Path) -> None:
    config = make_config({rule.name: 0.5})
    assert (config.rule, config.rule_value) == (rule.name, 0.5)
    assert config.settings()[rule.name] == 0.5
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert make_config(read_toml(path)) == config
    with pytest.raises(ConfigError, match=f"{rule.name} = -1.0"):
        make_config({rule.name: -1.0})


def test_a_message_that_asks_ends_with_the_question() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'narrow'\?$"):
        RunConfig(schemes=("narow",))
