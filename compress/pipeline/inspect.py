"""What `compress inspect` finds out about a network before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.problems import layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.removal import unread, way_of
from compress.calibrate.statistics import Calibration, Source, without_unseen
from compress.choose import break_even
from compress.config import RunConfig
from compress.data import Loader
from compress.errors import ConfigError
from compress.inputs.load import arity_of, batch_size_for, load_network, load_trained
from compress.linalg.schemes import OUTPUT
from compress.measure.cost import model_cost
from compress.network.baseline import Network, prepare
from compress.network.channels import ChannelGroup, Slot
from compress.network.recurrent import RecurrentLayer
from compress.network.sites import LayerSite
from compress.pipeline.places import check_files
from compress.plan import NARROW, NARROWER
from compress.progress import Track, silent
from compress.result import Cost
from compress.rules.spectrum import rank_by_energy, rank_by_threshold
from compress.running.structure import placed, shapes

THRESHOLDS = (1e-3, 1e-2)
ENERGIES = (0.99, 0.9999)


@dataclass(frozen=True)
class InspectedLayer:
    """One layer, as it is.

    Attributes:
        name: Its first qualified name; ``aliases`` are all of them.
        kind: Name of its type.
        shape: Text such as ``"64→64 3x3 s2"``.
        calls: How often it runs in one forward pass.
        macs: Multiply-accumulates per image, over all calls.
        params: Parameters, bias included.
        full_rank: Largest rank of the weight matrix, per group; 0 for recurrent layers, which have
            several.
        break_even: Largest rank at which the output scheme saves MACs and parameters; 0 where
            none does.
        schemes: What it can be rewritten as.
        reason: Why it is kept whatever the rule; None where it may be rewritten.
        eigenvalues: Spectrum of its outputs' covariance, group by group, descending; empty
            without data.
        ranks: What each rule would choose, such as ``{"threshold 0.001": 12}``; empty without
            data.
        samples_per_dimension: Rows the spectrum was taken from, over their length.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: str
    calls: int
    macs: int
    params: int
    full_rank: int
    break_even: int
    schemes: tuple[str, ...]
    reason: str | None
    eigenvalues: tuple[float, ...] = ()
    ranks: dict[str, int] | None = None
    samples_per_dimension: float | None = None


@dataclass(frozen=True)
class InspectedGroup:
    """Channels that can only be taken out together.

    Attributes:
        name: That of the first layer that makes them.
        size: How many.
        made_by: Names of the layers that have them among their outputs.
        changed_by: Modules with parameters of each: depthwise convolutions and norms.
        read_by: Layers that have them among their inputs.
        way: ``"slice"`` where mixtures of them can stay, else ``"narrow"``.
        reason: Why a budget leaves them all the same; None where it may take some out.
    """

    name: str
    size: int
    made_by: tuple[str, ...]
    changed_by: tuple[str, ...]
    read_by: tuple[str, ...]
    way: str
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """A network, layer by layer.

    Attributes:
        model: The model spec.
        sha256: Hash of the checkpoint.
        dtype: The floating type of its tensors.
        input_shapes: Shapes of the inputs of one image, without the batch axis.
        original: Costs of the network as it came; ``folded`` with its norms folded.
        norms: Names of the norms that were folded.
        unpacked: Names of the attention modules that were rebuilt of linear layers.
        baked: Names of the modules whose parametrised weights became plain ones.
        plain: Names of the subclasses of layers that plain layers replaced.
        layers: In order of execution; recurrent ones, which are kept, come last.
        groups: Channels that can be taken out together, in order of execution.
        left: Why the outputs of other layers are left, by layer.
        refit_path: What a refit goes along: the ``"graph"``, or without one the ``"modules"``.
        images: How many images the spectra are from; 0 without data.
        warnings: What the user should know.
    """

    model: str
    sha256: str
    dtype: str
    input_shapes: tuple[tuple[int, ...], ...]
    original: Cost
    folded: Cost
    norms: tuple[str, ...]
    unpacked: tuple[str, ...]
    baked: tuple[str, ...]
    plain: tuple[str, ...]
    layers: tuple[InspectedLayer, ...]
    groups: tuple[InspectedGroup, ...]
    left: dict[str, str]
    refit_path: str
    images: int
    warnings: tuple[str, ...]


def inspect_checkpoint(
    config: RunConfig, input_shapes: Sequence[tuple[int, ...]] = (), track: Track = silent
) -> Inspection:
    """Inspect the network of a checkpoint; with ``config.data`` also its spectra.

    Args:
        config: Checkpoint, model, and if wanted data.
        input_shapes: Shape of each input ``(C, H, W)``, where there is no data and the model does
            not say it.
        track: Progress.

    Raises:
        ConfigError: Checkpoint, model or the input's shape is not known.
        CompressError: Something named cannot be used.
    """
    if config.data:
        check_files(config)
        return _inspect_with_data(config, track)
    for name in ("checkpoint", "model"):
        if not getattr(config, name):
            raise ConfigError(f"No {name} given; pass it, or set it with --config.")
    built, checkpoint = load_trained(config)
    hint = _sized(built.input_shape, config)
    wanted = input_shapes or ((hint,) if hint else ())
    if not wanted:
        raise ConfigError(
            f"The shape of an input of {config.model} is not known: pass --input-shape C,H,W or "
            "--data, or give the module an attribute input_shape."
        )
    needed = arity_of(built.module).needed
    if len(wanted) < needed:
        raise ConfigError(
            f"The forward of {config.model} takes {needed} inputs, and {len(wanted)} shape is "
            "known: pass --input-shape once for each, or --data."
        )
    generator = torch.Generator().manual_seed(config.seed)
    examples = [torch.randn(1, *shape, generator=generator) for shape in wanted]
    example = placed(examples[0] if len(examples) == 1 else tuple(examples), config.device)
    network = prepare(built.module.to(config.device), example)
    weights = _Weights(config.model, checkpoint.sha256, checkpoint.dtype)
    return _inspection(weights, network, tuple(map(_layer, network.sites)))


def _inspect_with_data(config: RunConfig, track: Track) -> Inspection:
    inputs = load_network(config)
    network = prepare(inputs.model.to(config.device), placed(inputs.example, config.device))
    loader = Loader(batch_size_for(config, inputs.example), config.workers)
    loaded, recipe = loader.batches(inputs.split.fit), _recipe(config)
    tracked = track(loaded, "calibrate", len(loaded))
    source = Source(len(inputs.split.fit))
    calibration = calibrate(network.model, network.sites, tracked, source, recipe)
    weights = _Weights(config.model, inputs.sha256, inputs.dtype)
    found = _inspection(weights, network, _with_spectra(network, calibration))
    return replace(found, images=source.images, warnings=(*inputs.warnings, *found.warnings))


def _recipe(config: RunConfig) -> Recipe:
    return Recipe(weigh=False, samples_per_dimension=config.samples_per_dimension, seed=config.seed)


def _sized(shape: tuple[int, ...] | None, config: RunConfig) -> tuple[int, ...]:
    """The shape of an input, with the height and width that the configuration gives pictures."""
    size = config.crop or (config.resize if isinstance(config.resize, tuple) else None)
    if shape is None or size is None or len(shape) != 3:
        return shape or ()
    return (shape[0], *((size, size) if isinstance(size, int) else size))


@dataclass(frozen=True)
class _Weights:
    """Where a network's weights come from."""

    model: str
    sha256: str
    dtype: torch.dtype


def _inspection(
    weights: _Weights, network: Network, layers: tuple[InspectedLayer, ...]
) -> Inspection:
    size = torch.empty((), dtype=weights.dtype).element_size()
    return Inspection(
        model=weights.model,
        sha256=weights.sha256,
        dtype=str(weights.dtype).removeprefix("torch."),
        input_shapes=tuple(shape[1:] for shape in shapes(network.example).values()),
        original=model_cost(network.original, network.example, size),
        folded=model_cost(network.model, network.example, size),
        norms=tuple(pair.norm for pair in network.folded),
        unpacked=network.unpacked,
        baked=network.baked.weights,
        plain=tuple(layer.name for layer in network.baked.layers),
        layers=layers + tuple(map(_recurrent, network.recurrent)),
        groups=tuple(_group(group, network) for group in network.channels.groups),
        left=dict(network.channels.left),
        refit_path=network.refit_path,
        images=0,
        warnings=network.warnings,
    )


def _layer(site: LayerSite) -> InspectedLayer:
    limit = 0
    if site.skip is None:
        limit = min(
            break_even(site, OUTPUT.name, lambda c: c.macs),
            break_even(site, OUTPUT.name, lambda c: c.params),
        )
    return InspectedLayer(
        name=site.name,
        aliases=site.aliases,
        kind=site.kind,
        shape=site.shape,
        calls=len(site.calls),
        macs=site.macs,
        params=site.params,
        full_rank=site.geometry.full_rank,
        break_even=limit,
        schemes=site.schemes,
        reason=site.skip,
    )


def _group(group: ChannelGroup, network: Network) -> InspectedGroup:
    def names(slots: tuple[Slot, ...]) -> tuple[str, ...]:
        return tuple(slot.name for slot in slots)

    return InspectedGroup(
        name=group.name,
        size=group.size,
        made_by=names(group.producers),
        changed_by=names(group.through),
        read_by=names(group.consumers),
        way=way_of(group, NARROWER) or NARROW,
        reason=unread(group, {site.name: site for site in network.sites}),
    )


def _recurrent(layer: RecurrentLayer) -> InspectedLayer:
    return InspectedLayer(
        name=layer.name,
        aliases=layer.aliases,
        kind=layer.kind,
        shape=layer.shape,
        calls=layer.calls,
        macs=layer.macs,
        params=layer.params,
        full_rank=0,
        break_even=0,
        schemes=(),
        reason=layer.reason,
    )


def _with_spectra(network: Network, calibration: Calibration) -> tuple[InspectedLayer, ...]:
    modules: dict[str, nn.Module] = dict(network.model.named_modules(remove_duplicate=False))
    inspected = []
    for site in without_unseen(network, calibration).sites:
        layer, statistics = _layer(site), calibration.statistics.get(site.name)
        if statistics is None or site.skip is not None:
            inspected.append(layer)
            continue
        spectra = layer_problem(site, modules[site.name], statistics).plain_spectrum
        inspected.append(
            replace(
                layer,
                eigenvalues=tuple(spectra.flatten().tolist()),
                ranks=chosen_ranks(spectra),
                samples_per_dimension=statistics.samples_per_dimension,
            )
        )
    return tuple(inspected)


def chosen_ranks(spectra: Tensor) -> dict[str, int]:
    """Ranks that the threshold and energy rules choose from spectra ``[groups, values]``."""
    listed = [s.tolist() for s in spectra]
    ranks = {f"threshold {t:g}": max(rank_by_threshold(s, t) for s in listed) for t in THRESHOLDS}
    ranks |= {f"energy {e:g}": max(rank_by_energy(s, e) for s in listed) for e in ENERGIES}
    return ranks
