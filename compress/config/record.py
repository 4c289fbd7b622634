"""Every setting of a run, its default and its role, in one frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import tomli_w

from compress.config import values
from compress.config.checks import problems, wrong_values
from compress.errors import ConfigError
from compress.linalg.schemes import OUTPUT, SCHEME_NAMES, SCHEMES
from compress.plan import DENSE, NARROWER, SLICE
from compress.rules import BY_HAND, DEFAULT_RULE, RULE_NAMES, Rule, rule_named


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
    resize: int | tuple[int, int] | None = _setting(Role.PICTURES, None, values.size)
    crop: int | tuple[int, int] | None = _setting(Role.PICTURES, None, values.size)
    class_map: str = _setting(Role.PLACE, "")

    # Where and how it computes. The batch size is by default chosen by the image size.
    device: str = _setting(Role.SPEED, "cpu")
    threads: int | None = _setting(Role.SPEED, None, values.threads)
    batch_size: int | None = _setting(Role.SPEED, None, values.positive)
    workers: int = _setting(Role.SPEED, 0, values.workers)
    seed: int = _setting(Role.OUTCOME, 0, values.seed)

    # Calibration. Of the images taken from `data`, a quarter validates and the rest fits.
    calibration_images: int = _setting(Role.OUTCOME, 1000, values.positive)
    # Few pictures also come mirrored and shifted, as far as the network knows such.
    augment: bool = _setting(Role.OUTCOME, True)
    calibration: str = _setting(Role.PLACE, "")
    samples_per_dimension: int = _setting(Role.OUTCOME, 64, values.positive)
    metric: str = _setting(Role.OUTCOME, "loss")
    metric_fn: str = _setting(Role.OUTCOME, "")
    loss_fn: str = _setting(Role.OUTCOME, "")

    # What the network is for: by default its outputs and labels tell. Targets of the value
    # `ignore_index` are not judged.
    task: str = _setting(Role.TASK, "")
    ignore_index: int = _setting(Role.TASK, 255)

    # Which rule chooses the ranks; at most one, the threshold when none is given.
    rules: Mapping[str, float] = _setting(Role.RULE, {})

    # What the rule may choose from, by default all that suits it; ranks are "R" or "R1,R2" and
    # schemes are names, both by glob.
    schemes: tuple[str, ...] | None = _setting(Role.OUTCOME, None)
    rank: dict[str, str] = _setting(Role.OUTCOME, {})
    scheme: dict[str, str] = _setting(Role.OUTCOME, {})
    keep: tuple[str, ...] = _setting(Role.OUTCOME, ())
    force_rank: bool = _setting(Role.OUTCOME, False)
    round_to: int | None = _setting(Role.OUTCOME, None, values.positive)
    refit: bool = _setting(Role.OUTCOME, True)
    # Minutes that the compressed network may learn from the original for.
    recover: float | None = _setting(Role.OUTCOME, None, values.minutes)
    latency_batch: int = _setting(Role.TIMING, 8, values.positive)
    no_latency: bool = _setting(Role.TIMING, False)
    runtime: str = _setting(Role.TIMING, values.TORCH, values.runtime)
    latency_table: str = _setting(Role.PLACE, "")
    # A measurement more, which changes nothing about the model.
    progressive: bool = _setting(Role.SPEED, False)
    # A file more, for another runtime.
    export: str = _setting(Role.SPEED, "", values.export)

    # What the result must satisfy on the test set before it is saved.
    max_drop: float | None = _setting(Role.GATE, None, values.points)
    max_layer_relative_mse: float | None = _setting(Role.GATE, None, values.from_zero)
    min_agreement: float | None = _setting(Role.GATE, None, values.share)

    force: bool = _setting(Role.PERMISSION, False)

    def __post_init__(self) -> None:
        found = [*wrong_values(dataclasses.fields(self), self), *problems(self)]
        if found:
            text = "; ".join(found)
            raise ConfigError(text if text.endswith(("?", ".")) else text + ".")

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
        free = set(self.ways) if self.chosen_rule.weighs_layers else {OUTPUT.name}
        found = tuple(s for s in SCHEME_NAMES if s in asked | free)
        return (*found, *self.narrower)

    @property
    def ways(self) -> tuple[str, ...]:
        """What may be done to layers: what the user names, or all."""
        return values.WAYS if self.schemes is None else self.schemes

    @property
    def narrower(self) -> tuple[str, ...]:
        """How channels may be taken out: ``"narrow"``, ``"slice"``, both or not at all."""
        if not self.chosen_rule.narrows:
            return ()
        return tuple(way for way in NARROWER if way in self.ways)

    @property
    def narrows_last(self) -> bool:
        """Whether channels are only taken out where ranks alone do not reach the budget."""
        return self.schemes is None and self.chosen_rule.narrows_last

    @property
    def slices(self) -> bool:
        """Whether channels are cut in directions where that can be."""
        return SLICE in self.ways

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
