"""What `compress inspect` finds out about a network before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.problems import layer_problem
from compress.calibrate.statistics import without_unseen
from compress.choose import break_even
from compress.choose.spectrum import rank_by_energy, rank_by_threshold
from compress.config import RunConfig
from compress.data import batches
from compress.errors import ConfigError
from compress.inputs.checkpoint.loading import load_into
from compress.inputs.checkpoint.reading import read_checkpoint
from compress.inputs.load import batch_size_for, load_network
from compress.inputs.models import build_model
from compress.linalg.schemes import OUTPUT
from compress.measure.cost import model_cost
from compress.network.baseline import Network, prepare
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.result import Cost

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
        full_rank: Largest rank of the weight matrix, per group.
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
class Inspection:
    """A network, layer by layer.

    Attributes:
        model: The model spec.
        sha256: Hash of the checkpoint.
        dtype: The floating type of its tensors.
        input_shape: Shape of one input, without the batch axis.
        original: Costs of the network as it came; ``folded`` with its norms folded.
        norms: Names of the norms that were folded.
        unpacked: Names of the attention modules that were rebuilt of linear layers.
        layers: In order of execution.
        images: How many images the spectra are from; 0 without data.
        warnings: What the user should know.
    """

    model: str
    sha256: str
    dtype: str
    input_shape: tuple[int, ...]
    original: Cost
    folded: Cost
    norms: tuple[str, ...]
    unpacked: tuple[str, ...]
    layers: tuple[InspectedLayer, ...]
    images: int
    warnings: tuple[str, ...]


def inspect_checkpoint(
    config: RunConfig, input_shape: tuple[int, ...] = (), track: Track = silent
) -> Inspection:
    """Inspect the network of a checkpoint; with ``config.data`` also its spectra.

    Args:
        config: Checkpoint, model, and if wanted data.
        input_shape: Shape of one input ``(C, H, W)``, where there is no data and the model does
            not say it.
        track: Progress.

    Raises:
        ConfigError: Checkpoint, model or the input's shape is not known.
        CompressError: Something named cannot be used.
    """
    if config.data:
        inputs = load_network(config)
        network = prepare(inputs.model.to(config.device), inputs.example.to(config.device))
        loaded = batches(inputs.split.fit, batch_size_for(config, inputs.example), config.workers)
        with_spectra = _with_spectra(network, config, loaded, track)
        return _inspection(
            config, inputs.sha256, inputs.dtype, network, with_spectra, len(loaded.images),
            inputs.warnings,
        )  # fmt: skip
    for name in ("checkpoint", "model"):
        if not getattr(config, name):
            raise ConfigError(f"No {name} given; pass it, or set it with --config.")
    checkpoint = read_checkpoint(config.checkpoint)
    built = build_model(config.model)
    load_into(built.module, checkpoint)
    shape = input_shape or _cropped(built.input_shape, config.crop)
    if not shape:
        raise ConfigError(
            f"The shape of an input of {config.model} is not known: pass --input-shape C,H,W or "
            "--data, or give the module an attribute input_shape."
        )
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(config.seed))
    network = prepare(built.module.to(config.device), example.to(config.device))
    return _inspection(
        config, checkpoint.sha256, checkpoint.dtype, network, _layers(network), 0, ()
    )


def _cropped(shape: tuple[int, ...] | None, crop: int | None) -> tuple[int, ...]:
    if shape is None or crop is None or len(shape) != 3:
        return shape or ()
    return (shape[0], crop, crop)


def _inspection(
    config: RunConfig,
    sha256: str,
    dtype: torch.dtype,
    network: Network,
    layers: tuple[InspectedLayer, ...],
    images: int,
    warnings: tuple[str, ...],
) -> Inspection:
    size = torch.empty((), dtype=dtype).element_size()
    return Inspection(
        model=config.model,
        sha256=sha256,
        dtype=str(dtype).removeprefix("torch."),
        input_shape=tuple(network.example.shape[1:]),
        original=model_cost(network.original, network.example, size),
        folded=model_cost(network.model, network.example, size),
        norms=tuple(pair.norm for pair in network.folded),
        unpacked=network.unpacked,
        layers=layers,
        images=images,
        warnings=(*warnings, *network.warnings),
    )


def _layers(network: Network) -> tuple[InspectedLayer, ...]:
    return tuple(_layer(site) for site in network.sites)


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


def _with_spectra(
    network: Network,
    config: RunConfig,
    loaded: Any,
    track: Track,
) -> tuple[InspectedLayer, ...]:
    calibration = calibrate(
        network.model,
        network.sites,
        track(loaded, "calibrate", len(loaded)),
        len(loaded.images),
        schemes=(OUTPUT.name,),
        weigh=False,
        samples_per_dimension=config.samples_per_dimension,
        seed=config.seed,
    )
    modules: dict[str, nn.Module] = dict(network.model.named_modules(remove_duplicate=False))
    inspected = []
    for site in without_unseen(network, calibration).sites:
        layer, statistics = _layer(site), calibration.statistics.get(site.name)
        if statistics is None or site.skip is not None:
            inspected.append(layer)
            continue
        spectra = layer_problem(site, modules[site.name], statistics).plain_spectrum
        moments = statistics.inputs or statistics.outputs
        assert moments is not None
        inspected.append(
            replace(
                layer,
                eigenvalues=tuple(spectra.flatten().tolist()),
                ranks=chosen_ranks(spectra),
                samples_per_dimension=statistics.samples / moments.mean.shape[1],
            )
        )
    return tuple(inspected)


def chosen_ranks(spectra: Tensor) -> dict[str, int]:
    """Ranks that the threshold and energy rules choose from spectra ``[groups, values]``."""
    listed = [s.tolist() for s in spectra]
    ranks = {f"threshold {t:g}": max(rank_by_threshold(s, t) for s in listed) for t in THRESHOLDS}
    ranks |= {f"energy {e:g}": max(rank_by_energy(s, e) for s in listed) for e in ENERGIES}
    return ranks
