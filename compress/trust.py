"""What a file of somebody else's may ask for without the user's word: nothing that runs code.

A result, a plan, or the configuration in a result folder names the model it belongs to. Building
the plain networks of installed libraries and the demo's is harmless; everything else such a file
may name is code, a download or a request for more memory than a network takes, and needs
``--trust-code``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError, DataError, ModelError
from compress.libraries import library_of
from compress.libraries.record import without_memory
from compress.specs import split_spec

# Whole factories, not their module: compress.demo_data.network also holds what it imports, and
# a prefix of it may go on as the name of a file.
EMBEDDED_MODELS = frozenset({"compress.demo_data.network:width32"})
_ARRAYS_AND_PICTURES = ("imagefolder", "tensors", "idx")
# Three times the largest of torchvision's networks.
LARGEST_UNTRUSTED = 8 * 2**30
_MARKS = ("model.safetensors", "report.json", "sweep.csv", "sweep.points")


def model_risk(spec: str) -> str:
    """Say what building a model spec would do that a file must not ask for; ``""`` for nothing.

    Raises:
        ModelError: The spec is malformed.
    """
    head, arguments = split_spec(spec, ModelError)
    if head in EMBEDDED_MODELS:
        return "" if _are_numbers(arguments) else f"passes {arguments} to {head}"
    found = library_of(head)
    if found is None:
        return f"imports and runs the code {head!r}"
    risk = found[0].risk(arguments)
    return f"{risk}, by {spec!r}" if risk else ""


def _are_numbers(arguments: Mapping[str, Any]) -> bool:
    return all(isinstance(value, bool | int | float) for value in arguments.values())


def data_risk(spec: str) -> str:
    """Say what opening a data spec would do that a file must not ask for; ``""`` for nothing.

    Raises:
        DataError: The spec is malformed.
    """
    head = split_spec(spec, DataError)[0]
    kind = head.partition(":")[0]
    if kind in _ARRAYS_AND_PICTURES:
        return ""
    if kind == "torchvision":
        return f"may download and unpickle the data set {head!r}"
    return f"imports and runs the code {head!r}"


def _function_risk(spec: str) -> str:
    return f"imports and runs the code {spec!r}"


_RISKS: Mapping[str, Callable[[str], str]] = {
    "model": model_risk,
    "data": data_risk,
    "test": data_risk,
    "metric_fn": _function_risk,
    "loss_fn": _function_risk,
}


def setting_risks(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the risks of settings that somebody's file makes, by name; none where harmless.

    Raises:
        InputError: A spec is malformed.
    """
    specs = {n: v for n, v in values.items() if n in _RISKS and isinstance(v, str) and v}
    risks = {name: _RISKS[name](spec) for name, spec in specs.items()}
    return {name: risk for name, risk in risks.items() if risk}


def require_trusted_model(spec: str, source: str, error: type[CompressError]) -> None:
    """Refuse a model that a file names, where building it is not plainly harmless.

    Args:
        spec: The model spec in the file.
        source: What names it, for the message: ``"The plan"``.
        error: The exception type to raise.

    Raises:
        CompressError: Of the type ``error``.
    """
    risk = model_risk(spec)
    if not risk:
        risk = _size_risk(spec)
    if risk:
        raise error(
            f"{source} {risk}, which a file must not do unasked: say yourself what builds the "
            "network (--model, or model= in Python), or pass --trust-code (trust_code=True) where "
            "you trust the file."
        )


def _size_risk(spec: str) -> str:
    """Say whether a library's network would take more memory than any of its plain ones."""
    head, arguments = split_spec(spec, ModelError)
    found = library_of(head)
    if found is None or not found[0].sized_by_arguments or not arguments:
        return ""
    library, name = found
    try:
        with without_memory():
            module = library.build(name, arguments).module
    except ModelError as error:
        return f"names a network whose size cannot be told before it is built ({error})"
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size <= LARGEST_UNTRUSTED:
        return ""
    return f"asks for a network of {size / 2**30:,.0f} GiB, by {spec!r}"


def is_in_result_folder(path: str | Path) -> bool:
    """Whether a file lies beside what a run, a sweep or a report leaves in its folder."""
    folder = Path(path).resolve().parent
    return any((folder / name).exists() for name in _MARKS)
