"""Does training layers as chains make their activations low-rank, and compressible?

Trains one small convolutional network on the embedded digits, plain and over-parameterised, over
several seeds; then compares the spectra of every layer's activations and how few parameters each
network needs when its activations are projected onto their leading components, at an accuracy
within half a point of its own and at one accuracy for all. Prints Markdown tables and writes the
plot:

    python scripts/overparam_digits.py --plot docs/images/overparam-digits.svg
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.modules.overparam import collapse, overparameterize

DATA = Path(__file__).resolve().parents[1] / "compress" / "demo_data"
# A chain of depth 1 is the plain layer under the same rule of initialisation.
VARIANTS = {"plain": 1, "depth 2": 2, "depth 4": 4, "depth 8": 8}
ENERGIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
POINTS = 0.5  # of accuracy that compressing may cost on the validation images
COMMON = 95.0  # percent of the validation images that every network is also compressed to


@dataclass(frozen=True)
class Split:
    """Images ``[N, 1, 8, 8]`` in [-1, 1] and labels ``[N]``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """One trained network: accuracies in percent, spectra by layer, the compressed size."""

    accuracy: float
    effective_ranks: tuple[float, ...]
    spectra: tuple[Tensor, ...]
    own: Projection
    common: Projection | None


@dataclass(frozen=True)
class Projection:
    """A network whose layers' outputs are projected: total rank, percent of parameters kept."""

    rank: int
    parameters: float
    validation: float
    test: float


def load(name: str) -> Split:
    with np.load(DATA / f"digits-{name}.npz") as arrays:
        images = torch.from_numpy(arrays["images"]).float() / 127.5 - 1
        return Split(images, torch.from_numpy(arrays["labels"]).long())


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(seed: int, depth: int, split: Split, epochs: int) -> nn.Module:
    """Train with the same optimiser, schedule and order of images for every variant."""
    torch.manual_seed(seed)
    model = overparameterize(network(), depth=depth, init="fresh")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    count = len(split.labels)
    steps = max(epochs * math.ceil(count / 64), 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=order).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(split.images[batch]), split.labels[batch]).backward()
            optimiser.step()
            schedule.step()
    return collapse(model).eval()


def layers_of(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    return float((model(split.images).argmax(1) == split.labels).double().mean()) * 100


@torch.no_grad()
def bases(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Mean, eigenvalues (descending) and eigenvectors of each hidden layer's output covariance."""
    rows: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, y: rows.append(y.transpose(0, 1).flatten(1)))
        for layer in layers_of(model)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for y in rows:
        y = y.double()
        mean = y.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh((y - mean) @ (y - mean).T / y.shape[1])
        found.append((mean[:, 0], values.flip(0).clamp(min=0), vectors.flip(1)))
    return found


def rank_for(values: Tensor, energy: float) -> int:
    share = values.cumsum(0) / values.sum()
    return min(int((share < energy - 1e-12).sum()) + 1, len(values))


def projected(
    model: nn.Module, found: list[tuple[Tensor, Tensor, Tensor]], ranks: list[int]
) -> list[RemovableHandle]:
    """Hooks that project each hidden layer's output onto its leading components."""
    handles = []
    for layer, (mean, _, vectors), rank in zip(layers_of(model), found, ranks, strict=True):
        u = vectors[:, :rank].float()
        projector, centre = u @ u.T, mean.float()[:, None, None]

        def hook(
            _m: nn.Module, _i: object, y: Tensor, p: Tensor = projector, c: Tensor = centre
        ) -> Tensor:
            return torch.einsum("oc,nchw->nohw", p, y - c) + c

        handles.append(layer.register_forward_hook(hook))
    return handles


def parameters_at(layer: nn.Conv2d | nn.Linear, rank: int) -> int:
    """Parameters of a layer split at ``rank``, or of the whole layer where that is fewer."""
    out, inner = layer.weight.flatten(1).shape
    return min(rank * (inner + out), out * inner) + out


def projections(model: nn.Module, fit: Split, validation: Split, test: Split) -> list[Projection]:
    """The network at every share of energy, smallest first; the last is whole."""
    found = bases(model, fit.images)
    layers = layers_of(model)
    whole = sum(parameters_at(layer, 10**9) for layer in layers)
    sizes = []
    for energy in ENERGIES:
        ranks = [rank_for(values, energy) for _, values, _ in found]
        size = sum(parameters_at(la, r) for la, r in zip(layers, ranks, strict=True))
        handles = projected(model, found, ranks)
        try:
            accuracies = accuracy(model, validation), accuracy(model, test)
        finally:
            for handle in handles:
                handle.remove()
        sizes.append(Projection(sum(ranks), 100 * size / whole, *accuracies))
    return sizes


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the normalised spectrum (Roy and Vetterli, 2007)."""
    p = values / values.sum()
    return math.exp(-(p * p.clamp(min=1e-300).log()).sum().item())


def run(seed: int, depth: int, epochs: int) -> Outcome:
    everything, test = load("train"), load("test")
    order = torch.randperm(len(everything.labels), generator=torch.Generator().manual_seed(0))
    held, rest = order[:300], order[300:]
    fit = Split(everything.images[rest], everything.labels[rest])
    validation = Split(everything.images[held], everything.labels[held])
    model = train(seed, depth, fit, epochs)
    spectra = tuple(values for _, values, _ in bases(model, fit.images))
    sizes = projections(model, fit, validation, test)
    goal = accuracy(model, validation) - POINTS
    own = next((p for p in sizes if p.validation >= goal), sizes[-1])
    common = next((p for p in sizes if p.validation >= COMMON), None)
    ranks = tuple(map(effective_rank, spectra))
    return Outcome(accuracy(model, test), ranks, spectra, own, common)


def spread(values: list[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(outcomes: dict[str, list[Outcome]]) -> str:
    lines = [
        "| network | test accuracy, % | effective rank of layers 1, 2, 3, 4 |",
        "| --- | --- | --- |",
    ]
    for name, found in outcomes.items():
        ranks = zip(*[o.effective_ranks for o in found], strict=True)
        lines.append(
            f"| {name} | {spread([o.accuracy for o in found], 2)} "
            f"| {', '.join(spread(list(r)) for r in ranks)} |"
        )
    for title, kept in (
        (
            f"within {POINTS} points of its own",
            {n: [o.own for o in f] for n, f in outcomes.items()},
        ),
        (
            f"at {COMMON:.0f}% of the validation images",
            {n: [o.common for o in f if o.common] for n, f in outcomes.items()},
        ),
    ):
        lines += [
            "",
            f"| {title} | total rank of 192 | parameters, % | test accuracy, % | seeds |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, chosen in kept.items():
            columns = "— | — | —"
            if chosen:
                columns = (
                    f"{spread([p.rank for p in chosen])} | {spread([p.parameters for p in chosen])}"
                    f" | {spread([p.test for p in chosen], 2)}"
                )
            lines.append(f"| {name} | {columns} | {len(chosen)} |")
    return "\n".join(lines)


def plot(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Draw the mean spectra, each relative to its largest eigenvalue, as SVG."""
    colours = ("#333333", "#1f77b4", "#ff7f0e", "#2ca02c")
    width, height, left, top, gap = 210, 180, 52, 34, 26
    count = len(next(iter(outcomes.values()))[0].spectra)
    total = left + count * (width + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height + 96}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{total}" height="{height + 96}" fill="white"/>',
    ]
    for layer in range(count):
        x0 = left + layer * (width + gap)
        parts.append(f'<text x="{x0}" y="{top - 10}" font-size="13">layer {layer + 1}</text>')
        parts.append(
            f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" '
            'stroke="#999"/>'
        )
        for decade in range(0, 7, 2):
            y = top + height * decade / 6
            parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{y}" y2="{y}" stroke="#eee"/>')
            label = f"1e-{decade}" if decade else "1"
            if layer == 0:
                parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
        size = len(outcomes["plain"][0].spectra[layer])
        parts.append(f'<text x="{x0}" y="{top + height + 14}">1</text>')
        parts.append(
            f'<text x="{x0 + width}" y="{top + height + 14}" text-anchor="end">{size}</text>'
        )
        for colour, found in zip(colours, outcomes.values(), strict=False):
            logs = [(o.spectra[layer] / o.spectra[layer][0]).clamp(min=1e-9).log10() for o in found]
            curve = torch.stack(logs).mean(0).clamp(min=-6).tolist()
            points = " ".join(
                f"{x0 + width * i / (size - 1):.1f},{top - height * v / 6:.1f}"
                for i, v in enumerate(curve)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            )
    for index, (colour, name) in enumerate(zip(colours, outcomes, strict=False)):
        x, y = left + index * 110, top + height + 40
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" '
            f'stroke-width="2"/><text x="{x + 30}" y="{y}">{name}</text>'
        )
    caption = "eigenvalue of the output covariance over the largest, by index, mean of the seeds"
    parts.append(f'<text x="{left}" y="{top + height + 58}" fill="#555">{caption}</text></svg>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--plot", type=Path, help="where to write the plot, an SVG file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    outcomes = {
        name: [run(seed, depth, arguments.epochs) for seed in range(arguments.seeds)]
        for name, depth in VARIANTS.items()
    }
    print(f"{arguments.seeds} seeds, {arguments.epochs} epochs, mean ± standard deviation\n")
    print(table(outcomes))
    if arguments.plot:
        plot(outcomes, arguments.plot)
        print(f"\nplot: {arguments.plot}")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
