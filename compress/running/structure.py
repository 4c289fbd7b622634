"""Nested values: what a forward takes and returns, beyond a single tensor.

A structure is a tensor, or a tuple, list, mapping, named tuple or dataclass of structures, or an
object with ``logits``; whatever else lies in one is left as it is. The inputs of a network are a
tensor, a tuple of what its forward takes by position, or a mapping of what it takes by name.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from compress.running.memory_format import in_format


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return all tensors of a structure by their paths, such as ``out.aux`` or ``[1].scores``.

    The path of a tensor that is all there is, is empty.
    """
    if isinstance(value, Tensor):
        return {path: value}
    found: dict[str, Tensor] = {}
    for name, part in _parts(value):
        found.update(tensors(part, path + name if name.startswith("[") else f"{path}.{name}"))
    return {name.removeprefix("."): tensor for name, tensor in found.items()}


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a structure like another, each of its tensors changed, in the order of `tensors`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like(value, {key: mapped(part, change) for key, part in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[mapped(part, change) for part in value])
    if isinstance(value, tuple | list):
        return type(value)([mapped(part, change) for part in value])
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            # Past a frozen dataclass's own guard: the copy is nobody else's yet.
            object.__setattr__(made, field.name, mapped(getattr(value, field.name), change))
        return made
    if _holds_logits(value):
        made = copy.copy(value)
        made.logits = change(value.logits)
        return made
    return value


def _like(mapping: Any, content: dict[Any, Any]) -> Any:
    """A mapping of the kind of another."""
    if type(mapping) is dict:
        return content
    make: Callable[..., Any] = type(mapping)
    # Outputs of transformers are mappings and dataclasses both, made from keywords.
    if is_dataclass(mapping):
        return make(**content)
    try:
        return make(content)
    except TypeError:  # such as a defaultdict, which takes something else first
        return content


def rebuilt(like: Any, parts: list[Tensor] | tuple[Tensor, ...]) -> Any:
    """Return a structure like another that holds other tensors, given in the order of `tensors`."""
    left = iter(parts)
    return mapped(like, lambda _: next(left))


def floating(value: Any) -> dict[str, Tensor]:
    """Return the tensors of a structure that hold real numbers, by their paths."""
    return {path: tensor for path, tensor in tensors(value).items() if tensor.is_floating_point()}


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a forward is called with, by position and by name, for a network's inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def cloned(inputs: Any) -> Any:
    """Return a copy, which a forward may change in place."""
    return mapped(inputs, lambda tensor: tensor.clone())


def with_gradients(inputs: Any) -> Any:
    """Return a copy whose real numbers require gradients, so that all that follows has them."""

    def require(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied.requires_grad_() if copied.is_floating_point() else copied

    return mapped(inputs, require)


def count(inputs: Any) -> int:
    """Return how many images a batch of inputs holds."""
    return len(main_tensor(inputs))


def main_tensor(inputs: Any) -> Tensor:
    """Return the tensor of most axes, the first of these: the image, where there is one."""
    return max(tensors(inputs).values(), key=lambda tensor: tensor.dim())


def placed(
    inputs: Any,
    device: torch.device | str,
    memory_format: str = "contiguous",
    dtype: torch.dtype | None = None,
) -> Any:
    """Return inputs on a device and in a memory format; real numbers in a type, if one is given."""

    def put(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return in_format(tensor.to(device, wanted), memory_format)

    return mapped(inputs, put)


def like_weights(inputs: Any, reference: Tensor) -> Any:
    """Return inputs on the device and, real numbers, in the type of some weights.

    Where those are complex it is that of their real parts.
    """
    return placed(inputs, reference.device, dtype=reference.dtype.to_real())


def batched(inputs: Any) -> Any:
    """Return the inputs of one image with the batch axis."""
    return mapped(inputs, lambda tensor: tensor.unsqueeze(0))


def expanded(example: Any, images: int) -> Any:
    """Return a batch that holds one image's inputs ``[1, ...]`` several times."""
    return mapped(example, lambda t: t.expand(images, *t.shape[1:]).contiguous())


def size(value: Any) -> int:
    """Return the bytes that the tensors of a structure take."""
    return sum(t.numel() * t.element_size() for t in tensors(value).values())


def checksum(value: Any) -> int:
    """Return a CRC-32 of the numbers in a structure, which tells whether they are the same."""
    found = 0
    for tensor in tensors(value).values():
        flat = tensor.detach().cpu().contiguous().flatten()
        found = zlib.crc32(flat.view(torch.uint8).numpy().data, found)
    return found


def shapes(inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a structure's tensors, by their paths."""
    return {path: tuple(tensor.shape) for path, tensor in tensors(inputs).items()}


def concatenated(batches: Sequence[Any]) -> Any:
    """Return several batches of inputs as one."""
    others = [iter(tensors(inputs).values()) for inputs in batches[1:]]
    return mapped(batches[0], lambda tensor: torch.cat([tensor, *(next(o) for o in others)]))


def part(inputs: Any, start: int, end: int | None) -> Any:
    """Return the inputs of some images of a batch."""
    return mapped(inputs, lambda tensor: tensor[start:end])


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What lies directly in a structure, by the end of its path."""
    if isinstance(value, Mapping):
        named = [(str(key), part) for key, part in value.items()]
        return [(name if name.isidentifier() else f"[{name!r}]", part) for name, part in named]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(name, getattr(value, name)) for name in value._fields]
    if isinstance(value, tuple | list):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return [("logits", value.logits)] if _holds_logits(value) else []


def _holds_logits(value: Any) -> bool:
    return isinstance(getattr(value, "logits", None), Tensor)
