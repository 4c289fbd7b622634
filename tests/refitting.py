"""A network with shortcuts, and factors fitted to it, for the tests of both refits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.problems import absorbed_bias, layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Source
from compress.fit.factors import Factors
from compress.fit.walk import Traced
from compress.linalg.fit import fit
from compress.linalg.schemes import SCHEME_NAMES
from compress.network.baseline import Network
from compress.network.chains import rewrite


class Residual(nn.Module):
    """Two blocks with in-place operations where they hurt: a shared shortcut, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.norm(self.first(x))
        out += x
        x = self.relu(out)
        out = self.drop(self.second(x))
        x = self.relu(x + out)
        return self.head(x.mean((2, 3)))


def factors_of(
    network: Network, images: Tensor, ranks: dict[str, tuple[str, int]]
) -> dict[str, Factors]:
    batches = [(images, torch.zeros(len(images)))]
    calibration = calibrate(
        network.model, network.sites, batches, Source(len(images)), Recipe(schemes=SCHEME_NAMES)
    )
    found = {}
    for name, (scheme, rank) in ranks.items():
        module = network.model.get_submodule(name)
        statistics = calibration.statistics[name]
        problem = layer_problem(network.site(name), module, statistics)
        fitted = fit(problem, scheme, (rank,))
        bias = absorbed_bias(module, statistics, fitted)
        found[name] = Factors(fitted, bias, problem.weighting)
    return found


def rewritten(
    network: Network,
    factors: dict[str, Factors],
    kept: dict[str, dict[str, Tensor]] | None = None,
) -> nn.Module:
    sites = {s.name: s for s in network.sites}
    return rewrite(network.model, sites, {n: f.chain for n, f in factors.items()}, kept)


def traced_of(network: Network) -> Traced:
    """The network as refits walk it."""
    assert network.graph is not None
    return Traced(
        network.model, network.graph, {site.name: site for site in network.sites}, network.result
    )


def labelled(images: Tensor, size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Batches of images, all with label 0."""
    parts = images.split(size or len(images))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in parts]
