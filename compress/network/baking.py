"""Making plain what computes its weight or pads in its own way, before anything else is done.

Weight and spectral norms and other parametrisations compute a weight anew in every forward pass,
from numbers that no longer change: the weight itself takes their place. Subclasses of layers that
are proved to compute what a plain layer does (`compress.network.proving`) are replaced by it. What
changes a model's output none the less is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compress.errors import ModelError
from compress.network.proving import Proved, Sides, Unproved, base_of, plain_layer, prove
from compress.running.forward import (
    ForwardHook,
    evaluation_mode,
    forward_hooks,
    run_model,
    same_outputs,
)
from compress.running.modules import is_hooked, module_names, replace_module, swapped
from compress.running.structure import floating, like_weights, tensors

# Two ways to round may be as far from each other as several times that either is from the truth.
_ROUNDINGS = 5
# Beyond this share of the largest output, a difference is one whatever it comes from.
_MOST_ROUNDING = 0.02


@dataclass(frozen=True)
class PlainLayer:
    """A subclass of a layer that a plain one replaced.

    Attributes:
        name: Its first qualified name.
        padding: Zeros before and after each axis; empty for the layer's own padding.
    """

    name: str
    padding: Sides = ()


@dataclass(frozen=True)
class Baked:
    """What was made plain in a model.

    Attributes:
        weights: Names of the modules whose parametrised weights became plain ones.
        layers: The subclasses that plain layers replaced.
        fixed: Names of those whose padding depends on the size of their input, and is now that of
            the example.
        reasons: Why other subclasses are kept, by module.
    """

    weights: tuple[str, ...] = ()
    layers: tuple[PlainLayer, ...] = ()
    fixed: tuple[str, ...] = ()
    reasons: Mapping[nn.Module, str] = field(default_factory=dict)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model whose weights are computed by hooks.

    The hooks of old-style norms leave a weight with a gradient graph on their module, which cannot
    be copied and is made anew by the next forward pass.
    """
    with _detached(model):
        return copy.deepcopy(model)


@contextmanager
def _detached(model: nn.Module) -> Iterator[None]:
    found = [
        (vars(module), hook.name)
        for module in model.modules()
        for hook in _norms(module)
        if isinstance(vars(module).get(hook.name), Tensor)
    ]
    before = [attributes[name] for attributes, name in found]
    try:
        for attributes, name in found:
            attributes[name] = attributes[name].detach()
        yield
    finally:
        for (attributes, name), value in zip(found, before, strict=True):
            attributes[name] = value


def _norms(module: nn.Module) -> list[Any]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)]


def bake_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Give the named modules the weights that their parametrisations compute, in place.

    Args:
        model: The network in eval mode; changed.
        names: Modules, by qualified name.

    Raises:
        AttributeError: There is no such module.
        ValueError: A module has no parametrised weight.
    """
    for name in names:
        module = model.get_submodule(name)
        if not is_parametrized(module) and not _norms(module):
            raise ValueError(f"module {name!r} has no parametrised weight")
        if is_parametrized(module):
            _without_parametrisations(module)
        for hook in _norms(module):
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(module, hook.name)


def _steady(module: nn.Module) -> bool:
    """Whether a module has parametrised tensors, each with one value alone."""
    if not is_parametrized(module):
        return False
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
    return all(torch.equal(getattr(module, name), getattr(module, name)) for name in names)


def _without_parametrisations(module: nn.Module) -> None:
    # torch's own removal changes the class that torch made for the module, which its copies share.
    lists = module.get_submodule("parametrizations")
    values: dict[str, nn.Parameter | Tensor] = {}
    for name, originals in lists.named_children():
        assert isinstance(originals, ParametrizationList)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value = getattr(module, name).detach().clone()
        given = list(originals.parameters(recurse=False))
        trained = any(p.requires_grad for p in given)
        values[name] = nn.Parameter(value, requires_grad=trained) if given else value
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        if isinstance(value, nn.Parameter):
            setattr(module, name, value)  # by which recurrent layers take note of it
        else:
            module.register_buffer(name, value)


def put_plain(model: nn.Module, layers: Iterable[PlainLayer]) -> nn.Module:
    """Put plain layers, without values, in place of the named subclasses wherever they stand.

    Returns:
        The model, or the plain layer where the root itself is named.

    Raises:
        AttributeError: There is no such module.
        ValueError: A module is no subclass of a layer, or cannot be padded as told.
    """
    for layer in layers:
        module = model.get_submodule(layer.name)
        plain = plain_layer(module, layer.padding)
        if module is model:
            model = plain
            continue
        for name in module_names(model)[module]:
            replace_module(model, name, plain)
    return model


@dataclass(frozen=True)
class Baker:
    """What a model's output is, so that whatever would change it can be left.

    Attributes:
        example: One input with the batch axis.
        expected: What the model gives for it.
        original: The model.
    """

    example: Any
    expected: Any
    original: nn.Module

    def weights(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        """Return a model with plain weights where that changes nothing, and where that is.

        Args:
            model: The network in eval mode; left as it was.
        """
        with torch.no_grad(), evaluation_mode(model):
            names = [n for n, m in model.named_modules() if _norms(m) or _steady(m)]

        def gives(some: Sequence[str]) -> bool:
            trial = copied(model)
            bake_weights(trial, some)
            return self.gives(trial)

        kept = _all_that_pass(names, gives)
        if kept:
            model = copied(model)
            bake_weights(model, kept)
        return model, tuple(kept)

    def layers(self, model: nn.Module) -> tuple[nn.Module, Baked]:
        """Put plain layers in place of the subclasses that are proved to compute the same.

        Args:
            model: The network in eval mode; changed.

        Returns:
            The model, which is another where the root itself is replaced, and what was done.
        """
        names, shapes = module_names(model), self._shapes(model)
        proved: dict[str, Proved] = {}
        reasons: dict[nn.Module, str] = {}
        for module, seen in shapes.items():
            try:
                proved[names[module][0]] = prove(module, seen)
            except Unproved as reason:
                reasons[module] = _kept(module, str(reason))
        modules = {name: model.get_submodule(name) for name in proved}

        def gives(some: Sequence[str]) -> bool:
            return self._gives_with(model, {n: (modules[n], proved[n].module) for n in some})

        kept = _all_that_pass(list(proved), gives)
        for name in proved.keys() - set(kept):
            reasons[modules[name]] = _kept(modules[name], "the model does more than call it")
        for name in kept:
            model = _put(model, names[modules[name]], proved[name].module)
        return model, Baked(
            layers=tuple(PlainLayer(name, proved[name].padding) for name in kept),
            fixed=tuple(name for name in kept if proved[name].fixed),
            reasons=reasons,
        )

    def gives(self, model: nn.Module) -> bool:
        """Whether a model gives the same for the example."""
        try:
            with torch.no_grad(), evaluation_mode(model):
                found = run_model(model, self.example)
        except KeyboardInterrupt:
            raise
        except BaseException:  # the user's forward may raise anything about a plain layer
            return False
        # Only what differs more is worth a forward pass in double precision.
        return same_outputs(self.expected, found) or same_outputs(
            self.expected, found, self._rounding
        )

    @cached_property
    def _rounding(self) -> dict[str, float]:
        """By how much outputs may differ because the model makes much of rounding errors.

        A deep network may move its outputs by more than a thousandth when its weights are rounded
        in another way. How far float32 is from double precision says how much that is.
        """
        double = copied(self.original).double()
        given = like_weights(self.example, next(double.parameters()))
        try:
            with torch.no_grad(), evaluation_mode(double):
                exact = tensors(run_model(double, given))
        except ModelError:
            return {}
        return {
            path: min(
                _ROUNDINGS * float((found - exact[path]).abs().max()),
                _MOST_ROUNDING * float(found.abs().max()),
            )
            for path, found in floating(self.expected).items()
            if found.numel() and path in exact and exact[path].shape == found.shape
        }

    def _gives_with(
        self, model: nn.Module, replacements: Mapping[str, tuple[nn.Module, nn.Module]]
    ) -> bool:
        if "" in replacements:
            return self.gives(replacements[""][1])
        names = module_names(model)
        plain = {alias: new for old, new in replacements.values() for alias in names[old]}
        with swapped(model, plain):
            return self.gives(model)

    def _shapes(self, model: nn.Module) -> dict[nn.Module, list[tuple[int, ...]]]:
        """The shapes of the inputs that each subclass is called with, in one forward pass."""
        found: dict[nn.Module, list[tuple[int, ...]]] = {}
        odd: set[nn.Module] = set()

        def record(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            del output
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
                odd.add(module)
                return
            shapes = found.setdefault(module, [])
            if (shape := tuple(inputs[0].shape)) not in shapes:
                shapes.append(shape)

        subclasses = [
            m for m in model.modules()
            if base_of(m) and not (is_hooked(m) or is_parametrized(m))
        ]  # fmt: skip
        if not subclasses:
            return {}
        hooks: dict[nn.Module, ForwardHook] = dict.fromkeys(subclasses, record)
        with torch.no_grad(), evaluation_mode(model), forward_hooks(hooks):
            run_model(model, self.example)
        return {module: shapes for module, shapes in found.items() if module not in odd}


def _put(model: nn.Module, names: Sequence[str], plain: nn.Module) -> nn.Module:
    if names[0] == "":
        return plain
    for name in names:
        replace_module(model, name, plain)
    return model


def _kept(module: nn.Module, reason: str) -> str:
    base = base_of(module)
    assert base is not None
    return f"a subclass of {base.name} ({type(module).__name__}) that is kept: {reason}"


def _all_that_pass(names: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> list[str]:
    """Those of some names that pass together; halves are tried until one is left."""
    if not names or passes(names):
        return list(names)
    if len(names) == 1:
        return []
    middle = len(names) // 2
    return _all_that_pass(names[:middle], passes) + _all_that_pass(names[middle:], passes)
