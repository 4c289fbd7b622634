"""Options of `Hypernet`: initialisation, the hidden network, sizes."""

from __future__ import annotations

import math
import os
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.modules.hypernet import (
    ExternalParameter,
    HyperConv2d,
    HyperLinear,
    Hypernet,
    encode,
)
from compress.modules.hypernet.initialization import fill_keeping_norm, is_odd

SHAPES = {"0.weight": (40, 30), "0.bias": (40,), "1.weight": (300, 8, 3, 3)}


def hidden_norms(net: Hypernet, inputs: int) -> list[float]:
    """Mean norm after every module of the hidden network."""
    activation = encode(torch.rand(64, inputs), net.encoding)
    norms = []
    with torch.no_grad():
        for layer in net.hidden:
            activation = layer(activation)
            norms.append(activation.norm(dim=1).mean().item())
    return norms


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    inputs=st.sampled_from([1, 5, 40]),
    widths=st.lists(st.integers(200, 500), min_size=1, max_size=3),
    nonlinearity=st.sampled_from(["LeakyReLU", "ReLU"]),
    encoding=st.sampled_from(["cos|sin", "z|1-z", None]),
)
def test_activations_start_with_norm_one(
    inputs: int, widths: list[int], nonlinearity: str, encoding: Any
) -> None:
    """One, whatever the inputs and widths; with HyperLight's the norm of the encoding."""
    torch.manual_seed(0)
    options: Any = {"nonlinearity": nonlinearity}
    net = Hypernet({"h": (inputs,)}, SHAPES, widths, encoding, **options)
    fanout = Hypernet(
        {"h": (inputs,)}, SHAPES, widths, encoding,
        init_distribution="kaiming_normal_fanout", **options,
    )  # fmt: skip
    norm = encode(torch.rand(2000, inputs), encoding).square().sum(1).mean().sqrt().item()
    # A uniform input of one element has no typical norm without the constant-norm encoding.
    wide = 0.35 if encoding == "cos|sin" else 0.5
    for mine, theirs in zip(hidden_norms(net, inputs)[1::2], hidden_norms(fanout, inputs)[1::2],
                            strict=True):  # fmt: skip
        assert mine == pytest.approx(1, abs=wide)
        assert theirs == pytest.approx(norm, rel=wide)


@pytest.mark.parametrize("nonlinearity", ["LeakyReLU", "ReLU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_input_keeps_its_norm_in_every_layer(nonlinearity: str, dtype: torch.dtype) -> None:
    """Exactly, not on average: of each pair of rows a rectifier lets one pass."""
    torch.manual_seed(0)
    net = Hypernet({"h": (3,)}, SHAPES, [16, 64, 128, 256], nonlinearity=nonlinearity, dtype=dtype)
    x = encode(torch.rand(50, 3, dtype=dtype), "cos|sin")
    with torch.no_grad():
        for layer in net.hidden:
            x = layer(x)
            if not isinstance(layer, nn.Linear):
                torch.testing.assert_close(x.norm(dim=1), torch.ones(50, dtype=dtype))


@pytest.mark.parametrize("nonlinearity", ["LeakyReLU", "ReLU", "SiLU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z", None])
def test_units_bend_at_inputs(nonlinearity: str, dtype: torch.dtype, encoding: Any) -> None:
    """What enters a nonlinearity is zero at some input, and the norm stays one on average."""
    torch.manual_seed(0)
    net = Hypernet({"h": (1,)}, SHAPES, [16, 64, 32], encoding, nonlinearity=nonlinearity,
                   dtype=dtype)  # fmt: skip
    x = encode(torch.linspace(0, 1, 4001)[:, None].to(dtype), encoding)
    with torch.no_grad():
        for layer in net.hidden:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                size = x.float().abs().amax(0)
                assert bool((x.float().abs().amin(0) <= 0.02 * size).all())
            elif dtype == torch.float32 and nonlinearity != "SiLU":
                # SiLU is not scaled by a gain of its own, and not every encoding has one norm.
                assert float(x.norm(dim=1).mean()) == pytest.approx(1, abs=0.3)
        first = net.hidden[0]
        assert isinstance(first, nn.Linear)
        bends = first.bias.float() / first.weight.float().norm(dim=1)
        assert len(set(bends.tolist())) > 4  # not all at one input


@pytest.mark.parametrize(
    "options",
    [{"init_bias": 0.0}, {"input_shapes": {"a": (), "b": ()}}, {"nonlinearity": "Tanh"},
     {"norm": nn.LayerNorm},
     {"init_distribution": "kaiming_normal_fanout"}, {"init_distribution": "orthogonal"}],
)  # fmt: skip
def test_other_biases_start_at_zero(options: Any) -> None:
    net = Hypernet(**{"input_shapes": {"h": (1,)}, "output_shapes": SHAPES, "hidden_sizes": [8, 8],
                      **options})  # fmt: skip
    assert all(not layer.bias.any() for layer in net.hidden if isinstance(layer, nn.Linear))


def test_before_an_odd_nonlinearity_rows_are_orthogonal_and_no_pairs() -> None:
    torch.manual_seed(0)
    net = Hypernet({"h": (3,)}, SHAPES, [20, 20], nonlinearity="Tanh")
    weight = net.hidden[2].weight.detach()
    assert torch.linalg.matrix_rank(weight) == 20
    torch.testing.assert_close(weight.T @ weight, (5 / 3) ** 2 * torch.eye(20))


@pytest.mark.parametrize(
    ("nonlinearity", "odd"),
    [(nn.ReLU(), False), (nn.GELU(), False), (nn.Tanh(), True), (nn.Sigmoid(), True),
     (nn.Identity(), True), (nn.PReLU(), False), (nn.Softsign(), True)],
)  # fmt: skip
def test_which_nonlinearities_are_odd(nonlinearity: nn.Module, *, odd: bool) -> None:
    assert is_odd(nonlinearity) is odd


@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_narrow_layers_keep_the_mean_square(width: int) -> None:
    torch.manual_seed(0)
    squares = []
    for _ in range(400):
        weight = torch.empty(width, 6)
        fill_keeping_norm(weight, 1.0, mirrored=True)
        squares.append(weight.square().sum().item() / 6)
    # The mean square of an output for inputs of norm one; odd widths leave out one of a pair.
    assert statistics.mean(squares) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("inputs", [1, 16])
@pytest.mark.parametrize("widths", [[], [64], [16, 300]])
def test_every_output_starts_with_its_own_fan_out(inputs: int, widths: list[int]) -> None:
    """By output: 0.1 sqrt(2 / rows), and with HyperLight's distribution sqrt(2 / rows)."""
    torch.manual_seed(0)
    first = 1 / math.sqrt(inputs) if not widths else 1.0
    for distribution, factor in (("constant_norm", 0.1 * first), ("kaiming_normal_fanout", 1.0)):
        net = Hypernet(
            {"h": (inputs,)}, SHAPES, widths, init_distribution=distribution  # type: ignore[arg-type]
        )  # fmt: skip
        row = 0
        for name, shape in net.output_shapes.items():
            rows = math.prod(shape)
            std = net.output.weight[row : row + rows].std().item()
            expected = factor * math.sqrt(2 / rows)
            assert std == pytest.approx(expected, rel=0.35 if rows < 100 else 0.1), name
            row += rows
    whole = Hypernet(
        {"h": (inputs,)}, SHAPES, widths, output_split_init=False,
        init_distribution="kaiming_normal_fanout",
    )  # fmt: skip
    total = sum(math.prod(shape) for shape in SHAPES.values())
    assert whole.output.weight.std().item() == pytest.approx(1 / math.sqrt(total), rel=0.05)


@pytest.mark.parametrize(
    ("distribution", "std"),
    [
        ("kaiming_normal", math.sqrt(2 / 100)),
        ("kaiming_uniform", math.sqrt(2 / 100)),
        ("kaiming_normal_fanout", math.sqrt(2 / 400)),
        ("kaiming_uniform_fanout", math.sqrt(2 / 400)),
        ("glorot_normal", math.sqrt(2) * math.sqrt(2 / 500)),
        ("glorot_uniform", math.sqrt(2) * math.sqrt(2 / 500)),
        ("zeros", 0.0),
        (None, 1 / math.sqrt(300)),
    ],
)
def test_distributions_of_the_hidden_layers(distribution: Any, std: float) -> None:
    torch.manual_seed(0)
    net = Hypernet({"h": (50,)}, SHAPES, [400], init_distribution=distribution)
    weight = net.hidden[0].weight
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    if distribution and "uniform" in distribution:
        assert weight.abs().max().item() <= math.sqrt(3) * std * 1.001
    assert bool(net.hidden[0].bias.any()) == (distribution is None and net.init_bias is None)


def test_orthogonal_hidden_layers() -> None:
    net = Hypernet({"h": (5,)}, SHAPES, [40], init_distribution="orthogonal", dtype=torch.float64)
    weight = net.hidden[0].weight.detach()
    expected = 2 / (1 + 0.01**2) * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(weight.T @ weight, expected)


def test_a_network_learns_as_well_from_many_inputs_as_from_few() -> None:
    """One step of Adam moves the outputs alike, for 1 input and for 64."""
    moves = {}
    for inputs in (1, 64):
        torch.manual_seed(0)
        net = Hypernet({"h": (inputs,)}, SHAPES, [16, 64, 128])
        z = torch.rand(8, inputs)
        before = torch.cat([v.detach().flatten() for v in net(h=z).values()])
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        sum(v.square().sum() for v in net(h=z).values()).backward()  # type: ignore[union-attr]
        optimiser.step()
        after = torch.cat([v.detach().flatten() for v in net(h=z).values()])
        moves[inputs] = (after - before).norm().item()
    assert moves[64] == pytest.approx(moves[1], rel=0.5)


def test_the_hidden_network_takes_norms_dropout_and_activations() -> None:
    torch.manual_seed(0)
    net = Hypernet(
        {"h": (3,)}, SHAPES, [300, 200], norm=nn.LayerNorm, dropout_prob=0.25, nonlinearity="SiLU"
    )
    kinds = [type(module).__name__ for module in net.hidden]
    assert kinds == ["Linear", "LayerNorm", "SiLU", "Dropout"] * 2
    assert net.hidden[1].normalized_shape == (300,)
    assert net.hidden[5].normalized_shape == (200,)
    assert net.hidden[3].p == 0.25
    z = torch.rand(4, 3)
    assert not torch.equal(net(h=z)["0.bias"], net(h=z)["0.bias"])
    net.eval()
    assert torch.equal(net(h=z)["0.bias"], net(h=z)["0.bias"])
    # A normalised layer has the norm sqrt(width); what h emits starts as small as without one.
    plain = Hypernet({"h": (3,)}, SHAPES, [300, 200], nonlinearity="SiLU")
    normed = Hypernet({"h": (3,)}, SHAPES, [300, 200], nonlinearity="SiLU", norm=nn.LayerNorm)
    sizes = [
        (n(h=z)["1.weight"] - n.independent_weights()["1.weight"]).norm().item() / 2
        for n in (normed, Hypernet({"h": (3,)}, SHAPES, [300, 200]))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)
    assert plain.output.weight.std() > 5 * normed.output.weight.std()
    pickle.loads(pickle.dumps(net))
    net.reset_parameters()
    assert net.to(torch.float64)(h=z.double())["0.bias"].dtype == torch.float64


def test_fc_kws_is_the_same_as_the_options() -> None:
    torch.manual_seed(0)
    inner = Hypernet(
        {"h": (3,)}, SHAPES, [8],
        fc_kws={"dropout_prob": 0.5, "nonlinearity": "ReLU", "init_bias": 0.25, "out_bias": True,
                "init_distribution": "glorot_uniform"},
    )  # fmt: skip
    torch.manual_seed(0)
    outer = Hypernet(
        {"h": (3,)}, SHAPES, [8], dropout_prob=0.5, nonlinearity=nn.ReLU, init_bias=0.25,
        init_distribution="glorot_uniform",
    )  # fmt: skip
    assert repr(inner) == repr(outer)
    for name, value in inner.state_dict().items():
        assert torch.equal(value, outer.state_dict()[name])
    assert torch.equal(inner.hidden[0].bias, torch.full((8,), 0.25))


def test_independent_weights_are_drawn_or_constant() -> None:
    flat = Hypernet({"h": (1,)}, SHAPES, [2], init_independent_weights=False, init_bias=0.5)
    assert all(torch.equal(v, torch.full_like(v, 0.5)) for v in flat.independent_weights().values())
    torch.manual_seed(0)
    flat.init_independent_weights("kaiming_uniform", 0.25)
    fixed = flat.get_independent_weights()
    std = math.sqrt(2 / 72)
    assert fixed["1.weight"].std().item() == pytest.approx(std, rel=0.02)
    assert fixed["1.weight"].abs().max().item() <= math.sqrt(3) * std * 1.001
    assert torch.equal(fixed["0.bias"], torch.full((40,), 0.25))
    before = flat.output.weight.clone()
    flat.init_independent_weights("zeros")
    assert not flat.independent_weights()["1.weight"].any()
    assert torch.equal(flat.output.weight, before)
    with pytest.raises(ValueError, match="'normal' is unknown"):
        flat.init_independent_weights("normal")
    flat.freeze_independent_weights()
    assert flat.unfreeze_independent_weights() is flat
    assert all(p.requires_grad for p in flat.parameters())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"init_distribution": "normal"}, ValueError, "init_distribution='normal' is unknown"),
        ({"dropout_prob": 1.0}, ValueError, "dropout_prob=1.0 must be"),
        ({"dropout_prob": True}, TypeError, "dropout_prob must be a number, not True"),
        ({"init_bias": math.inf}, ValueError, "init_bias=inf"),
        ({"init_bias": "zero"}, ValueError, "init_bias='zero' must be a finite number, 'spread'"),
        ({"init_bias": True}, ValueError, "init_bias=True"),
        ({"output_split_init": 1}, TypeError, "output_split_init must be True or False"),
        ({"nonlinearity": "LeakyRelu"}, ValueError, "names no class of torch.nn"),
        ({"nonlinearity": nn.ReLU()}, TypeError, "makes a module"),
        ({"dropout": 0.1}, TypeError, "no option 'dropout'. Did you mean 'dropout_prob'"),
        ({"fc_kws": {"dropout": 0.1}}, ValueError, "no key 'dropout'. Did you mean"),
        ({"fc_kws": {"out_bias": False}}, ValueError, "leaves out the independent weights"),
        ({"fc_kws": {"init_bias": 1.0}, "init_bias": 0.0}, ValueError, "and in fc_kws"),
    ],
)
def test_options_that_cannot_be_honoured(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Hypernet({"h": (2,)}, SHAPES, [3], **options)


INTEGERS = [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3)]


@pytest.mark.parametrize("three", INTEGERS, ids=lambda value: str(getattr(value, "dtype", "")))
def test_sizes_take_integers_of_any_library(three: Any) -> None:
    assert ExternalParameter((three, 2)).shape == (3, 2)
    net = Hypernet({"h": (three,)}, {"w": (three, 2)}, [three])
    assert net.input_shapes == {"h": (3,)}
    assert net.hidden_sizes == (3,)
    assert all(type(side) is int for side in (*net.hidden_sizes, *net.output_shapes["w"]))
    assert net(h=torch.rand(3))["w"].shape == (3, 2)
    assert HyperLinear(three, three).external_shapes() == {"weight": (3, 3), "bias": (3,)}
    conv = HyperConv2d(
        three, 6, kernel_size=three, groups=three, stride=[three, 1], padding="valid"
    )
    assert conv.external_shapes() == {"weight": (6, 1, 3, 3), "bias": (6,)}
    assert type(conv.in_channels) is int


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (True, "must be an integer, not the boolean True"),
        (np.bool_(True), "must be an integer, not the boolean"),
        (torch.tensor(True), "must be an integer, not the boolean"),
        (3.0, "must be an integer, not the float 3.0"),
        (np.float32(3), "must be an integer, not the float32"),
        ("3", "must be an integer, not the str '3'"),
        (None, "must be an integer, not the NoneType None"),
    ],
)
def test_sizes_refuse_what_is_no_integer(bad: Any, words: str) -> None:
    for make in (
        lambda: ExternalParameter((bad, 2)),
        lambda: Hypernet({"h": (bad,)}, SHAPES, [3]),
        lambda: Hypernet({"h": (2,)}, {"w": (bad,)}, [3]),
        lambda: Hypernet({"h": (2,)}, SHAPES, [bad]),
        lambda: Hypernet({"h": (2,)}, SHAPES, layer_sizes=[bad]),
        lambda: HyperLinear(bad, 3),
        lambda: HyperLinear(3, out_features=bad),
        lambda: HyperConv2d(3, 3, (bad, 3)),
        lambda: HyperConv2d(3, 3, 3, stride=[1, bad]),
    ):
        with pytest.raises(TypeError, match=words):
            make()


def test_sizes_out_of_range() -> None:
    for make, words in (
        (lambda: ExternalParameter((-1,)), r"shape\[0\] is -1; it must be at least 0"),
        (lambda: Hypernet({"h": (0,)}, SHAPES, [3]), "inputs without elements"),
        (lambda: HyperConv2d(3, 3, 0), "kernel_size is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    for wrong in (3, "33"):
        with pytest.raises(TypeError, match="must be a tuple of integers"):
            ExternalParameter(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a list of integers"):
            Hypernet({"h": (2,)}, SHAPES, wrong)  # type: ignore[arg-type]


def test_a_subclass_of_a_hyper_layer_checks_too() -> None:
    class Mine(HyperLinear):
        """Its place in the class order must not matter."""

    with pytest.raises(TypeError, match="Mine: in_features must be an integer"):
        Mine(2.0, 3)


def test_from_existing_takes_the_names_of_hyperlight() -> None:
    weights: dict[str, Tensor] = {"w": torch.rand(2, 3)}
    net = Hypernet.from_existing(
        weights=weights, input_shapes=[("h", (2,))], hidden_sizes=[3],  # type: ignore[arg-type]
        fc_kws={"nonlinearity": "Tanh"},
    )  # fmt: skip
    assert torch.equal(net(h=torch.rand(2))["w"], weights["w"])


def test_the_bench_measures_norms_and_accuracies() -> None:
    """HyperLight's activations grow with the inputs, those of the default do not."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "scripts" / "bench" / "hypernet.py")]
    command += ["--seeds", "1", "--steps", "1", "--tasks", "1", "--draws", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    last_hidden = {(row[0], row[1]): float(row[5]) for row in rows if len(row) == 7 and row[1:2] and
                   row[1].isdigit()}  # fmt: skip
    assert last_hidden["original", "64"] > 4 * last_hidden["original", "1"]
    assert last_hidden["constant_norm", "64"] == pytest.approx(1, abs=0.3)
    trained = [row for row in rows if row[1:2] == ["16-64-128"]]
    assert len(trained) == 2
    # One step from existing weights: they classify upright digits, so far better than chance.
    accuracies = [float(cell.partition(" ± ")[0]) for cell in trained[1][3:]]
    original, ours, by_fan_in, beyond = accuracies
    assert all(20 < value < 100 for value in (original, ours, by_fan_in))
    assert beyond == pytest.approx(ours - original, abs=0.11)
