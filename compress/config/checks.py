"""What is wrong with a configuration as a whole, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field
from typing import Any, Protocol

from compress.config.values import METRICS, TASK_NAMES, WAYS
from compress.errors import near_matches, printable
from compress.linalg.schemes import SCHEME_NAMES, SCHEMES
from compress.plan import DENSE, NARROWER
from compress.rules import RULE_NAMES, RULES

_RANK = re.compile("0*[1-9][0-9]{0,8}")


class Settings(Protocol):
    """What is looked at of a `compress.config.RunConfig`."""

    @property
    def rules(self) -> Mapping[str, float]:
        """Values of rank rules, by name."""
        ...

    @property
    def no_latency(self) -> bool:
        """Whether nothing is timed."""
        ...

    @property
    def progressive(self) -> bool:
        """Whether networks with some layers replaced are measured."""
        ...

    @property
    def recover(self) -> float | None:
        """Minutes that the network may learn for."""
        ...

    @property
    def metric(self) -> str:
        """What errors are weighed by."""
        ...

    @property
    def task(self) -> str:
        """What the network is for."""
        ...

    @property
    def schemes(self) -> tuple[str, ...] | None:
        """What a budget may choose from; None for all."""
        ...

    @property
    def scheme(self) -> dict[str, str]:
        """Schemes by glob."""
        ...

    @property
    def rank(self) -> dict[str, str]:
        """Ranks by glob."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel of a picture."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel of a picture."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that are not None, by name."""
        ...


def problems(config: Settings) -> list[str]:
    """What is wrong with a configuration, each problem in a few words."""
    return [
        *_contradictions(config), *_wrong_choices(config), *_wrong_names(config),
        *_wrong_preprocessing(config), *_unwritable(config),
    ]  # fmt: skip


def _contradictions(config: Settings) -> Iterable[str]:
    if len(config.rules) > 1:
        given = " and ".join(name for name in RULE_NAMES if name in config.rules)
        yield f"{given} contradict each other: give one rank rule"
    if config.progressive and config.recover is not None:
        yield (
            "progressive and recover contradict each other: a recovery changes all layers at once, "
            "so that they cannot be replaced one after the other; give one of them"
        )
    if config.no_latency and "latency" in config.rules:
        yield (
            "no_latency and latency contradict each other: a budget of time is measured; give "
            "another budget, or let the time be measured"
        )
    for name in config.rules:
        if name not in RULE_NAMES:
            yield f"there is no rank rule {name!r}{near_matches(name, RULE_NAMES)}"


def wrong_values(fields: Iterable[Field[Any]], config: object) -> Iterable[str]:
    """Say of each setting what is wrong with its own value.

    Args:
        fields: Those of the configuration, with a ``problem`` in their metadata.
        config: The configuration.
    """
    for spec in fields:
        value = getattr(config, spec.name)
        problem = spec.metadata["problem"](value)
        if problem is not None:
            yield f"{spec.name} = {value} {problem}"


def _wrong_choices(config: Settings) -> Iterable[str]:
    for rule in RULES:
        if rule.name in config.rules:
            value = config.rules[rule.name]
            problem = rule.problem(value)
            if problem is not None:
                yield f"{rule.name} = {value} {problem}"
    if config.metric not in METRICS:
        yield f"metric = {config.metric!r} is not one of {', '.join(METRICS)}"
    if config.task and config.task not in TASK_NAMES:
        yield (
            f"task = {config.task!r} is not one of {', '.join(TASK_NAMES)}."
            f"{near_matches(config.task, TASK_NAMES)}"
        )


def _wrong_names(config: Settings) -> Iterable[str]:
    for scheme in config.schemes or ():
        if scheme not in (*WAYS, DENSE):
            yield (
                f"scheme {scheme!r} is unknown; the schemes are {', '.join(WAYS)} and {DENSE}."
                f"{near_matches(scheme, WAYS)}"
            )
    for pattern, scheme in config.scheme.items():
        if scheme in NARROWER:
            yield (
                f"scheme {pattern}={scheme} names one layer, and channels are taken out of whole "
                "groups of layers at once: let a budget do it with --schemes, or give the layers "
                "of a group their width in a plan. --keep leaves a layer's width as it is"
            )
        elif scheme not in (*SCHEME_NAMES, DENSE):
            yield (
                f"scheme {scheme!r} is unknown; those of one layer are {', '.join(SCHEME_NAMES)} "
                f"and {DENSE}.{near_matches(scheme, SCHEME_NAMES)}"
            )
    if config.schemes == ():
        yield "schemes is empty; name at least one of " + ", ".join(WAYS)
    counts = {scheme.rank_count for scheme in SCHEMES}
    for pattern, ranks in config.rank.items():
        parts = ranks.split(",")
        if len(parts) not in counts or not all(_RANK.fullmatch(p.strip()) for p in parts):
            yield f"rank {pattern}={ranks} is not a positive whole number, or two as 8,16"


def _wrong_preprocessing(config: Settings) -> Iterable[str]:
    if not all(math.isfinite(number) for number in (*config.mean, *config.std)):
        yield "mean or std holds a number that is not finite"
    if len(config.mean) != len(config.std):
        yield f"mean has {len(config.mean)} numbers and std has {len(config.std)}"
    if any(s <= 0 for s in config.std):
        yield "std holds a number that is not positive"


def _unwritable(config: Settings) -> Iterable[str]:
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
