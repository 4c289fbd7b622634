"""How well hypernetworks train by their initialisation, beside HyperLight's algorithm.

A hypernetwork emits all weights of a small classifier of the embedded digits from the angle by
which the images are turned; further inputs are noise that it has to learn to ignore. Prints the
norms of activations and emitted weights before training, and the accuracy on turned test images
after training with Adam, as Markdown tables. Every candidate sees the same batches, angles and
noise. With ``--select`` it instead compares factors for the last layer, and with ``--biases`` those
of hidden layers, on training images held back, which is how the defaults were chosen: no test image
is looked at. Run from a checkout, in the project's environment:

    OMP_NUM_THREADS=1 python scripts/bench/hypernet.py --select
    OMP_NUM_THREADS=1 python scripts/bench/hypernet.py --biases --seeds 30
    OMP_NUM_THREADS=1 python scripts/bench/hypernet.py
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.modules.hypernet import Hypernet, encode, hypernetize
from compress.modules.hypernet.initialization import EMITTED

DATA = Path(__file__).resolve().parents[2] / "compress" / "demo_data"
ANGLES = 64  # that training draws from, evenly over half a turn
TEST_ANGLES = 8
BATCH = 64
Shapes = Mapping[str, tuple[int, ...]]
Emitter = Callable[[Tensor], dict[str, Tensor]]


class Original(nn.Module):
    """HyperLight's hypernetwork, re-stated: version 0.0.5 with its defaults.

    Every weight of the hidden layers is Kaiming normal by the fan-out, and so are the rows of the
    last layer for each output; its bias holds the weights that no input changes, which start as
    Kaiming normal by the fan-in for weights and as zero for biases.
    """

    def __init__(
        self, inputs: int, shapes: Shapes, hidden: list[int], weights: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        layers: list[nn.Module] = []
        size = 2 * inputs
        for width in hidden:
            linear = nn.Linear(size, width)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="leaky_relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.LeakyReLU()]
            size = width
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(size, sum(math.prod(shape) for shape in shapes.values()))
        start, row = [], 0
        for name, shape in shapes.items():
            rows = math.prod(shape)
            part = self.output.weight.detach()[row : row + rows]
            nn.init.kaiming_normal_(part, mode="fan_out", nonlinearity="leaky_relu")
            row += rows
            value = torch.zeros(shape)
            if weights is not None:
                value = weights[name]
            elif name.endswith(".weight"):
                nn.init.kaiming_normal_(value, nonlinearity="leaky_relu")
            start.append(value.flatten())
        with torch.no_grad():
            self.output.bias.copy_(torch.cat(start))

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        angle = h * (math.pi / 2)
        flat = self.output(self.hidden(torch.cat([angle.cos(), angle.sin()], dim=-1)))
        pieces = flat.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        pairs = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pairs}


@dataclass(frozen=True)
class Task:
    """One setting: how many inputs, which widths, which learning rate."""

    inputs: int
    hidden: tuple[int, ...]
    rate: float
    existing: bool = False

    def __str__(self) -> str:
        widths = "-".join(map(str, self.hidden))
        return f"{self.inputs} | {widths} | {self.rate:g}"


TASKS = [
    *(Task(1, (16, 64, 128), rate) for rate in (3e-3, 1e-2)),
    *(Task(1, (64,), rate) for rate in (3e-3, 1e-2)),
    Task(4, (16, 64, 128), 3e-3),
    *(Task(16, (16, 64, 128), rate) for rate in (3e-3, 1e-2)),
    Task(16, (256, 256), 3e-3),
    Task(64, (16, 64, 128), 3e-3),
]
EXISTING = [
    *(Task(1, (16, 64, 128), rate, existing=True) for rate in (3e-3, 1e-2)),
    Task(16, (16, 64, 128), 3e-3, existing=True),
]
SELECTED_ON = [Task(n, (16, 64, 128), rate) for n in (1, 16) for rate in (3e-3, 1e-2)]
# The class above, and initialisations of `Hypernet`; a number is "constant_norm" with this factor
# for the last layer.
CANDIDATES = "original", "constant_norm", "kaiming_normal"
# The default without what its biases do.
ZERO_BIASES = "zero biases"
BIASES = ZERO_BIASES, "constant_norm", "original"
FACTORS = ("0", "0.1", "0.3", "1")
HELD_BACK = 300  # training images that a factor is chosen on
FIRST_SEED = 100  # of the choice, so that it shares no draw with the tables


class Digits:
    """The digits, turned by every angle of training and of the test.

    Args:
        held_back: Whether training images take the place of the test images.
    """

    def __init__(self, *, held_back: bool = False) -> None:
        images, labels = load("train")
        test, test_labels = load("test")
        if held_back:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))
            test, test_labels = images[order[:HELD_BACK]], labels[order[:HELD_BACK]]
            images, labels = images[order[HELD_BACK:]], labels[order[HELD_BACK:]]
        self.labels, self.test_labels = labels, test_labels
        self.turned = [turn(images, (i + 0.5) / ANGLES) for i in range(ANGLES)]
        self.test_angles = [(i + 0.5) / TEST_ANGLES for i in range(TEST_ANGLES)]
        self.tests = [turn(test, angle) for angle in self.test_angles]


def load(split: str) -> tuple[Tensor, Tensor]:
    with np.load(DATA / f"digits-{split}.npz") as archive:
        images = torch.from_numpy(archive["images"]).float() / 127.5 - 1
        return images, torch.from_numpy(archive["labels"]).long()


def turn(images: Tensor, part: float) -> Tensor:
    """Turn images ``[N, 1, 8, 8]`` by ``part`` of half a turn."""
    cos, sin = math.cos(part * math.pi), math.sin(part * math.pi)
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def upright(digits: Digits, seed: int) -> dict[str, Tensor]:
    """Weights of a classifier trained on the digits that are turned the least."""
    model = classifier()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        batch = torch.randint(len(digits.labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(digits.turned[0][batch]), digits.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def build(
    candidate: str, task: Task, shapes: Shapes, weights: Mapping[str, Tensor] | None
) -> nn.Module:
    hidden = list(task.hidden)
    if candidate == "original":
        return Original(task.inputs, shapes, hidden, weights)
    inputs = {"h": (task.inputs,)}
    if candidate == ZERO_BIASES:
        if weights is not None:
            return Hypernet.from_existing(weights, inputs, hidden, init_bias=0.0)
        return Hypernet(inputs, shapes, hidden, init_bias=0.0)
    if candidate in FACTORS:
        net = Hypernet(inputs, shapes, hidden)
        with torch.no_grad():
            net.output.weight.mul_(float(candidate) / EMITTED)
        return net
    if weights is not None:
        return Hypernet.from_existing(weights, inputs, hidden, init_distribution=candidate)
    return Hypernet(inputs, shapes, hidden, init_distribution=candidate)


def accuracy(digits: Digits, candidate: str, task: Task, seed: int, steps: int) -> float:
    """Percent of the test images that are right after training, over all angles of the test."""
    torch.manual_seed(seed)
    weights = upright(digits, seed) if task.existing else None
    main = hypernetize(classifier(), parameters="all")
    net = build(candidate, task, main.external_shapes(), weights)
    optimiser = torch.optim.Adam(net.parameters(), lr=task.rate)
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        z = torch.rand(task.inputs, generator=generator)
        batch = torch.randint(len(digits.labels), (BATCH,), generator=generator)
        images = digits.turned[min(int(z[0] * ANGLES), ANGLES - 1)][batch]
        with main.using_externals(net(h=z)):
            loss = F.cross_entropy(main(images), digits.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = []
    with torch.no_grad():
        for angle, images in zip(digits.test_angles, digits.tests, strict=True):
            z = torch.rand(task.inputs, generator=generator)
            z[0] = angle
            with main.using_externals(net(h=z)):
                right.append((main(images).argmax(1) == digits.test_labels).float().mean().item())
    return float(100 * statistics.mean(right))


def norms(candidate: str, inputs: int, hidden: tuple[int, ...], draws: int) -> list[float]:
    """Norms before training: of the encoding, each hidden layer, and h beside the fixed weights.

    The last figure is the norm of h's part of the first layer's weight by that of θ₀'s.
    """
    task = Task(inputs, hidden, 0.0)
    shapes = hypernetize(classifier(), parameters="all").external_shapes()
    rows = []
    for seed in range(draws):
        torch.manual_seed(seed)
        net = build(candidate, task, shapes, None)
        z = torch.rand(64, inputs)
        with torch.no_grad():
            activation = encode(z, "cos|sin")
            row = [activation.norm(dim=1).mean().item()]
            assert isinstance(net.hidden, nn.Sequential)
            for layer in net.hidden:
                activation = layer(activation)
                if isinstance(layer, nn.LeakyReLU):
                    row.append(activation.norm(dim=1).mean().item())
            emitted = [net(h=one)["1.weight"] for one in z]
            fixed = fixed_weight(net)
            row.append(statistics.mean(((w - fixed).norm() / fixed.norm()).item() for w in emitted))
        rows.append(row)
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def fixed_weight(net: nn.Module) -> Tensor:
    """The part of ``1.weight`` that no input changes."""
    if isinstance(net, Hypernet):
        return net.independent_weights()["1.weight"]
    assert isinstance(net, Original)
    sizes = [math.prod(shape) for shape in net.shapes.values()]
    pieces = dict(zip(net.shapes, net.output.bias.detach().split(sizes), strict=True))
    weight: Tensor = pieces["1.weight"].view(net.shapes["1.weight"])
    return weight


def print_norms(hidden: tuple[int, ...], draws: int) -> None:
    print("\n| initialisation | inputs | encoding |", end="")
    print("".join(f" hidden {width} |" for width in hidden), "h by θ₀ |")
    print("| --- " * (len(hidden) + 4) + "|")
    for candidate in CANDIDATES:
        for inputs in (1, 4, 16, 64):
            row = norms(candidate, inputs, hidden, draws)
            print(f"| {candidate} | {inputs} | " + " | ".join(f"{v:.2f}" for v in row), "|")


def print_accuracies(
    digits: Digits, tasks: list[Task], candidates: Sequence[str], seeds: range, steps: int
) -> None:
    first, second, *_ = candidates
    print(f"\n| inputs | hidden | rate | {' | '.join(candidates)} | {second} - {first} |")
    print("| --- " * (len(candidates) + 4) + "|")
    for task in tasks:
        found = [[accuracy(digits, c, task, seed, steps) for seed in seeds] for c in candidates]
        found.append([b - a for a, b in zip(*found[:2], strict=True)])  # seed by seed
        cells = []
        for got in found:
            error = statistics.stdev(got) / math.sqrt(len(got)) if len(got) > 1 else math.nan
            cells.append(f"{statistics.mean(got):.1f} ± {error:.1f}")
        print(f"| {task} | {' | '.join(cells)} |", flush=True)


def select(seeds: int, steps: int) -> None:
    """Compare factors on training images held back."""
    print(f"\nFactor of the last layer, {HELD_BACK} training images held back:")
    chosen = range(FIRST_SEED, FIRST_SEED + seeds)
    print_accuracies(Digits(held_back=True), SELECTED_ON, FACTORS, chosen, steps)


def compare_biases(seeds: int, steps: int) -> None:
    """Compare units that bend where inputs are with biases of zero, on images held back."""
    print(f"\nBiases of hidden layers, {HELD_BACK} training images held back:")
    chosen = range(FIRST_SEED, FIRST_SEED + seeds)
    tasks = [task for task in (*TASKS, *EXISTING) if task.inputs == 1]
    print_accuracies(Digits(held_back=True), tasks, BIASES, chosen, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=20, help="hypernetworks behind each norm")
    parser.add_argument("--tasks", type=int, default=None, help="only the first of each table")
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--select", action="store_true", help="compare factors, without the test")
    parser.add_argument("--biases", action="store_true", help="compare biases, without the test")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    print(f"torch {torch.__version__}, one thread, {platform.machine()}")
    if arguments.select:
        select(arguments.seeds, arguments.steps)
        return
    if arguments.biases:
        compare_biases(arguments.seeds, arguments.steps)
        return
    candidates = arguments.candidates.split(",")
    print_norms((16, 64, 128), arguments.draws)
    digits = Digits()
    for title, tasks in (("From scratch", TASKS), ("From existing weights", EXISTING)):
        print(f"\n{title}:")
        print_accuracies(
            digits, tasks[: arguments.tasks], candidates, range(arguments.seeds), arguments.steps
        )
    print(f"\n{arguments.seeds} seeds, {time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
