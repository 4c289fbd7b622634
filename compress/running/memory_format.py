"""Networks in another memory format and in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class Layout:
    """The tensors of some modules in several memory formats, switched without a copy."""

    def __init__(self, modules: Iterable[nn.Module], formats: Sequence[str]) -> None:
        for name in formats:
            _check(name)
        tensors = {
            id(tensor): tensor
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._tensors = [t for t in tensors.values() if t.dim() == 4]
        self._original = [t.data for t in self._tensors]
        self._data = {name: [in_format(t.data, name) for t in self._tensors] for name in formats}

    def use(self, name: str) -> None:
        """Give every tensor its data in that format."""
        self._set(self._data[name])

    def restore(self) -> None:
        """Give every tensor the very data it had."""
        self._set(self._original)

    def _set(self, data: Sequence[Tensor]) -> None:
        for tensor, values in zip(self._tensors, data, strict=True):
            tensor.data = values


@contextmanager
def in_memory_format(model: nn.Module, memory_format: str) -> Iterator[nn.Module]:
    """Run ``model`` with its four-dimensional tensors in a memory format, then put them back.

    Parameters stay the same objects and get back the very storage they had. What is written to
    them meanwhile is lost, so this is for inference. The input is the caller's to convert.

    Args:
        model: The network, changed until the block is left.
        memory_format: ``"contiguous"`` or ``"channels_last"``.

    Raises:
        ValueError: Another memory format.
    """
    layout = Layout([model], [memory_format])
    layout.use(memory_format)
    try:
        yield model
    finally:
        layout.restore()


def in_format(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor in a memory format; other than four dimensions have only one.

    Raises:
        ValueError: An unknown memory format.
    """
    _check(name)
    return tensor.contiguous(memory_format=MEMORY_FORMATS[name]) if tensor.dim() == 4 else tensor


def put_in_format(model: nn.Module, name: str) -> None:
    """Put a model's four-dimensional tensors in a memory format, in place and for good.

    Raises:
        ValueError: An unknown memory format.
    """
    _check(name)
    # torch's annotation of Module.to leaves this overload out.
    model.to(memory_format=MEMORY_FORMATS[name])  # type: ignore[call-overload]


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch to evaluation under inference mode, and restore each module's own flag."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in flags:
            part.training = training


def _check(name: str) -> None:
    if name not in MEMORY_FORMATS:
        raise ValueError(f"memory format {name!r} is not one of {', '.join(MEMORY_FORMATS)}")
