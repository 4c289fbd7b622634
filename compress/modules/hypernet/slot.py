"""The slot: a place for a tensor of a fixed shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.modules.hypernet.sizes import shape as checked_shape


class ExternalParameter:
    """A slot for a tensor of a fixed shape.

    Copies and pickles hold its value without the graph that made it.

    Args:
        shape: Shape of the values.
        data: A first value; None leaves the slot unset.
        dtype: Their dtype; None takes any.

    Attributes:
        name: What errors call the slot; set by the module that holds it.

    Raises:
        TypeError: Sides of ``shape`` that are not integers, ``data`` that is not a tensor, or
            ``dtype`` that is not a dtype.
        ValueError: A negative side, ``data`` of another shape or dtype.
    """

    def __init__(
        self,
        shape: Sequence[int],
        data: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shape = torch.Size(checked_shape("ExternalParameter: shape", shape))
        if isinstance(data, torch.dtype):
            raise TypeError(
                f"ExternalParameter takes data before dtype; write dtype={data} for a dtype."
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"ExternalParameter: dtype must be a torch.dtype, not a {type(dtype).__name__}."
            )
        self.dtype = dtype
        self.name = "unnamed"
        self._value: Tensor | None = None
        if data is not None:
            self.data = data

    @property
    def is_set(self) -> bool:
        """Whether there is a value."""
        return self._value is not None

    @property
    def data(self) -> Tensor:
        """The value.

        Raises:
            AttributeError: Reading before a value was set.
            TypeError: Setting something that is not a tensor.
            ValueError: Setting a tensor of another shape or dtype.
        """
        if self._value is None:
            raise AttributeError(
                f"The external parameter {self.name!r} of shape {tuple(self.shape)} is not set; "
                "use set_externals or using_externals first."
            )
        return self._value

    @data.setter
    def data(self, value: Tensor) -> None:
        self.check(value)
        self._value = value

    def check(self, value: Tensor, name: str | None = None) -> None:
        """Raise as setting ``value`` would, calling the slot ``name``."""
        name = name or self.name
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The external parameter {name!r} takes a tensor, not a {type(value).__name__}."
            )
        if value.shape != self.shape:
            raise ValueError(
                f"The external parameter {name!r} has shape {tuple(self.shape)}; it got a tensor "
                f"of shape {tuple(value.shape)}."
            )
        if self.dtype is not None and value.dtype != self.dtype:
            raise ValueError(
                f"The external parameter {name!r} is of {self.dtype}; it got {value.dtype}."
            )

    def reset(self) -> None:
        """Empty the slot."""
        self._value = None

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module's ``.to(...)``: the value, and the dtype that is asked for."""
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self._value is not None:
            self._value = fn(self._value)

    def __getstate__(self) -> dict[str, Any]:
        value = None if self._value is None else self._value.detach()
        return {**self.__dict__, "_value": value}

    def __repr__(self) -> str:
        state = "set" if self.is_set else "unset"
        return f"ExternalParameter(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"
