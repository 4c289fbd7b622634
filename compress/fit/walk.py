"""All batches at one node of the graph of both networks: what the refits walk with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from compress.fit.factors import Factors
from compress.fit.frontier import Frontier, Pair
from compress.fit.lockstep import Lockstep
from compress.network.chains import build_chain
from compress.network.narrowing import Cut
from compress.network.sites import LayerSite
from compress.running.outputs import LossFunction, Reading
from compress.running.structure import count, mapped

# Batches of inputs and targets; only a loss of the user's own looks at the targets.
Labelled = Iterable[tuple[Any, Any]]


@dataclass(frozen=True)
class Traced:
    """A dense network that can be walked.

    Attributes:
        model: The network, norms folded.
        graph: Its graph.
        sites: Its layers by name.
        result: What it returns for some image, whose structure all results have.
        cut: The network with channels taken out of it, whose layers the sites are.
    """

    model: nn.Module
    graph: fx.Graph
    sites: Mapping[str, LayerSite]
    result: Any
    cut: Cut | None = None

    @property
    def narrowed(self) -> Cut:
        """The network that is refitted: `cut`, or itself."""
        return self.cut or Cut(self.model, self.sites)


@dataclass(frozen=True)
class RefitImages:
    """What a refit is fitted to, and what decides whether it stays.

    Attributes:
        fit: The batches to fit to.
        validation: The batches that decide.
        further: Batches that the joint refit learns from too, as many as memory is set aside for.
        whole: Whether batches must stay as they are, since their targets cannot be parted.
    """

    fit: Labelled
    validation: Labelled
    further: Labelled = ()
    whole: bool = False


@dataclass(frozen=True)
class RefitSettings:
    """How a refit is done.

    Attributes:
        seed: Of sampled positions, the order of batches, and random signs.
        weigh: Whether errors are weighted by the loss; else all outputs count alike.
        loss: The user's own, as `compress.calibrate.fisher.Objective` takes it.
        iterations: Rounds of alternation for the factors before the last.
        cache_bytes: Memory for activations; what exceeds it goes to disk.
        reading: What the network's outputs stand for; by default what the first ones look like.
        in_place: Whether the network's forward changes values in place that gradients need.
    """

    seed: int = 0
    weigh: bool = True
    loss: LossFunction | None = None
    iterations: int = 6
    cache_bytes: int = 1 << 30
    reading: Reading | None = None
    in_place: bool = False


class Walk:
    """The walk of all batches through both networks.

    Args:
        traced: The dense network.
        frontier: Where the batches' values are kept.

    Attributes:
        lockstep: The interpreter of both networks.
        held_out: Of each batch, whether it only decides.
        labels: Of each batch: what a loss of the user's own gets.
        sizes: How many images each batch holds.
        position: Index of the node that the batches stand at.
    """

    def __init__(self, traced: Traced, frontier: Frontier) -> None:
        self.traced, self.frontier = traced, frontier
        self.lockstep = Lockstep(traced.model, traced.graph)
        self.cut = traced.narrowed
        for width in self.cut.widths:
            narrow = self.cut.model.get_submodule(width.name)
            self.lockstep.chains.update(dict.fromkeys(width.aliases, narrow))
        self.device = next(traced.model.parameters()).device
        self.held_out: list[bool] = []
        self.labels: list[Any] = []
        self.sizes: list[int] = []
        self.position = 0

    def install(self, site: LayerSite, found: Factors) -> nn.Module:
        """Put factors in a layer's place from here on; return the chain built of them."""
        built = build_chain(site.geometry, found.chain, self.layer(site))
        return self.place(site, built)

    def layer(self, site: LayerSite) -> nn.Module:
        """A layer as it was before it was refitted, its channels taken out."""
        return self.cut.model.get_submodule(site.name)

    def place(self, site: LayerSite, module: nn.Module) -> nn.Module:
        """Put a module in a layer's place in the compressed network."""
        for alias in site.aliases:
            self.lockstep.chains[alias] = module
        return module

    def start(self, images: RefitImages) -> None:
        """Put every batch at the first node."""
        for batches, held_out in ((images.fit, False), (images.validation, True)):
            for inputs, labels in batches:
                self.add(inputs, labels, held_out=held_out)

    def add(self, inputs: Any, labels: Any, *, held_out: bool) -> None:
        """Put one more batch at the first node."""
        inputs = mapped(inputs, lambda tensor: tensor.to(self.device))
        first = self.lockstep.nodes[0].name
        self.frontier.put(len(self.held_out), {first: Pair(inputs, inputs)})
        self.held_out.append(held_out)
        self.labels.append(labels)
        self.sizes.append(count(inputs))

    def batches(self, *, held_out: bool) -> list[int]:
        """Numbers of the batches that only decide, or of those that are fitted to."""
        return [batch for batch, only in enumerate(self.held_out) if only == held_out]
