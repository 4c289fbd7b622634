"""What the companion modules cost against plain torch and against the originals, side by side.

Every row alternates the two candidates call by call in one process and compares the medians of
their processor time, which other jobs on the machine disturb less than time on the clock; the last
row is a time in seconds. The originals (overparam, torchreparam) stand here as plain
re-statements of their algorithms. Run from a checkout, in the project's environment:

    python scripts/bench/modules.py
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.modules.flat import FlatModule
from compress.modules.hypernet import hypernetize
from compress.modules.overparam import OverparamConv2d, OverparamLinear, collapse, overparameterize
from compress.vision.torchvision import torchvision_model

Step = Callable[[], None]


class TheirConv(nn.Module):
    """overparam's convolution: a chain, collapsed in the layer's dtype by ``eval()``.

    Groups are 1 and the padding is zeros, which is all that theirs has.
    """

    def __init__(self, parts: list[nn.Sequential], residual_intervals: tuple[int, ...]) -> None:
        super().__init__()
        self.layer_dict = nn.ModuleDict({str(i): part for i, part in enumerate(parts)})
        self.residual_intervals = residual_intervals
        first, last = parts[0][0], parts[-1][0]
        self.stride, self.padding = last.stride, first.padding
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def train(self, mode: bool = True) -> TheirConv:
        super().train(mode)
        if not mode:
            self.weight, self.bias = self.collapsed()
        return self

    def forward(self, x: Tensor, override: bool = False) -> Tensor:
        if self.training or override:
            return self.expanded(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def expanded(self, x: Tensor) -> Tensor:
        nodes = [x]
        for m, part in enumerate(self.layer_dict.values(), start=1):
            y = part(nodes[-1])
            for n in self.residual_intervals:
                if m % n == 0:
                    y = y + self.identity(nodes[m - n], y)
            nodes.append(y)
        return nodes[-1]

    @staticmethod
    def identity(x: Tensor, like: Tensor) -> Tensor:
        """Crop or pad around the centre (theirs at stride 1)."""
        spare = like.shape[-1] - x.shape[-1]
        return F.pad(x, [spare // 2, spare - spare // 2] * 2)

    @torch.no_grad()
    def collapsed(self) -> tuple[Tensor, Tensor]:
        chain = copy.deepcopy(self.layer_dict)  # as theirs does
        kernels: list[Tensor] = [torch.eye(chain["0"][0].in_channels)[:, :, None, None]]
        kernels[0] = kernels[0].to(chain["0"][0].weight)
        biases = [kernels[0].new_zeros(len(kernels[0]))]
        for m, part in enumerate(chain.values(), start=1):
            weight = part[0].weight
            bias = weight.new_zeros(len(weight)) if part[0].bias is None else part[0].bias
            if len(part) > 1:
                norm = part[1]
                scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
                weight = weight * scale.view(-1, 1, 1, 1)
                bias = (bias - norm.running_mean) * scale + norm.bias
            if m > 1:
                pushed = weight.sum((2, 3)) @ biases[-1]
                full = weight.shape[-1] - 1
                weight = F.conv2d(kernels[-1].transpose(0, 1), weight.flip(-1, -2), padding=full)
                weight, bias = weight.transpose(0, 1), pushed + bias
            for n in self.residual_intervals:
                if m % n == 0:
                    weight = weight + self.identity(kernels[m - n], weight)
                    bias = bias + biases[m - n]
            kernels.append(weight)
            biases.append(bias)
        return kernels[-1].contiguous(), biases[-1]


def their_conv(ours: OverparamConv2d) -> TheirConv:
    """Their layer with the options and the weights of one of ours."""
    parts = []
    for i, layer in enumerate(ours.layers):
        twin = copy.deepcopy(layer)
        if i == 0:
            twin.padding = ours.padding
        parts.append(nn.Sequential(twin, *([copy.deepcopy(ours.norms[i])] if ours.norms else [])))
    return TheirConv(parts, ours.chain.intervals).train(ours.training)


def with_their_convolutions(model: nn.Module) -> nn.Module:
    """A copy of a model whose over-parameterised convolutions are theirs."""
    twin = copy.deepcopy(model)
    for owner in list(twin.modules()):
        for name, child in owner.named_children():
            if isinstance(child, OverparamConv2d):
                setattr(owner, name, their_conv(child))
    return twin


class TheirFlat(nn.Module):
    """torchreparam's module: parameters become attributes, swapped around every forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        places, tensors = [], []
        for owner in module.modules():
            for name, tensor in list(owner._parameters.items()):
                if tensor is not None:
                    places.append((owner, name))
                    tensors.append(tensor.detach())
                    delattr(owner, name)
        self.places, self.pieces = places, [(t.numel(), t.shape) for t in tensors]
        self.flat_param = nn.Parameter(torch.cat([t.reshape(-1) for t in tensors]))
        self.put(list(self.views(self.flat_param)))

    def views(self, vector: Tensor) -> Iterator[Tensor]:
        parts = vector.split([count for count, _ in self.pieces])
        return (part.view(shape) for part, (_, shape) in zip(parts, self.pieces, strict=True))

    def put(self, values: list[Tensor]) -> None:
        for (owner, name), value in zip(self.places, values, strict=True):
            setattr(owner, name, value)

    def forward(self, x: Tensor, flat_param: Tensor | None = None) -> Tensor:
        saved = [getattr(owner, name) for owner, name in self.places]
        self.put(list(self.views(self.flat_param if flat_param is None else flat_param)))
        output = self.module(x)
        self.put(saved)
        return output


SECONDS = 10.0
Row = tuple[str, float, float, float | None]  # name, seconds of both, limit of their ratio


def alternate(one: Step, other: Step, repeats: int) -> tuple[float, float]:
    """Median processor seconds of each, measured in turns, the order turned round every time.

    Short steps are repeated until they fill `SECONDS`.
    """
    for step in (one, other) * 2:
        step()
    times: dict[Step, list[float]] = {one: [], other: []}
    until = time.perf_counter() + SECONDS
    repeat = 0
    while repeat < repeats or time.perf_counter() < until:
        repeat += 1
        for step in (one, other) if repeat % 2 else (other, one):
            start = time.process_time()
            step()
            times[step].append(time.process_time() - start)
    return statistics.median(times[one]), statistics.median(times[other])


def forward(module: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def forward_with_gradients(module: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        module(x)

    return step


def collapsing(module: nn.Module) -> Step:
    """From training to a collapsed weight in every layer."""

    def step() -> None:
        module.train()
        module.eval()
        for layer in module.modules():
            if isinstance(layer, OverparamConv2d | OverparamLinear):
                layer._kept = None
                with torch.no_grad():
                    layer.effective()

    return step


def meta_step(module: nn.Module, x: Tensor, vector: Tensor) -> Step:
    def step() -> None:
        loss = module(x, flat_param=vector).square().mean()
        (slope,) = torch.autograd.grad(loss, vector, create_graph=True)
        outer = module(x, flat_param=vector - 0.01 * slope).square().mean()
        torch.autograd.grad(outer, vector)

    return step


def both_ways(module: nn.Module, x: Tensor, leaves: list[Tensor]) -> Step:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x).square().mean().backward()

    return step


def overparam_rows(repeats: int) -> list[Row]:
    rows: list[Row] = []
    image = torch.randn(8, 64, 56, 56)
    tokens = torch.randn(1024, 512)
    cases: list[tuple[str, OverparamConv2d | OverparamLinear, Tensor]] = [
        ("conv 64 [3, 1] eval forward", OverparamConv2d(64, 64, [3, 1]), image),
        (
            "conv 64 [3, 1, 1, 1] BN, residual, eval forward",
            OverparamConv2d(64, 64, 3, depth=4, batch_norm=True, residual=True),
            image,
        ),
        ("linear 512 depth 3 eval forward", OverparamLinear(512, 512, depth=3), tokens),
    ]
    for name, layer, x in cases:
        layer.eval()
        plain = layer.collapse()
        rows.append((name, *alternate(forward(plain, x), forward(layer, x), repeats), 1.05))
    return rows


def original_rows(repeats: int, batch: int, size: int) -> list[Row]:
    """The originals' algorithms as the first of each pair."""
    x = torch.randn(batch, 3, size, size)
    plain = torchvision_model("resnet18")
    ours = overparameterize(copy.deepcopy(plain), overparam="conv", init="fresh")
    theirs = with_their_convolutions(ours)
    rows: list[Row] = []

    def row(name: str, one: Step, other: Step, limit: float | None = None) -> None:
        rows.append((name, *alternate(one, other, repeats), limit))

    name = "overparam resnet18"
    for module in (ours, theirs):
        module.train()
    leaves = [list(m.parameters()) for m in (theirs, ours)]
    row(f"{name} train forward+backward", both_ways(theirs, x, leaves[0]),
        both_ways(ours, x, leaves[1]))  # fmt: skip
    row(f"{name} collapse", collapsing(theirs), collapsing(ours))
    row(f"{name} eval forward", forward(theirs, x), forward(ours, x), 1.2)
    row(f"{name} eval forward with gradients enabled", forward_with_gradients(theirs, x),
        forward_with_gradients(ours, x), 1.2)  # fmt: skip

    expanded = copy.deepcopy(theirs)
    for layer in expanded.modules():
        if isinstance(layer, TheirConv):
            layer.training = True  # collapse_on_eval=False, the only way to train theirs in eval
    row(
        f"{name} eval forward+backward to the factors, theirs expanded",
        both_ways(expanded, x, list(expanded.parameters())),
        both_ways(ours, x, leaves[1]),
    )

    mlp = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    for label, model, inputs in (
        ("resnet18", plain.eval(), x), ("mlp of 2 layers", mlp, torch.randn(8, 16)),
    ):  # fmt: skip
        flat, their = FlatModule(copy.deepcopy(model)), TheirFlat(copy.deepcopy(model))
        row(f"FlatModule({label}) eval forward", forward(their, inputs), forward(flat, inputs))
        row(f"FlatModule({label}) eval forward+backward",
            both_ways(their, inputs, [their.flat_param]),
            both_ways(flat, inputs, [flat.flat_param]))  # fmt: skip
        vector = flat.flat_param.detach().clone().requires_grad_()
        row(f"FlatModule({label}) MAML step", meta_step(their, inputs, vector),
            meta_step(flat, inputs, vector))  # fmt: skip
    return rows


def resnet18_rows(repeats: int, batch: int, size: int) -> list[Row]:
    x = torch.randn(batch, 3, size, size)
    rows: list[Row] = []
    for training in (False, True):
        plain = torchvision_model("resnet18").train(training)
        flat = FlatModule(copy.deepcopy(plain))
        hyper, values = hypernetize(copy.deepcopy(plain), parameters="all", return_values=True)
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        hyper.set_externals(leaves)
        mode = "train" if training else "eval"
        cases: tuple[tuple[str, nn.Module, list[Tensor]], ...] = (
            ("FlatModule(resnet18)", flat, [flat.flat_param]),
            ("hypernetized resnet18, constant values", hyper, list(leaves.values())),
        )
        for name, module, own in cases:
            if not training:
                pair = alternate(forward(plain, x), forward(module, x), repeats)
                rows.append((f"{name} {mode} forward", *pair, 1.10))
            pair = alternate(
                both_ways(plain, x, list(plain.parameters())), both_ways(module, x, own), repeats
            )
            rows.append((f"{name} {mode} forward+backward", *pair, 1.10))
    return rows


def collapse_seconds() -> tuple[float, float]:
    """Seconds (wall, processor) to collapse an over-parameterised ResNet-50, medians of three."""
    model = overparameterize(torchvision_model("resnet50"), init="fresh").eval()
    walls, processors = [], []
    for _ in range(3):
        for layer in model.modules():
            if isinstance(layer, OverparamConv2d | OverparamLinear):
                layer._kept = None  # from the last round
        wall, processor = time.perf_counter(), time.process_time()
        collapse(model)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return statistics.median(walls), statistics.median(processors)


def table(base: str, rows: list[Row]) -> None:
    print(f"\n| what | {base}, ms | ours, ms | ratio | limit |\n| --- | --- | --- | --- | --- |")
    for name, one, ours, limit in rows:
        most = "" if limit is None else f"{limit:.2f}"
        print(f"| {name} | {one * 1e3:.3f} | {ours * 1e3:.3f} | {ours / one:.3f} | {most} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=10, help="least time for each row")
    parser.add_argument("--originals", action="store_true", help="only against the originals")
    arguments = parser.parse_args()
    global SECONDS
    SECONDS = arguments.seconds
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{platform.machine()}, "
        f"at least {arguments.repeats} alternating runs, load {os.getloadavg()[0]:.1f}"
    )
    options = arguments.repeats, arguments.batch, arguments.size
    table("the original's algorithm", original_rows(*options))
    if arguments.originals:
        return
    table("plain", [*overparam_rows(arguments.repeats), *resnet18_rows(*options)])
    wall, processor = collapse_seconds()
    print(f"| collapse(resnet50, depth 2), seconds | | {wall:.2f} ({processor:.2f} CPU) | | 5 |")


if __name__ == "__main__":
    main()
