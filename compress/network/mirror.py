"""A network whose layers can be switched, while it runs, between real ones and replacements."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from compress.errors import UsageError, near_matches
from compress.network.baseline import Network
from compress.network.narrowing import Cut, within
from compress.running.modules import module_names, replace_module


class Mirror(nn.Module):
    """A network with two versions of some of its layers, of which one at a time is in use.

    At first all real layers are in use. Switching takes effect at the next forward pass, and hooks
    on either version stay. A layer that stands in several places is switched in all of them. The
    keys of the state dict follow what is in use, so load one while the same layers are.

    Args:
        model: The network; it is left as it was, and its copy is the attribute ``model``.
        replacements: What can stand in the place of each layer, by the layer's dotted name, in the
            order of the forward. The mirror holds copies.

    Attributes:
        model: The network, as it runs now.
        names: The layers that can be switched, in the order given.

    Raises:
        TypeError: ``model`` or a replacement is not a module.
        UsageError: A name that the model does not have, or two names of one layer.

    Example:
        >>> mirror = compress.compress_model(model, images, macs=0.5).mirror()
        >>> mirror.replace("conv1", "layer1.*")
        >>> mirror(images)
        >>> mirror.restore()
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in (("the model", model), *replacements.items()):
            if not isinstance(module, nn.Module):
                raise TypeError(f"Mirror takes modules; {name} is a {type(module).__name__}.")
        self.model: nn.Module = copy.deepcopy(model)
        self.names: tuple[str, ...] = tuple(replacements)
        self._places = _places(self.model, self.names)
        # Both versions are submodules all the time, so that they follow the mirror's mode, device
        # and dtype whichever is in use.
        self._real = nn.ModuleList(self.model.get_submodule(name) for name in self.names)
        self._replacements = nn.ModuleList(copy.deepcopy(list(replacements.values())))
        self._on: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the layers that are in use now."""
        return self.model(*args, **kwargs)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers whose replacements are in use."""
        return tuple(name for name in self.names if name in self._on)

    def replace(self, *patterns: str) -> None:
        """Use the replacements of some layers from now on; the others stay as they are.

        Args:
            *patterns: Names or globs of names, such as ``"layer1.*"``; without any, all layers.

        Raises:
            TypeError: Something that is not a name.
            UsageError: A pattern that matches none of `names`.
        """
        self._put(self._on | set(self._matching(patterns)))

    def restore(self, *patterns: str) -> None:
        """Use the real layers; arguments and errors as for `replace`."""
        self._put(self._on - set(self._matching(patterns)))

    def replace_first(self, count: int) -> None:
        """Use the replacements of only the first ``count`` layers.

        Raises:
            UsageError: A count that is negative or larger than the number of layers.
        """
        if not 0 <= count <= len(self.names):
            raise UsageError(f"The mirror has {len(self.names)} layers; it cannot replace {count}.")
        self._put(set(self.names[:count]))

    @contextmanager
    def replacing(self, *patterns: str) -> Iterator[Mirror]:
        """Use, in a block, the replacements of these layers and of no others.

        Args:
            *patterns: As for `replace`.

        Yields:
            The mirror, which afterwards uses what it did before.

        Raises:
            UsageError: As `replace`.
        """
        before = set(self._on)
        self._put(set(self._matching(patterns)))
        try:
            yield self
        finally:
            self._put(before)

    def _matching(self, patterns: Iterable[str]) -> list[str]:
        if not patterns:
            return list(self.names)
        found = []
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"A mirror switches layers by name, and {pattern!r} is none; replace_first "
                    "takes a number of layers."
                )
            matching = [n for n in self.names if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not matching:
                raise UsageError(
                    f"The mirror has no layer {pattern!r} to switch."
                    f"{near_matches(str(pattern), self.names)}"
                )
            found += matching
        return found

    def _put(self, on: set[str]) -> None:
        for index, name in enumerate(self.names):
            if (name in on) == (name in self._on):
                continue
            module = (self._replacements if name in on else self._real)[index]
            for place in self._places[name]:
                if place:
                    replace_module(self.model, place, module)
                else:
                    self.model = module
        self._on = on

    def extra_repr(self) -> str:
        """Show which layers are replaced."""
        return f"replaced={list(self.replaced)}"


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """All names of each layer."""
    every = {name: listed for listed in module_names(model).values() for name in listed}
    places: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in every:
            raise UsageError(
                f"{type(model).__name__} has no module {name!r}.{near_matches(name, every)}"
            )
        for other in places:
            if name in places[other]:
                raise UsageError(f"{other!r} and {name!r} are one layer; name it once.")
            if name.startswith(f"{other}.") or other.startswith(f"{name}.") or "" in (name, other):
                raise UsageError(
                    f"{other!r} and {name!r} lie inside each other; a mirror switches layers that "
                    "do not."
                )
        places[name] = every[name]
    return places


def replacements_of(
    network: Network, compressed: nn.Module, names: Iterable[str], cut: Cut | None = None
) -> dict[str, nn.Module]:
    """Return what each layer of a dense network became, in the order of the forward.

    Args:
        network: The dense baseline.
        compressed: The rewritten model.
        names: Which layers to return.
        cut: Which channels the rewritten model still has. A layer that lost channels comes with
            the dense one, which gives the outputs that it lacks, so that either can stand in the
            dense network; with all layers replaced nothing reads these.
    """
    wanted, kept = set(names), cut or Cut(network.model, {})
    found: dict[str, nn.Module] = {}
    for site in network.sites:
        if site.name in wanted:
            real = network.model.get_submodule(site.name)
            found[site.name] = within(kept, site.name, real, compressed.get_submodule(site.name))
    return found
