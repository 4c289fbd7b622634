"""Modules that hold slots for parameters that come from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.errors import near_matches
from compress.modules.hypernet.slot import ExternalParameter

Values = Mapping[str, Tensor]


class HyperModule(nn.Module):
    """A module that holds slots beside ordinary parameters, itself or in its submodules.

    Assigning an `ExternalParameter` to an attribute makes the slot; reading the attribute gives
    its value, assigning a tensor sets it. Slots are in no state dict.
    """

    _external_parameters: dict[str, ExternalParameter]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_external_parameters"] = {}
        super().__init__(*args, **kwargs)

    def register_external(self, name: str, param: ExternalParameter) -> None:
        """Add a slot.

        Raises:
            TypeError: ``param`` is no `ExternalParameter`, ``name`` no string.
            KeyError: A name with a dot, or one that is taken.
        """
        kind = type(self).__name__
        if not isinstance(name, str):
            raise TypeError(f"{kind}: a slot's name is a string, not {name!r}.")
        if not isinstance(param, ExternalParameter):
            raise TypeError(
                f"{kind}.{name} must be an ExternalParameter, not a {type(param).__name__}."
            )
        if not name or "." in name:
            raise KeyError(f"{kind}: {name!r} cannot name a slot; it is empty or has a dot.")
        taken = (self.__dict__, self._parameters, self._buffers, self._modules)
        if any(name in place for place in taken):
            raise KeyError(f"{kind} has an attribute {name!r} already.")
        if param.name == "unnamed":
            param.name = f"{kind}.{name}"
        self._external_parameters[name] = param

    def __setattr__(self, name: str, value: Any) -> None:
        slots = self.__dict__.get("_external_parameters", {})
        if isinstance(value, ExternalParameter):
            if "_external_parameters" not in self.__dict__:
                raise AttributeError(
                    f"{type(self).__name__}.{name} cannot be a slot before HyperModule.__init__()."
                )
            slots.pop(name, None)
            self.register_external(name, value)
        elif name in slots and isinstance(value, Tensor):
            slots[name].data = value
        else:
            slots.pop(name, None)
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        slots = self.__dict__.get("_external_parameters", {})
        if name in slots:
            return slots[name].data
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        if self._external_parameters.pop(name, None) is None:
            super().__delattr__(name)

    def named_externals(self, prefix: str = "") -> Iterator[tuple[str, ExternalParameter]]:
        """Yield every slot here and below once, by its first dotted name."""
        seen: set[int] = set()
        for name, slot in self._every_name(prefix):
            if id(slot) not in seen:
                seen.add(id(slot))
                yield name, slot

    def _every_name(self, prefix: str = "") -> Iterator[tuple[str, ExternalParameter]]:
        for path, module in self.named_modules(prefix=prefix, remove_duplicate=False):
            if isinstance(module, HyperModule):
                for leaf, slot in module._external_parameters.items():
                    yield f"{path}.{leaf}" if path else leaf, slot

    def externals(self) -> Iterator[ExternalParameter]:
        """Yield every slot here and below once."""
        for _, slot in self.named_externals():
            yield slot

    def external_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every slot by dotted name."""
        return {name: tuple(slot.shape) for name, slot in self.named_externals()}

    def get_external(self, name: str) -> ExternalParameter:
        """Return a slot by dotted name.

        Raises:
            ValueError: No such slot.
        """
        return self._slots([name])[name]

    def set_externals(self, values: Values | None = None, /, **named: Tensor) -> None:
        """Set some slots by dotted name: ``set_externals(weight=w)`` or ``set_externals({...})``.

        Raises:
            ValueError: An unknown name, or a value of another shape or dtype; nothing is set.
        """
        given = {**(values or {}), **named}
        for slot, value in self._checked(given):
            slot.data = value

    def set_external(self, name: str, value: Tensor) -> None:
        """Set one slot by dotted name, as `set_externals` does."""
        self.set_externals({name: value})

    def apply_externals(self, values: Values | Mapping[HyperModule, Values]) -> None:
        """Set some slots: ``{"0.weight": w}``, or by module as in ``{model[0]: {"weight": w}}``.

        Raises:
            ValueError: As `set_externals`, or a module that is not here or below; nothing is set.
        """
        paths = {id(module): path for path, module in self.named_modules()}
        flat: dict[str, Tensor] = {}
        for key, value in values.items():
            if isinstance(key, str):
                flat[key] = value  # type: ignore[assignment]  # a wrong type is refused below
                continue
            if id(key) not in paths:
                raise ValueError(
                    f"This {type(key).__name__} is not a module of the {type(self).__name__}."
                )
            path = paths[id(key)]
            flat |= {f"{path}.{leaf}" if path else leaf: v for leaf, v in dict(value).items()}
        self.set_externals(flat)

    def reset_externals(self) -> None:
        """Empty all slots here and below."""
        for slot in self.externals():
            slot.reset()

    @contextlib.contextmanager
    def using_externals(self, values: Values) -> Iterator[None]:
        """Let the slots hold ``values``, and afterwards what they held before, errors included.

        Contexts nest; an inner one needs values only for what it changes.

        Raises:
            ValueError: Unknown names, a slot that is neither given nor set, values of another
                shape or dtype; before anything is set.
        """
        pairs = self._checked(values)
        given = {id(slot) for slot, _ in pairs}
        missing = [n for n, s in self.named_externals() if id(s) not in given and not s.is_set]
        if missing:
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            raise ValueError(
                f"{type(self).__name__} has no value for {len(missing)} of its external "
                f"parameters: {', '.join(missing[:20])}{more}."
            )
        before = [(slot, slot._value) for slot, _ in pairs]
        try:
            for slot, value in pairs:
                slot.data = value
            yield
        finally:
            for slot, old in before:
                slot._value = old

    def _slots(self, names: Sequence[str]) -> dict[str, ExternalParameter]:
        every = dict(self._every_name())
        for name in names:
            if name not in every:
                raise ValueError(
                    f"{type(self).__name__} has no external parameter {name!r}."
                    f"{near_matches(str(name), every)}"
                )
        return {name: every[name] for name in names}

    def _checked(self, values: Values) -> list[tuple[ExternalParameter, Tensor]]:
        """Slots with their values, each slot once."""
        taken: dict[int, tuple[str, Tensor]] = {}
        pairs = []
        for name, slot in self._slots(list(values)).items():
            slot.check(values[name], name)
            first = taken.setdefault(id(slot), (name, values[name]))
            if first[1] is not values[name]:
                raise ValueError(
                    f"{type(self).__name__}: {first[0]!r} and {name!r} are one external parameter "
                    "and got two values."
                )
            if first[0] == name:
                pairs.append((slot, values[name]))
        return pairs

    def convert_external(self, name: str) -> Tensor:
        """Turn one own parameter into a slot, in place, and return its value."""
        return self.convert_externals([name])[name]

    def convert_externals(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Turn own parameters into slots, in place.

        Args:
            names: Names of this module's own parameters.

        Returns:
            The parameters' values by name.

        Raises:
            ValueError: No such parameter.
        """
        for name in names:
            if self._parameters.get(name) is None:
                known = [n for n, p in self._parameters.items() if p is not None]
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r} of its own."
                    f"{near_matches(str(name), known)}"
                )
        values = {}
        for name in names:
            parameter = self._parameters.pop(name)
            assert parameter is not None
            values[name] = parameter.detach()
            self.register_external(name, ExternalParameter(parameter.shape, dtype=parameter.dtype))
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch leaves _apply untyped.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for slot in self._external_parameters.values():
            slot.convert(fn)
        return self

    def extra_repr(self) -> str:
        """Show what the class shows; unset slots stand there by their shape."""
        unset = [slot for slot in self._external_parameters.values() if not slot.is_set]
        for slot in unset:
            slot._value = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        try:
            shown = super().extra_repr()
        finally:
            for slot in unset:
                slot.reset()
        external = f"external=[{', '.join(self._external_parameters)}]"
        if not self._external_parameters:
            return shown
        return f"{shown}, {external}" if shown else external
