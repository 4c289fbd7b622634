"""Chains of random factors against the one layer whose weight is their product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.layers.registry import kind_for
from compress.linalg.fit import chain_matrix
from compress.linalg.geometry import Geometry
from compress.linalg.schemes import (
    SCHEME_NAMES,
    chain_macs,
    chain_params,
    scheme_named,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
MODES = ("zeros", "reflect", "replicate", "circular")
GEOMETRIES = {
    f"{mode}-{name}": Geometry("conv2d", 4, 6, padding_mode=mode, **settings)
    for mode in MODES
    for name, settings in {
        "strided": {"kernel_size": (3, 3), "stride": (2, 3), "padding": (1, 2)},
        "dilated": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": (3, 1), "groups": 2},
        "same": {"kernel_size": (4, 3), "padding": "same"},
        "valid": {"kernel_size": (3, 2), "padding": "valid", "stride": (1, 2)},
    }.items()
} | {
    "conv1d": Geometry("conv1d", 4, 6, (1, 3), (1, 2), (0, 2), (1, 2), 2, "reflect"),
    "linear": Geometry("linear", 5, 7),
    "up": Geometry("conv_transpose2d", 4, 6, (3, 4), (2, 3), (1, 2), output_padding=(1, 0)),
    "up-groups": Geometry(
        "conv_transpose2d", 4, 6, (3, 2), (1, 2), (2, 0), (2, 3), groups=2, output_padding=(1, 2)
    ),
    "up1d": Geometry("conv_transpose1d", 4, 6, (1, 3), (1, 2), (0, 1), output_padding=(0, 1)),
}
POSSIBLE = [
    pytest.param(geometry, scheme, id=f"{name}-{scheme}")
    for name, geometry in GEOMETRIES.items()
    for scheme in SCHEME_NAMES
    if scheme_named(scheme).unavailable(geometry) is None
]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(geometry: Geometry) -> Tensor:
    shapes: dict[str, tuple[int, ...]] = {"linear": (3, 5), "conv1d": (3, 4, 11)}
    shapes["conv_transpose1d"] = (3, 4, 5)
    return random(*shapes.get(geometry.kind, (3, 4, 9, 10)))


def random_factors(geometry: Geometry, scheme: str) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Ranks (two where the scheme has two) and weights of every stage."""
    ranks = (2, 3) if scheme == "two_sided" else (2,)
    return ranks, tuple(
        random(g.groups, g.out_features, g.in_channels // g.groups, *g.kernel_size)
        for g in scheme_named(scheme).stages(geometry, ranks)
    )


def run_chain(geometry: Geometry, scheme: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the chain, and of the one layer that has its product for a weight."""
    ranks, weights = random_factors(geometry, scheme)
    product = chain_matrix(geometry, scheme, weights)
    channels = geometry.in_channels // geometry.groups
    weight = product.reshape(*product.shape[:2], channels, *geometry.kernel_size)
    bias = random(geometry.out_channels)
    whole = kind_for(geometry).build(geometry, weight, bias)
    y = x
    parts = scheme_named(scheme).stages(geometry, ranks)
    for index, (stage, factor) in enumerate(zip(parts, weights, strict=True)):
        last = index == len(parts) - 1
        y = kind_for(stage).build(stage, factor, bias if last else None)(y)
    return y, whole(x)


@pytest.mark.parametrize(("geometry", "scheme"), POSSIBLE)
def test_a_chain_is_the_layer_of_its_product(geometry: Geometry, scheme: str) -> None:
    """Borders included: padding modes, strides, even kernels, dilation, groups, transposed."""
    found, wanted = run_chain(geometry, scheme, inputs(geometry))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("geometry", "scheme"), POSSIBLE)
def test_costs_of_a_chain(geometry: Geometry, scheme: str) -> None:
    ranks, weights = random_factors(geometry, scheme)
    chain = scheme_named(scheme).stages(geometry, ranks)
    x = inputs(geometry)[:1]
    y = x
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for stage, weight in zip(chain, weights, strict=True):
            y = kind_for(stage).build(stage, weight, None)(y)
    size = (1, 1) if x.dim() == 2 else (1, x.shape[2]) if x.dim() == 3 else tuple(x.shape[2:])
    assert chain_macs(chain, (size[0], size[1])) * 2 == counter.get_total_flops()
    numel = sum(weight.numel() for weight in weights)
    assert chain_params(chain, biased=False) == numel
    assert chain_params(chain) == numel + geometry.out_channels


def test_the_specifications_table() -> None:
    """MACs per output position for one group, with the input exactly stride times as large."""
    geometry = Geometry("conv2d", 8, 10, (3, 3), (2, 2), (1, 1))
    r, r2, positions = 4, 5, 6 * 7
    wanted = {
        "output": r * (8 * 9 + 10),
        "input": r * 8 * 4 + r * 9 * 10,
        "two_sided": r * 8 * 4 + r * r2 * 9 + r2 * 10,
        "spatial": r * 8 * 3 * 2 + r * 3 * 10,
    }
    for scheme, macs in wanted.items():
        ranks = (r, r2) if scheme == "two_sided" else (r,)
        assert (
            chain_macs(scheme_named(scheme).stages(geometry, ranks), (12, 14)) == macs * positions
        )
    assert geometry.macs((12, 14)) == 8 * 9 * 10 * positions


@pytest.mark.parametrize(("geometry", "scheme"), POSSIBLE)
def test_factors_and_covariances_agree_on_the_split(geometry: Geometry, scheme: str) -> None:
    """``Ŵ C Ŵᵀ`` is the same over patches and over the split index."""
    groups, out = geometry.groups, geometry.out_features
    channels = geometry.in_channels // groups
    weight = random(groups, out, channels, *geometry.kernel_size)
    rows = random(groups, 50, geometry.in_features)
    covariance = rows.mT @ rows
    wanted = weight.flatten(2) @ covariance @ weight.flatten(2).mT
    split = scheme_named(scheme).split_weight(weight)
    found = torch.einsum(
        "gaoi,goipj,gbpj->gab",
        split,
        scheme_named(scheme).split_covariance(covariance, geometry),
        split,
    )
    torch.testing.assert_close(found, wanted)
    first, last = random(groups, 2, split.shape[3]), random(groups, out, 2, split.shape[2])
    up = None
    product = torch.einsum("gcro,gri->gcoi", last, first)
    if scheme == "two_sided":
        up, last = random(groups, out, 3), last[:, :3]
        product = torch.einsum("gcs,gsro,gri->gcoi", up, last, first)
    stored = chain_matrix(
        geometry, scheme, scheme_named(scheme).stage_weights(geometry, first, last, up)
    )
    back = scheme_named(scheme).split_weight(stored.reshape(weight.shape))
    torch.testing.assert_close(back, product)


@pytest.mark.parametrize(
    ("geometry", "reasons"),
    [
        (Geometry("conv2d", 8, 8, (3, 3)), {}),
        (Geometry("conv2d", 8, 8), {"input": "1x1", "two_sided": "1x1", "spatial": "one row"}),
        (Geometry("conv2d", 8, 8, (1, 3)), {"spatial": "one row"}),
        (Geometry("conv2d", 8, 4, (3, 3), groups=4), {"output": "rank 1", "two_sided": "rank 1"}),
        (Geometry("conv2d", 8, 1, (3, 3)), {"output": "rank 1", "two_sided": "rank 1"}),
        (Geometry("conv2d", 1, 8, (3, 3)), {"input": "rank 1", "two_sided": "rank 1"}),
        (
            Geometry("linear", 8, 1),
            {"output": "rank 1", "input": "1x1", "two_sided": "1x1", "spatial": "one row"},
        ),
    ],
)
def test_what_a_scheme_cannot_do(geometry: Geometry, reasons: dict[str, str]) -> None:
    for scheme in ("output", "input", "two_sided", "spatial"):
        found = scheme_named(scheme).unavailable(geometry)
        if scheme in reasons:
            assert found is not None
            assert reasons[scheme] in found
        else:
            assert found is None


@pytest.mark.parametrize(
    "call",
    [lambda g, s: scheme_named(s).full_ranks(g), lambda g, s: scheme_named(s).stages(g, (1,))],
)
def test_unknown_schemes(call: Any) -> None:
    with pytest.raises(ValueError, match="'tucker'"):
        call(Geometry("linear", 4, 4), "tucker")


def test_two_sided_needs_its_last_projection() -> None:
    geometry = Geometry("conv2d", 4, 4, (3, 3))
    with pytest.raises(ValueError, match="last projection"):
        scheme_named("two_sided").stage_weights(geometry, random(1, 2, 4), random(1, 2, 2, 9))
