"""The run's configuration: every default in one frozen record, TOML in and out.

Precedence is default < config file < flag. An unknown key is an error that lists the valid ones.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from compress.errors import ConfigError, near_matches
from compress.linalg.schemes import OUTPUT, SCHEME_NAMES, SCHEMES
from compress.plan import DENSE

METRICS = ("loss", "mse")
RULES = ("threshold", "energy", "macs", "params", "latency", "target_drop")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run. Fractions are in (0, 1], drops in points."""

    # What goes in and where the result goes.
    checkpoint: str = ""
    model: str = ""
    data: str = ""
    test: str = ""
    output: str = ""

    # How images become tensors; empty means the model's own preset, or [0, 1] scaling alone.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    crop: int | None = None
    class_map: str = ""

    # Where and how it computes.
    device: str = "cpu"
    threads: int | None = None
    batch_size: int | None = None  # None: by image size
    workers: int = 0
    seed: int = 0

    # Calibration. Of the images taken from `data`, a quarter validates and the rest fits.
    calibration_images: int = 1000
    calibration: str = ""
    samples_per_dimension: int = 64
    metric: str = "loss"
    metric_fn: str = ""
    loss_fn: str = ""

    # Which rule chooses the ranks; at most one, threshold when none is given.
    threshold: float | None = None
    energy: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    target_drop: float | None = None

    # What the rule may choose from.
    schemes: tuple[str, ...] = SCHEME_NAMES
    rank: dict[str, str] = field(default_factory=dict)  # glob -> "R" or "R1,R2"
    scheme: dict[str, str] = field(default_factory=dict)  # glob -> scheme
    keep: tuple[str, ...] = ()
    force_rank: bool = False
    round_to: int | None = None
    refit: bool = True
    latency_batch: int = 8
    latency_table: str = ""

    # What the result must satisfy on the test set before it is saved.
    max_drop: float | None = None
    max_layer_relative_mse: float | None = None
    min_agreement: float | None = None

    force: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rule(self) -> str:
        """The name of the rank rule in force.

        ``"rank"`` where ranks are given by hand and no rule: every other layer is then kept.
        """
        given = [r for r in RULES if getattr(self, r) is not None]
        return given[0] if given else "rank" if self.rank else "threshold"

    @property
    def rule_value(self) -> float | None:
        """The value of the rule in force; by default threshold 1e-3. Ranks by hand have none."""
        if self.rule == "rank":
            return None
        value = getattr(self, self.rule)
        return 1e-3 if value is None else float(value)

    @property
    def schemes_in_play(self) -> tuple[str, ...]:
        """The schemes that the rule may come to use: a spectrum's cut is the output scheme's."""
        asked = {s for s in self.scheme.values() if s != DENSE}
        counts = {len(ranks.split(",")) for ranks in self.rank.values()}
        asked |= {s.name for s in SCHEMES if s.rank_count > 1 and s.rank_count in counts}
        free = {OUTPUT.name} if self.rule in ("threshold", "energy", "rank") else set(self.schemes)
        return tuple(s for s in SCHEME_NAMES if s in asked | free)

    @property
    def pools(self) -> bool:
        """Whether errors are measured in the metric of whole weight gradients.

        See `compress.calibrate.pooled`.

        By the rules that weigh layers against each other; a spectrum's rank is a matter of the
        outputs alone.
        """
        return self.metric == "loss" and self.rule not in ("threshold", "energy", "rank")

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with ``changes`` applied and checked."""
        return dataclasses.replace(self, **changes)

    def to_toml(self) -> str:
        """Write every setting that is not None as TOML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if value is not None
        }
        return tomli_w.dumps(values)


def _check(config: RunConfig) -> None:
    """Raise `ConfigError` with every problem found, not only the first."""
    problems = []
    given = [r for r in RULES if getattr(config, r) is not None]
    if len(given) > 1:
        problems.append(f"{' and '.join(given)} contradict each other: give one rank rule")
    for name in ("energy", "macs", "params", "latency"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            problems.append(f"{name} = {value} is outside (0, 1]")
    if config.threshold is not None and not 0 <= config.threshold < 1:
        problems.append(f"threshold = {config.threshold} is outside [0, 1)")
    for name in ("target_drop", "max_drop"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 100:
            problems.append(f"{name} = {value} is not a number of points from 0 to 100")
    if config.min_agreement is not None and not 0 <= config.min_agreement <= 1:
        problems.append(f"min_agreement = {config.min_agreement} is outside [0, 1]")
    for name in (
        "batch_size", "calibration_images", "samples_per_dimension", "latency_batch",
        "threads", "round_to", "resize", "crop",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            problems.append(f"{name} = {value} is not a positive number")
    if config.workers < 0:
        problems.append(f"workers = {config.workers} is negative")
    if config.metric not in METRICS:
        problems.append(f"metric = {config.metric!r} is not one of {', '.join(METRICS)}")
    for scheme in (*config.schemes, *config.scheme.values()):
        if scheme not in (*SCHEME_NAMES, DENSE):
            problems.append(
                f"scheme {scheme!r} is unknown; the schemes are {', '.join(SCHEME_NAMES)} and "
                f"{DENSE}." + near_matches(scheme, SCHEME_NAMES)
            )
    if not config.schemes:
        problems.append("schemes is empty; name at least one of " + ", ".join(SCHEME_NAMES))
    for pattern, ranks in config.rank.items():
        parts, counts = ranks.split(","), {scheme.rank_count for scheme in SCHEMES}
        if len(parts) not in counts or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            problems.append(
                f"rank {pattern}={ranks} is not a positive whole number, or two as 8,16"
            )
    if not 0 <= config.seed < 1 << 32:
        problems.append(f"seed = {config.seed} is outside 0 to {(1 << 32) - 1}")
    relative = config.max_layer_relative_mse
    if relative is not None and not relative >= 0:
        problems.append(f"max_layer_relative_mse = {relative} is not a number from 0")
    if not all(math.isfinite(number) for number in (*config.mean, *config.std)):
        problems.append("mean or std holds a number that is not finite")
    if len(config.mean) != len(config.std):
        problems.append(f"mean has {len(config.mean)} numbers and std has {len(config.std)}")
    if any(s <= 0 for s in config.std):
        problems.append("std holds a number that is not positive")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        The settings it holds, ready to be overridden by flags and passed to `make_config`.

    Raises:
        ConfigError: The file is missing, is no TOML or holds an unknown key.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    check_keys(values, f"the configuration file {path}")
    return values


def check_keys(values: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for keys that are no settings, with near matches and the valid ones."""
    valid = [f.name for f in dataclasses.fields(RunConfig)]
    for key in values:
        if key not in valid:
            raise ConfigError(
                f"Unknown key {key!r} in {where}.{near_matches(key, valid)} "
                f"The valid keys are {', '.join(valid)}."
            )


def make_config(values: dict[str, Any]) -> RunConfig:
    """Build a checked `RunConfig` from plain values; lists become tuples.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of range.
    """
    check_keys(values, "the settings")
    ready: dict[str, Any] = {}
    for spec in dataclasses.fields(RunConfig):
        if spec.name not in values:
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
    base = annotation.split("|")[0].split("[")[0].strip()
    fits = type(value) in _EXPECTED[base]  # exactly: True is an int to isinstance
    if not fits:
        raise ConfigError(f"{name} = {value!r} should be of type {annotation}.")
    if isinstance(value, tuple):
        inner = annotation.split("[")[1].split(",")[0]
        return tuple(_typed(f"each of {name}", inner, part) for part in value)
    return float(value) if base == "float" else value
