"""The flags that commands share, and how they become one checked configuration.

Precedence: default < base of the command (what a plan or an artefact records) < --config < flag.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from compress.commands.terminal import Terminal
from compress.config import (
    EXPORTS,
    METRICS,
    RUNTIMES,
    TASK_NAMES,
    Role,
    RunConfig,
    make_config,
    read_toml,
    settings_of,
)
from compress.errors import ConfigError, one_line
from compress.linalg.schemes import SCHEME_NAMES
from compress.plan import NARROW, SLICE
from compress.rules import RULE_NAMES, RULES


class _Finite(click.types.FloatParamType):
    """A number that is one: neither NaN nor infinite."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


FINITE = _Finite()

Command = Callable[..., None]
Decorator = Callable[[Any], Any]


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a list of numbers such as 0.5,0.5,0.5"
        ) from error


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | list[int] | None:
    if value is None:
        return None
    parts = value.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(
            f"{value!r} is neither a whole number such as 224 nor a height and a width such as "
            "64,256"
        )
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else numbers


def _names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def _pairs(
    _: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str] | None:
    pairs = {}
    for value in values:
        name, equals, given = value.rpartition("=")
        if not equals or not name or not given:
            raise click.BadParameter(f"{value!r} is not {parameter.make_metavar(_)}")
        pairs[name] = given
    return pairs or None


def _listed(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str] | None:
    return list(values) or None


def _o(*names: str, text: str, **settings: Any) -> Decorator:
    """Make an option whose default is "not given": the configuration holds all defaults."""
    return click.option(*names, help=text, default=None, **settings)


_MODEL = (
    _o("--model", metavar="SPEC", text="How the network is built: torchvision:resnet18, "
       "timm:NAME, smp:NAME, hf:FOLDER, onnx:FILE, package.module:factory?width=32 or "
       "path/to/file.py:factory."),
    _o("--checkpoint-key", metavar="KEY", text="Where the weights lie in a checkpoint with "
       "several state dicts, dotted: ema, params_ema, model.state_dict."),
    _o("--prefix", metavar="PREFIX", text="Take only the checkpoint's entries whose names begin "
       "so, such as student., and strip that."),
)  # fmt: skip
_DATA = (
    _o("--data", metavar="SPEC", text="Images to calibrate on: imagefolder:DIR, tensors:FILE, "
       "idx:IMAGES,LABELS, torchvision:CIFAR10?root=DIR, package.module:factory."),
)  # fmt: skip
_TEST = (
    _o("--test", metavar="SPEC", text="Held-out labelled images for the final verification; "
       "never used to choose anything."),
)  # fmt: skip
_IMAGES = (
    _o("--mean", metavar="M,M,M", callback=_numbers, text="Mean per channel, after scaling to "
       "[0, 1]."),
    _o("--std", metavar="S,S,S", callback=_numbers, text="Standard deviation per channel."),
    _o("--resize", metavar="N|H,W", callback=_size, text="Resize the shorter side to N pixels, or "
       "pictures to exactly H by W."),
    _o("--crop", metavar="N|H,W", callback=_size, text="Cut an NxN square, or H by W pixels, from "
       "the centre."),
    _o("--class-map", metavar="FILE", text="Class names in the model's order, where the folders' "
       "order is another."),
)  # fmt: skip
_COMPUTE = (
    _o("--device", metavar="NAME", text="Where to compute: cpu (default), cuda, cuda:1."),
    _o("--threads", type=int, metavar="N", text="CPU threads for torch."),
    _o("--batch-size", type=int, metavar="N", text="Images a batch (default: by image size)."),
    _o("--workers", type=int, metavar="N", text="Processes that decode images (default 0)."),
    _o("--seed", type=int, metavar="N", text="Decides every random draw (default 0)."),
)  # fmt: skip
_SAMPLE = (
    _o("--calibration-images", type=int, metavar="N", text="Images taken from --data (default "
       "1000); a quarter of them validates."),
    _o("--samples-per-dimension", type=int, metavar="N", text="Output positions sampled, in "
       "multiples of a layer's row length (default 64)."),
)  # fmt: skip
_CALIBRATION = (
    *_SAMPLE,
    _o("--augment/--no-augment", text="Also calibrate on mirrored and shifted copies of few "
       "pictures, if the network's outputs for these are like those for the pictures (default "
       "on)."),
    _o("--calibration", metavar="FILE", text="Statistics: written once, reused where model, data "
       "and settings are the same."),
    _o("--metric", metavar="NAME", text=f"What errors are weighed by: {' or '.join(METRICS)} "
       "(default loss)."),
    _o("--loss-fn", metavar="SPEC", text="package.module:function (outputs, labels) -> summed "
       "loss, for outputs that are not logits."),
)  # fmt: skip
_RULES = (
    *(_o(rule.flag, type=FINITE, metavar=rule.metavar, text=rule.help) for rule in RULES),
    _o("--rank", metavar="NAME=R", multiple=True, callback=_pairs, text="Rank of a layer, by name "
       "or glob (R1,R2 for two_sided). Repeatable; without a rule all other layers are kept."),
    _o("--keep", metavar="GLOB", multiple=True, callback=_listed, text="Leave these layers as "
       "they are. Repeatable."),
    _o("--scheme", metavar="GLOB=NAME", multiple=True, callback=_pairs, text="Scheme of these "
       f"layers: {', '.join(SCHEME_NAMES)} or dense. Repeatable."),
    _o("--round-to", type=int, metavar="N", text="Round ranks and widths up to a multiple of N "
       "(with --latency by default what this device is fast at)."),
    _o("--latency-table", metavar="FILE", text="Measured times of layers: written once, and "
       "reused on the same device by later runs with --latency."),
    _o("--force-rank", is_flag=True, text="Rewrite at --rank even beyond break-even."),
)  # fmt: skip
_SCHEMES = (
    _o("--schemes", metavar="A,B", callback=_names, text="The schemes a budget may choose from: "
       f"{', '.join(SCHEME_NAMES)}, and {NARROW} and {SLICE}, which take channels, or mixtures of "
       "them, out of groups of layers. Default all; with --latency channels only where ranks do "
       "not reach the budget."),
)  # fmt: skip
_FIT = (
    _o("--refit/--no-refit", text="Refit on the compressed network, layer by layer "
       "and then four blocks at a time (default on)."),
    _o("--recover", type=FINITE, metavar="MINUTES", text="Let the compressed network learn from "
       "the original for so long, on all images of --data, without labels."),
)  # fmt: skip
_JUDGING = (
    _o("--task", metavar="NAME", text="What the network is for, which decides what its outputs "
       f"are weighed and measured by: {', '.join(TASK_NAMES)}. All but the first need "
       "compress[metrics]."),
    _o("--ignore-index", type=int, metavar="N", text="Pixels of masks, and labels of --task "
       "multilabel, that are N are not judged (default 255)."),
    _o("--metric-fn", metavar="SPEC", text="package.module:function (model, batches) -> number, "
       "for networks that are not classifiers."),
    _o("--latency-batch", type=int, metavar="N", text="Time batches of N, besides batches of one "
       "(default 8)."),
    _o("--runtime", type=click.Choice(RUNTIMES), text="What the networks are timed on, and what a "
       "budget of --latency is a share of (default torch): torch.compile, ONNX Runtime "
       "(compress[onnx]) or OpenVINO (compress[openvino]); others than torch are shown beside it."),
)  # fmt: skip
_EVALUATION = (
    *_JUDGING,
    _o("--no-latency", is_flag=True, text="Time nothing. By default timing takes at most a tenth "
       "of the time spent before, or 5 seconds where that is more, with fewer rounds where the "
       "network is slow."),
)  # fmt: skip
_CURVE = (
    _o("--progressive", is_flag=True, text="Also measure the network after each further layer is "
       "replaced, in the order of the forward; the report draws the curve."),
)  # fmt: skip
_GATES = (
    _o("--max-drop", type=FINITE, metavar="P", text="Fail where test accuracy falls by more than "
       "P points."),
    _o("--max-layer-relative-mse", type=FINITE, metavar="X", text="Fail where a layer's relative "
       "error, in place in the compressed network and on held-out images, is larger."),
    _o("--min-agreement", type=FINITE, metavar="A", text="Fail where fewer predictions than this "
       "share stay the same."),
)  # fmt: skip
_OUTPUT = (
    _o("--output", metavar="DIR", text="The result folder."),
    _o("--force", is_flag=True, text="Replace an existing result."),
)  # fmt: skip
_EXPORT = (
    _o("--export", type=click.Choice(EXPORTS), text="Also export the result, as compress export "
       "does, to model.onnx, model.pt2 or model.aoti.pt2 in the result folder."),
)  # fmt: skip

GROUPS: dict[str, tuple[Decorator, ...]] = {
    "model": _MODEL,
    "data": _DATA,
    "test": _TEST,
    "images": _IMAGES,
    "compute": _COMPUTE,
    "sample": _SAMPLE,
    "calibration": _CALIBRATION,
    "rules": _RULES,
    "schemes": _SCHEMES,
    "fit": _FIT,
    "judging": _JUDGING,
    "evaluation": _EVALUATION,
    "curve": _CURVE,
    "gates": _GATES,
    "output": _OUTPUT,
    "export": _EXPORT,
}
_COMMON = (
    click.option("--config", "config_file", metavar="FILE", help="Settings as TOML; flags win."),
    click.option(
        "--trust-code",
        is_flag=True,
        help="Run the code that a result, a plan or the configuration in a result folder names.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def example(*lines: str) -> str:
    """Return example command lines as the end of a command's help."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def configured(*groups: str) -> Callable[[Command], Command]:
    """Give a command the flags of some groups, and call it with what they come to.

    The command is called as ``command(settings, terminal, **others)``: the `Settings` given by
    flags and file, the terminal, and whatever flags and arguments are its own.
    """
    names = set(settings_of(*Role))

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(
            config_file: str | None, *, as_json: bool, quiet: bool, trust_code: bool, **values: Any
        ) -> None:
            flags = {k: v for k, v in values.items() if k in names and v is not None}
            file = _read_settings(config_file, flags, trust_code=trust_code)
            settings = Settings(file, flags, trust_code=trust_code)
            # --debug is looked up where errors are caught.
            own = {k: v for k, v in values.items() if k not in names and k != "debug"}
            command(settings, Terminal(quiet=quiet, as_json=as_json), **own)

        options = [option for group in groups for option in GROUPS[group]]
        for option in reversed([*options, *_COMMON]):
            called = option(called)
        return called

    return decorate


def _read_settings(
    path: str | None, flags: Mapping[str, Any], *, trust_code: bool
) -> dict[str, Any]:
    """Read the file of --config; of one in a result folder, code is taken only with trust."""
    if path is None:
        return {}
    values = read_toml(path)
    if trust_code:
        return values
    from compress.trust import is_in_result_folder, setting_risks

    if not is_in_result_folder(path):
        return values
    for name, risk in setting_risks({k: v for k, v in values.items() if k not in flags}).items():
        raise ConfigError(
            f"The setting {name!r} of {path} {risk}, which the configuration in a result folder "
            f"must not do unasked: pass --{name.replace('_', '-')} yourself, or --trust-code where "
            "you trust the folder."
        )
    return values


class Settings:
    """What the user set, before it is one configuration.

    Args:
        file: The settings of --config.
        flags: The settings given by flags.
        trust_code: Whether the code that a file names may be run.
    """

    def __init__(
        self, file: dict[str, Any], flags: dict[str, Any], *, trust_code: bool = False
    ) -> None:
        self.file, self.flags, self.trust_code = file, flags, trust_code

    def config(self, **base: Any) -> RunConfig:
        """Return the checked configuration, and set torch's threads by it.

        Args:
            **base: Defaults of the command, which file and flags override.

        Raises:
            ConfigError: An unknown key, a value out of range, rules that contradict each other, a
                device that is not there.
        """
        config = make_config({**base, **_without_rules(self.file, self.flags), **self.flags})
        _set_up(config)
        return config if config.checkpoint else _with_own_checkpoint(config)

    def given(self, name: str) -> Any:
        """What flag or file say of a setting; None where neither does."""
        return self.flags.get(name, self.file.get(name))


def _without_rules(file: dict[str, Any], flags: Iterable[str]) -> dict[str, Any]:
    """Take the file's rank rule away where a flag gives another: the flag wins, not both."""
    if not any(rule in flags for rule in RULE_NAMES):
        return file
    return {key: value for key, value in file.items() if key not in RULE_NAMES}


def _with_own_checkpoint(config: RunConfig) -> RunConfig:
    """Take the weights that the model spec brings along, where it does."""
    from compress.inputs.load import checkpoint_beside

    return config.replace(checkpoint=checkpoint_beside(config.model))


def _set_up(config: RunConfig) -> None:
    """Apply threads and check the device, before any work."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        # Of a device that only pretends, no number; of one without double precision, none of that.
        torch.ones(1, device=config.device, dtype=torch.float64).item()
    # Unknown names, backends not built in and devices that are not there raise one each.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # Torch goes on about builds and backends for paragraphs.
        reason = one_line(error).partition(". ")[0]
        raise ConfigError(
            f"The device {config.device!r} cannot be used: {reason}. Pass --device cpu, or one "
            "that torch finds here."
        ) from error
