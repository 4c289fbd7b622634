"""``onnx:FILE``: a network in an ONNX file, rebuilt of torch's layers by onnx2torch.

The weights are in the file, or in files beside it. The file is somebody else's: its nodes' names
become names of modules in code that torch.fx writes and runs, so they are made plain before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import ModelError, one_line
from compress.libraries.onnx_linear import restore_linear
from compress.libraries.record import FromLibrary, Library, few_modules, quiet, require

_NO_NAME = re.compile(r"\W+", re.ASCII)
_LONGEST_NAME = 200
_TAKEN = frozenset((*dir(nn.Module()), "initializers"))


def _build(file: str, arguments: dict[str, Any]) -> FromLibrary:
    if arguments:
        raise ModelError(f"onnx:{file} takes no arguments: the file says all; leave out ?….")
    onnx = require("onnx", "onnx", "Models of onnx:")
    onnx2torch = require("onnx2torch", "onnx", "Models of onnx:")
    model = _read(file)
    try:
        with quiet():
            _check_external(model, Path(file))
            onnx.external_data_helper.load_external_data_for_model(model, str(Path(file).parent))
            _make_names_plain(model.graph.node)
            with few_modules():
                module = onnx2torch.convert(model)
                restore_linear(module)
            shape = _input_shape(model)
    except ModelError:
        raise
    except NotImplementedError as error:
        raise ModelError(
            f"onnx2torch cannot rebuild {file}: {one_line(error)}. Pass the network's own code as "
            "--model, with a checkpoint."
        ) from error
    except Exception as error:
        raise ModelError(
            f"{file} cannot be rebuilt as a network of torch: {type(error).__name__}: "
            f"{one_line(error)[:500]}."
        ) from error
    return FromLibrary(module, None, shape)


def _read(file: str) -> Any:
    """Read an ONNX file without what lies beside it.

    Raises:
        ModelError: It cannot be read, or is none.
    """
    onnx = require("onnx", "onnx", "Models of onnx:")
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file; onnx:FILE takes an ONNX file.")
        with open(path, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}; onnx:FILE takes an ONNX file."
        ) from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's errors are of no common type
        raise ModelError(
            f"{path} is damaged or no ONNX file: {one_line(error)}; export or fetch it again."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path} is no ONNX file, or one without a network in it.")
    return model


def _external(model: Any) -> Iterable[tuple[str, str]]:
    """Where tensors say that they lie, outside the file: names of tensors with places."""
    stored = [*model.graph.initializer]
    stored += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in stored:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield tensor.name, entry.value


def _check_external(model: Any, file: Path) -> None:
    """Refuse weights that lie anywhere but beside the file.

    Raises:
        ModelError: They do, or are not there.
    """
    for tensor, place in _external(model):
        if Path(place).name != place or "\\" in place or place in ("", ".", ".."):
            raise ModelError(
                f"{file} keeps {tensor[:60]!r} in {place[:100]!r}; only files beside it are read."
            )
        if not (file.parent / place).is_file():
            raise ModelError(
                f"{file} keeps weights in {place!r}, which is not there as a file; put it beside."
            )


def _files(file: str) -> tuple[Path, ...]:
    """The file and those beside it that hold weights."""
    model = _read(file)
    _check_external(model, Path(file))
    beside = {place for _, place in _external(model)}
    return (Path(file), *(Path(file).parent / place for place in sorted(beside)))


def _make_names_plain(nodes: Iterable[Any]) -> None:
    """Give every node a name of letters, digits and ``_``, and no two the same."""
    taken = set(_TAKEN)
    for node in nodes:
        plain = _NO_NAME.sub("_", node.name or node.op_type)[:_LONGEST_NAME].strip("_") or "node"
        name, count = plain, 1
        while name in taken or f"{node.domain}/{name}" in taken:
            count += 1
            name = f"{plain}_{count}"
        taken.add(name)
        node.name = name
        if _NO_NAME.search(node.domain.replace(".", "_")):
            raise ValueError(f"it has a node of the domain {node.domain[:60]!r}, which is no name")


def _input_shape(model: Any) -> tuple[int, ...] | None:
    """The shape of the first input without its batch axis, where the file says it."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in stored]
    if len(inputs) != 1:
        raise ValueError(f"it has {len(inputs)} inputs; networks with one, the images, are taken")
    sides = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim][1:]
    return tuple(sides) if len(sides) > 0 and all(n > 0 for n in sides) else None


ONNX = Library(
    "onnx",
    "onnx:path/to/net.onnx",
    _build,
    sized_by_arguments=False,
    place=lambda name: name,
    checkpoint=lambda name: name,
    files=_files,
    brings_weights=True,
)
