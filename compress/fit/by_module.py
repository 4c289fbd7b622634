"""Refitting layers in execution order where the network has no graph: by watching its layers.

A forward that decides by what its images hold cannot be walked node by node. Its layers can still
be watched: hooks on the dense network record what each layer gives, hooks on the compressed network
what it is given for the same images, and the layer is fitted anew to both exactly as along the
graph (`compress.fit.regression`). Since nothing can be stopped half-way and gone on with later,
images run through the compressed network once more for each layer, up to that layer only; a bound
on those runs keeps the work within what a calibration can be asked to wait for. What a shortcut
carries past a layer is not seen here, so that targets are the layers' own dense outputs.

A layer is passed over where it runs several times for a batch, or where the two networks do not
call it alike: then there is no telling which output belongs to which input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.fit.factors import Factors
from compress.fit.frontier import Frontier, Pair, spill_folder
from compress.fit.regression import Layer, Refit, Rows, Sampling, most_rows, too_large
from compress.fit.walk import RefitImages, RefitSettings
from compress.layers import registered_kind
from compress.linalg.geometry import output_rows, patch_rows
from compress.network.chains import build_chain, rewrite
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.modules import replace_module
from compress.running.structure import count, mapped

# Runs of all images through the compressed network, at most: of more layers than that, neighbours
# are fitted to what one and the same run feeds them.
MOST_RUNS = 64

# By layer and batch: the shapes that it gave, as images; several where it ran several times.
Calls = dict[str, dict[int, list[torch.Size]]]
# Called with the batch's number, the layer's name, its input and its output, both as images.
See = Callable[[int, str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Watched:
    """A dense network whose layers can be watched.

    Attributes:
        model: The network, norms folded as far as that went.
        sites: Its layers by name, in order of execution.
    """

    model: nn.Module
    sites: Mapping[str, LayerSite]


def refit_by_module(
    watched: Watched,
    factors: Mapping[str, Factors],
    images: RefitImages,
    settings: RefitSettings = RefitSettings(),
    track: Track = silent,
) -> tuple[dict[str, Factors], dict[str, Refit]]:
    """Refit the replaced layers of a model in execution order, without its graph.

    Args:
        watched: The dense network.
        factors: The replaced layers, by name.
        images: What to fit on, and what decides whether a refit stays.
        settings: Iterations, cache and seed.
        track: Progress.

    Returns:
        The factors, new where they got better on the validation images, and what each layer's
        error became; layers that were passed over have none.
    """
    current = dict(factors)
    outcome: dict[str, Refit] = {}
    with torch.no_grad(), spill_folder() as folder:
        frontier = Frontier(settings.cache_bytes // 2, folder)
        walk = ModuleWalk(watched, factors, frontier, settings.seed)
        walk.start(images)
        names = walk.comparable()
        together = max(1, -(-len(names) // MOST_RUNS))
        groups = [
            (stretch, group)
            for stretch in walk.stretches(names, settings.cache_bytes // 2)
            for group in _groups(stretch, together)
        ]
        for stretch, group in track(groups, "refit", len(groups)):
            for name, rows in walk.rows(stretch, group).items():
                site, module = watched.sites[name], walk.modules[name]
                layer = Layer(site, module, factors[name])
                found, outcome[name] = layer.solve(rows, settings.iterations)
                if found is not factors[name]:
                    current[name] = found
                    walk.install(name, found)
    return current, outcome


@dataclass(frozen=True)
class _Target:
    """What the dense layer gave for a batch, where it is looked at.

    Attributes:
        rows: ``[groups, rows, out_features]``.
        positions: As `Sampling.positions`.
        shape: ``[images, channels, height, width]`` of the whole output.
    """

    rows: Tensor
    positions: Tensor | None
    shape: torch.Size


class _Reached(BaseException):
    """Ends a forward whose rest is of no interest; no ``except Exception`` of a user stops it."""


class ModuleWalk:
    """Both networks, watched layer by layer.

    Args:
        watched: The dense network.
        factors: The replaced layers, by name.
        frontier: Where the images are kept.
        seed: Of the positions that are looked at.

    Attributes:
        compressed: The network with the chains as they stand.
        modules: The dense network's modules by name.
        held_out: Of each batch, whether it only decides.
        calls: Of the layers that are compared, the shape that each gives by batch.
    """

    def __init__(
        self, watched: Watched, factors: Mapping[str, Factors], frontier: Frontier, seed: int
    ) -> None:
        self.watched, self.frontier, self.seed = watched, frontier, seed
        self.modules = dict(watched.model.named_modules(remove_duplicate=False))
        chains = {name: found.chain for name, found in factors.items()}
        self.compressed = rewrite(watched.model, watched.sites, chains)
        self.replaced = frozenset(factors)
        self.device = next(watched.model.parameters()).device
        self.state = torch.get_rng_state()
        self.held_out: list[bool] = []
        self.images = 0
        self.calls: Calls = {}
        self._targets: dict[str, dict[int, _Target]] = {}
        self._ended = False

    def install(self, name: str, found: Factors) -> None:
        """Put factors in a layer's place from here on."""
        site = self.watched.sites[name]
        chain = build_chain(site.geometry, found.chain, self.modules[name])
        for alias in site.aliases:
            replace_module(self.compressed, alias, chain)

    def start(self, images: RefitImages) -> None:
        """Keep every batch, since each is run many times."""
        for batches, held_out in ((images.fit, False), (images.validation, True)):
            for inputs, _ in batches:
                inputs = mapped(inputs, lambda tensor: tensor.to(self.device))
                self.frontier.put(len(self.held_out), {"images": Pair(inputs, inputs)})
                self.held_out.append(held_out)
                self.images += count(inputs)

    def comparable(self) -> list[str]:
        """The replaced layers that both networks call once and alike, in order of execution.

        A batch that does not reach a layer in either network is of no matter, as long as there are
        others that do, among those to fit to and among those that decide.
        """
        names = [site.name for site in self.watched.sites.values() if self._suits(site)]
        dense, compressed = (self._called(m, names) for m in (self.watched.model, self.compressed))
        found = [name for name in names if self._alike(dense[name], compressed[name])]
        self.calls = {name: dense[name] for name in found}
        return found

    def _suits(self, site: LayerSite) -> bool:
        # A network that is one layer feeds it nothing new.
        once = site.name in self.replaced and len(site.calls) == 1
        return once and site.name != "" and not too_large(site.geometry)

    def _alike(
        self, dense: Mapping[int, list[torch.Size]], compressed: Mapping[int, list[torch.Size]]
    ) -> bool:
        once = all(len(shapes) == 1 for shapes in dense.values())
        return once and dense == compressed and {self.held_out[b] for b in dense} == {True, False}

    def _called(self, model: nn.Module, names: Sequence[str]) -> Calls:
        calls: Calls = {name: {} for name in names}

        def see(batch: int, name: str, given: Tensor, output: Tensor) -> None:
            del given
            calls[name].setdefault(batch, []).append(output.shape)

        self._run(model, names, see, whole=True)
        return calls

    def stretches(self, names: Sequence[str], cap: int) -> Iterator[list[str]]:
        """Divide layers into runs whose dense outputs take about ``cap`` bytes of memory."""
        stretch: list[str] = []
        used = 0
        for name in names:
            site = self.watched.sites[name]
            rows = min(site.positions * self.images, max(most_rows(site.geometry), self.images))
            size = 4 * rows * site.geometry.out_channels
            if stretch and used + size > cap:
                yield stretch
                stretch, used = [], 0
            stretch.append(name)
            used += size
        if stretch:
            yield stretch

    def rows(self, stretch: Sequence[str], group: Sequence[str]) -> dict[str, Rows]:
        """What some layers see in the compressed network, and what the dense ones gave.

        Args:
            stretch: The layers whose dense outputs are taken at once and kept.
            group: Those of them to compare now.

        Returns:
            By layer; those that the compressed network does not call any more as it did before
            earlier layers were refitted are left out.
        """
        if not self._targets.keys() >= set(group):
            self._targets = self._taken(stretch)
        found = {name: Rows.of(self.watched.sites[name], self.device) for name in group}
        seen: dict[str, set[int]] = {name: set() for name in group}
        other: set[str] = set()

        def see(batch: int, name: str, given: Tensor, output: Tensor) -> None:
            target = self._targets[name].get(batch)
            if target is None or batch in seen[name] or output.shape != target.shape:
                other.add(name)
                return
            seen[name].add(batch)
            patches = patch_rows(given, self.watched.sites[name].geometry, target.positions)
            found[name].add(patches, target.rows, held_out=self.held_out[batch])

        self._run(self.compressed, group, see)
        alike = [n for n in group if n not in other and seen[n] == self.calls[n].keys()]
        return {name: found[name] for name in alike}

    def _taken(self, stretch: Sequence[str]) -> dict[str, dict[int, _Target]]:
        """What the dense layers of a stretch give, by layer and batch."""
        sampling = Sampling(len(self.held_out), self.seed, self.device)
        taken: dict[str, dict[int, _Target]] = {name: {} for name in stretch}

        def see(batch: int, name: str, given: Tensor, output: Tensor) -> None:
            del given
            geometry = self.watched.sites[name].geometry
            positions = sampling.positions(batch, output.shape, most_rows(geometry))
            rows = output_rows(output, geometry, positions)
            # A copy: what follows may change the output in place.
            taken[name][batch] = _Target(rows.clone(), positions, output.shape)

        self._run(self.watched.model, stretch, see)
        return taken

    def _run(
        self, model: nn.Module, names: Sequence[str], see: See, *, whole: bool = False
    ) -> None:
        """Run all batches through a network, each to the last layer of interest or as a whole."""
        modules = dict(model.named_modules(remove_duplicate=False))
        kinds = {name: registered_kind(self.modules[name]) for name in names}
        waiting: set[str] = set()
        now = 0

        def watch(name: str) -> ForwardHook:
            def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                see(now, name, kinds[name].images(given[0]), kinds[name].images(output))
                waiting.discard(name)
                if not waiting and not whole:
                    self._ended = True
                    raise _Reached

            return hook

        with evaluation_mode(model), forward_hooks({modules[n]: watch(n) for n in names}):
            for now in range(len(self.held_out)):
                waiting |= {n for n in names if whole or now in self.calls[n]}
                if waiting:
                    torch.set_rng_state(self.state)  # both networks draw the same
                    self._forward(model, now)
                waiting.clear()

    def _forward(self, model: nn.Module, batch: int) -> None:
        self._ended = False
        try:
            run_model(model, self.frontier.look(batch)["images"].dense)
        except ModelError:
            if not self._ended:
                raise


def _groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]
