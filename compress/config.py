"""The run's configuration: every default in one frozen record, TOML in and out.

Precedence is default < config file < flag. An unknown key is an error that lists the valid ones.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import tomli_w

from compress.errors import ConfigError, near_matches, printable
from compress.linalg.schemes import OUTPUT, SCHEME_NAMES, SCHEMES
from compress.plan import DENSE, NARROW
from compress.rules import BY_HAND, DEFAULT_RULE, RULE_NAMES, RULES, Rule, rule_named
from compress.untrusted import Unreadable, parse_toml, read_text

METRICS = ("loss", "mse")
TASK_NAMES = (
    "classification", "multilabel", "regression", "segmentation", "detection", "restoration",
)  # fmt: skip
LARGEST_SEED = (1 << 32) - 1
# More threads or processes than any machine that this runs on has cores: systems refuse to start
# them, and not all libraries survive that.
MOST_THREADS = 1024
MOST_WORKERS = 1024
_RANK = re.compile("0*[1-9][0-9]{0,8}")


class Role(Enum):
    """What a setting is for, from which every list of settings follows."""

    PLACE = auto()  # names something to read or write: what is there counts, not its name
    SPEED = auto()  # how it computes, which changes nothing about the outcome
    PERMISSION = auto()  # what may be overwritten
    ENTRIES = auto()  # which entries of the checkpoint are the weights
    PICTURES = auto()  # how pictures become inputs
    TIMING = auto()  # what is timed
    TASK = auto()  # what the network is for
    GATE = auto()  # what the result must satisfy before it is saved
    RULE = auto()  # the rank rule
    OUTCOME = auto()  # all else that decides the outcome


Problem = Callable[[Any], str | None]


def _setting(role: Role, default: Any, problem: Problem = lambda _: None) -> Any:
    """A field with its role, and what is wrong with a value, to be read after ``name = value``."""
    metadata = {"role": role, "problem": problem}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _positive(value: int | None) -> str | None:
    return None if value is None or value >= 1 else "is not a positive number"


def _size(value: int | tuple[int, ...] | None) -> str | None:
    if not isinstance(value, tuple):
        return _positive(value)
    if len(value) != 2:
        return f"has {len(value)} numbers; give one, or a height and a width"
    return None if min(value) >= 1 else "holds a number that is not positive"


def _threads(value: int | None) -> str | None:
    inside = value is None or 1 <= value <= MOST_THREADS
    return None if inside else f"is not a number of threads from 1 to {MOST_THREADS}"


def _workers(value: int) -> str | None:
    inside = 0 <= value <= MOST_WORKERS
    return None if inside else f"is not a number of processes from 0 to {MOST_WORKERS}"


def _points(value: float | None) -> str | None:
    inside = value is None or 0 <= value <= 100
    return None if inside else "is not a number of points from 0 to 100"


def _share(value: float | None) -> str | None:
    return None if value is None or 0 <= value <= 1 else "is outside [0, 1]"


def _from_zero(value: float | None) -> str | None:
    return None if value is None or value >= 0 else "is not a number from 0"


def _seed(value: int) -> str | None:
    return None if 0 <= value <= LARGEST_SEED else f"is outside 0 to {LARGEST_SEED}"


# What may be done to layers: each scheme to one, and channels taken out of several.
WAYS = (*SCHEME_NAMES, NARROW)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run. Fractions are in (0, 1], drops in points.

    The rank rule stands in `rules` by its name; files, flags and `settings` have it as a setting
    like any other, such as ``macs = 0.5``.
    """

    # What goes in and where the result goes.
    checkpoint: str = _setting(Role.PLACE, "")
    model: str = _setting(Role.PLACE, "")
    data: str = _setting(Role.PLACE, "")
    test: str = _setting(Role.PLACE, "")
    output: str = _setting(Role.PLACE, "")

    # Which of several state dicts in the checkpoint, and which of its entries, are the weights.
    checkpoint_key: str = _setting(Role.ENTRIES, "")
    prefix: str = _setting(Role.ENTRIES, "")

    # How images become tensors; empty means the model's own preset, or only scaling to [0, 1].
    mean: tuple[float, ...] = _setting(Role.PICTURES, ())
    std: tuple[float, ...] = _setting(Role.PICTURES, ())
    # A size is one number, or a height and a width.
    resize: int | tuple[int, int] | None = _setting(Role.PICTURES, None, _size)
    crop: int | tuple[int, int] | None = _setting(Role.PICTURES, None, _size)
    class_map: str = _setting(Role.PLACE, "")

    # Where and how it computes. The batch size is by default chosen by the image size.
    device: str = _setting(Role.SPEED, "cpu")
    threads: int | None = _setting(Role.SPEED, None, _threads)
    batch_size: int | None = _setting(Role.SPEED, None, _positive)
    workers: int = _setting(Role.SPEED, 0, _workers)
    seed: int = _setting(Role.OUTCOME, 0, _seed)

    # Calibration. Of the images taken from `data`, a quarter validates and the rest fits.
    calibration_images: int = _setting(Role.OUTCOME, 1000, _positive)
    calibration: str = _setting(Role.PLACE, "")
    samples_per_dimension: int = _setting(Role.OUTCOME, 64, _positive)
    metric: str = _setting(Role.OUTCOME, "loss")
    metric_fn: str = _setting(Role.OUTCOME, "")
    loss_fn: str = _setting(Role.OUTCOME, "")

    # What the network is for: by default its outputs and labels tell. Targets of the value
    # `ignore_index` are not judged.
    task: str = _setting(Role.TASK, "")
    ignore_index: int = _setting(Role.TASK, 255)

    # Which rule chooses the ranks; at most one, the threshold when none is given.
    rules: Mapping[str, float] = _setting(Role.RULE, {})

    # What the rule may choose from: ranks are "R" or "R1,R2" and schemes are names, both by glob.
    schemes: tuple[str, ...] = _setting(Role.OUTCOME, WAYS)
    rank: dict[str, str] = _setting(Role.OUTCOME, {})
    scheme: dict[str, str] = _setting(Role.OUTCOME, {})
    keep: tuple[str, ...] = _setting(Role.OUTCOME, ())
    force_rank: bool = _setting(Role.OUTCOME, False)
    round_to: int | None = _setting(Role.OUTCOME, None, _positive)
    refit: bool = _setting(Role.OUTCOME, True)
    latency_batch: int = _setting(Role.TIMING, 8, _positive)
    no_latency: bool = _setting(Role.TIMING, False)
    latency_table: str = _setting(Role.PLACE, "")

    # What the result must satisfy on the test set before it is saved.
    max_drop: float | None = _setting(Role.GATE, None, _points)
    max_layer_relative_mse: float | None = _setting(Role.GATE, None, _from_zero)
    min_agreement: float | None = _setting(Role.GATE, None, _share)

    force: bool = _setting(Role.PERMISSION, False)

    def __post_init__(self) -> None:
        problems = [*_contradictions(self), *_wrong_values(self), *_wrong_names(self)]
        problems += _wrong_preprocessing(self)
        problems += _unwritable(self)
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    @property
    def chosen_rule(self) -> Rule:
        """The rank rule in force; where only ranks are given by hand, that of ranks by hand."""
        for name in self.rules:
            return rule_named(name) or DEFAULT_RULE
        return BY_HAND if self.rank else DEFAULT_RULE

    @property
    def rule(self) -> str:
        """The name of the rank rule in force."""
        return self.chosen_rule.name

    @property
    def rule_value(self) -> float | None:
        """The value of the rule in force. Ranks by hand have none."""
        return self.rules.get(self.rule, self.chosen_rule.default)

    @property
    def schemes_in_play(self) -> tuple[str, ...]:
        """The schemes that the rule may come to use: a spectrum's cut is the output scheme's."""
        asked = {s for s in self.scheme.values() if s != DENSE}
        counts = {len(ranks.split(",")) for ranks in self.rank.values()}
        asked |= {s.name for s in SCHEMES if s.rank_count > 1 and s.rank_count in counts}
        free = set(self.schemes) if self.chosen_rule.weighs_layers else {OUTPUT.name}
        found = tuple(s for s in SCHEME_NAMES if s in asked | free)
        return (*found, NARROW) if self.narrows else found

    @property
    def narrows(self) -> bool:
        """Whether channels may be taken out."""
        return NARROW in self.schemes and self.chosen_rule.narrows

    @property
    def pools(self) -> bool:
        """Whether errors are measured in the metric of whole weight gradients.

        By the rules that weigh layers against each other; a spectrum's rank is a matter of the
        outputs alone. See `compress.calibrate.pooled`.
        """
        return self.metric == "loss" and self.chosen_rule.weighs_layers

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with ``changes`` applied and checked."""
        return dataclasses.replace(self, **changes)

    def with_rule(self, name: str, value: float) -> RunConfig:
        """Return a copy with this rank rule, and no other.

        Raises:
            ConfigError: There is no such rule, or the value is out of its range.
        """
        return self.replace(rules={name: value})

    def settings(self) -> dict[str, Any]:
        """Every setting that is not None, by the names that files and flags have."""
        flat: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.metadata["role"] is Role.RULE:
                flat |= {name: value[name] for name in RULE_NAMES if name in value}
            elif value is not None:
                flat[spec.name] = dict(value) if isinstance(value, dict) else value
        return flat

    def to_toml(self) -> str:
        """Write every setting that is not None as TOML."""
        return tomli_w.dumps(
            {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings().items()}
        )


def settings_of(*roles: Role) -> tuple[str, ...]:
    """Names of the settings of some roles, in their order; rules by their own names."""
    names: list[str] = []
    for spec in dataclasses.fields(RunConfig):
        role = spec.metadata["role"]
        if role in roles:
            names += RULE_NAMES if role is Role.RULE else [spec.name]
    return tuple(names)


def _contradictions(config: RunConfig) -> Iterable[str]:
    if len(config.rules) > 1:
        given = " and ".join(name for name in RULE_NAMES if name in config.rules)
        yield f"{given} contradict each other: give one rank rule"
    if config.no_latency and "latency" in config.rules:
        yield (
            "no_latency and latency contradict each other: a budget of time is measured; give "
            "another budget, or let the time be measured"
        )
    if set(config.schemes) == {NARROW}:
        for rule in RULES:
            if rule.name in config.rules and rule.weighs_layers and not rule.narrows:
                yield f"{rule.name} takes no channels out: name another scheme than {NARROW}"
    for name in config.rules:
        if name not in RULE_NAMES:
            yield f"there is no rank rule {name!r}{near_matches(name, RULE_NAMES)}"


def _wrong_values(config: RunConfig) -> Iterable[str]:
    for rule in RULES:
        if rule.name in config.rules:
            value = config.rules[rule.name]
            problem = rule.problem(value)
            if problem is not None:
                yield f"{rule.name} = {value} {problem}"
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        problem = spec.metadata["problem"](value)
        if problem is not None:
            yield f"{spec.name} = {value} {problem}"
    if config.metric not in METRICS:
        yield f"metric = {config.metric!r} is not one of {', '.join(METRICS)}"
    if config.task and config.task not in TASK_NAMES:
        yield (
            f"task = {config.task!r} is not one of {', '.join(TASK_NAMES)}."
            f"{near_matches(config.task, TASK_NAMES)}"
        )


def _wrong_names(config: RunConfig) -> Iterable[str]:
    for scheme in config.schemes:
        if scheme not in (*WAYS, DENSE):
            yield (
                f"scheme {scheme!r} is unknown; the schemes are {', '.join(WAYS)} and {DENSE}."
                f"{near_matches(scheme, WAYS)}"
            )
    for pattern, scheme in config.scheme.items():
        if scheme == NARROW:
            yield (
                f"scheme {pattern}={NARROW} names one layer, and channels are taken out of whole "
                "groups of layers at once: let a budget do it with --schemes, or give the layers "
                "of a group their width in a plan. --keep leaves a layer's width as it is"
            )
        elif scheme not in (*SCHEME_NAMES, DENSE):
            yield (
                f"scheme {scheme!r} is unknown; those of one layer are {', '.join(SCHEME_NAMES)} "
                f"and {DENSE}.{near_matches(scheme, SCHEME_NAMES)}"
            )
    if not config.schemes:
        yield "schemes is empty; name at least one of " + ", ".join(WAYS)
    counts = {scheme.rank_count for scheme in SCHEMES}
    for pattern, ranks in config.rank.items():
        parts = ranks.split(",")
        if len(parts) not in counts or not all(_RANK.fullmatch(p.strip()) for p in parts):
            yield f"rank {pattern}={ranks} is not a positive whole number, or two as 8,16"


def _wrong_preprocessing(config: RunConfig) -> Iterable[str]:
    if not all(math.isfinite(number) for number in (*config.mean, *config.std)):
        yield "mean or std holds a number that is not finite"
    if len(config.mean) != len(config.std):
        yield f"mean has {len(config.mean)} numbers and std has {len(config.std)}"
    if any(s <= 0 for s in config.std):
        yield "std holds a number that is not positive"


def _unwritable(config: RunConfig) -> Iterable[str]:
    """What no ``config.toml`` could repeat: paths that are not UTF-8, numbers that are none."""
    for name, value in config.settings().items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} = {value} is not a finite number"
        for part in _parts(value):
            if printable(part) != part:
                yield (
                    f"{name} '{printable(part)}' is not UTF-8, in which results are written: "
                    "rename the file or folder, or make a link to it with another name"
                )
            if "\0" in part:
                yield f"{name} {part!r} holds a zero byte, which no name can"


def _parts(value: Any) -> list[str]:
    """The texts that a setting consists of."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return [part for part in value if isinstance(part, str)] if isinstance(value, tuple) else []


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        The settings it holds, ready to be overridden by flags and passed to `make_config`.

    Raises:
        ConfigError: The file is missing, is not TOML or holds an unknown key.
    """
    try:
        values = parse_toml(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}."
        ) from error
    except Unreadable as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    check_keys(values, f"the configuration file {path}")
    return values


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for keys that are not settings, with near matches and the valid ones."""
    valid = settings_of(*Role)
    for key in values:
        if key not in valid:
            raise ConfigError(
                f"Unknown key {key!r} in {where}.{near_matches(key, valid)} "
                f"The valid keys are {', '.join(valid)}."
            )


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a checked `RunConfig` from plain values; lists become tuples.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of range.
    """
    check_keys(values, "the settings")
    ready: dict[str, Any] = {}
    rules = {name: _typed(name, "float | None", values.get(name)) for name in RULE_NAMES}
    ready["rules"] = {name: value for name, value in rules.items() if value is not None}
    for spec in dataclasses.fields(RunConfig):
        if spec.name not in values or spec.name == "rules":
            continue
        value = values[spec.name]
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, dict):
            value = {str(k): str(v) for k, v in value.items()}
        ready[spec.name] = _typed(spec.name, str(spec.type), value)
    return RunConfig(**ready)


_EXPECTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "tuple": (tuple,),
    "dict": (dict,),
}


def _typed(name: str, annotation: str, value: Any) -> Any:
    if value is None and "None" in annotation:
        return None
    for alternative in annotation.split("|"):
        base, _, inner = alternative.strip().partition("[")
        if type(value) not in _EXPECTED.get(base, ()):  # exactly: True is an int to isinstance
            continue
        if isinstance(value, tuple):
            inner = inner.split(",")[0]
            return tuple(_typed(f"each of {name}", inner, part) for part in value)
        return float(value) if base == "float" else value
    raise ConfigError(f"{name} = {value!r} should be of type {annotation}.")
