"""Initial weights of a hypernetwork: which distributions there are and what each is scaled by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Distribution = Literal[
    "constant_norm",
    "kaiming_normal_fanout",
    "kaiming_uniform_fanout",
    "kaiming_normal",
    "kaiming_uniform",
    "glorot_normal",
    "glorot_uniform",
    "orthogonal",
    "zeros",
]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
_ONES = ("gamma", "scale")
_ZEROS = ("bias", "beta", "shift")
# The names that calculate_gain knows beside the classes of torch.nn; for smooth rectifiers it knows
# none, and they are taken as leaky ones.
_GAINS = {"leakyrelu": "leaky_relu", "silu": "leaky_relu", "gelu": "leaky_relu"}
_KNOWN = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
# What "constant_norm" multiplies the last layer by. Without it the part that depends on the inputs
# starts with a norm of about one in every output, which is large beside biases and narrow layers.
# The value was chosen on training images held back: scripts/bench/hypernet.py --select.
EMITTED = 0.1


def check_distribution(what: str, distribution: str | None) -> None:
    """Raise ValueError for an unknown distribution; None, which draws nothing, is known."""
    if distribution is not None and distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{what}={distribution!r} is unknown; the distributions are "
            f"{', '.join(repr(d) for d in DISTRIBUTIONS)} and None."
        )


def gain_of(nonlinearity: nn.Module | str | None) -> float:
    """Return the factor that makes up for what a nonlinearity takes away.

    For nonlinearities that `torch.nn.init.calculate_gain` does not know, that of a leaky ReLU.

    Args:
        nonlinearity: A module, the name of its class, or None for none.
    """
    if nonlinearity is None:
        return 1.0
    slope = nonlinearity.negative_slope if isinstance(nonlinearity, nn.LeakyReLU) else None
    kind = nonlinearity if isinstance(nonlinearity, str) else type(nonlinearity).__name__
    name = _GAINS.get(kind.lower(), kind.lower())
    if name not in _KNOWN:
        name = "leaky_relu"
    # torch names the kinds it knows as literals; `name` is one of them.
    return float(nn.init.calculate_gain(name, slope))  # type: ignore[arg-type]


def fill(weight: Tensor, distribution: str | None, gain: float) -> None:
    """Draw a weight of at least two dimensions in place; None leaves it as it is.

    ``"constant_norm"`` is the Kaiming normal distribution by the fan-out, with which a layer's
    output has the norm of its input on average; `fill_keeping_norm` draws hidden layers.

    Raises:
        ValueError: An unknown distribution.
    """
    check_distribution("init_distribution", distribution)
    if distribution is None:
        return
    if distribution == "zeros":
        nn.init.zeros_(weight)
        return
    if distribution == "orthogonal":
        nn.init.orthogonal_(weight, gain)
        return
    field = math.prod(weight.shape[2:])
    fan_in, fan_out = max(weight.shape[1] * field, 1), max(weight.shape[0] * field, 1)
    fan: float = fan_in
    if distribution.startswith("glorot"):
        fan = (fan_in + fan_out) / 2
    elif distribution.endswith("fanout") or distribution == "constant_norm":
        fan = fan_out
    std = gain / math.sqrt(fan)
    with torch.no_grad():
        if "uniform" in distribution:
            weight.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)
        else:
            weight.normal_(0, std)


def fill_keeping_norm(weight: Tensor, gain: float, *, mirrored: bool) -> None:
    """Draw a hidden layer's weight ``[out, in]`` in place so that no input's norm changes.

    The columns are orthogonal. Mirrored, the second half of the rows is the first with the other
    sign. Of each pair a rectifier lets one pass, so that both together keep the norm of every
    input and not only the mean over random weights. Where the layer has fewer different rows than
    inputs, only the mean square is kept.

    Args:
        weight: The weight.
        gain: Of the nonlinearity that follows, as `gain_of`.
        mirrored: Whether rows come in pairs; see `is_odd` for where that makes sense.
    """
    width, inputs = weight.shape
    rows = -(-width // 2) if mirrored else width
    if weight.is_meta:
        return
    drawn = torch.empty(rows, inputs, dtype=torch.float32, device=weight.device)
    nn.init.orthogonal_(drawn, gain * math.sqrt(max(inputs / rows, 1.0) * rows / width))
    with torch.no_grad():
        weight.copy_(torch.cat([drawn, -drawn])[:width])


def spread_kinks(hidden: nn.Sequential, encoded: Tensor) -> None:
    """Draw the biases of hidden layers so that their units bend where inputs are.

    A rectifier's unit is linear but for one bend, where what enters it is zero. With a bias of zero
    that is a hyperplane through the origin, on one side of which all inputs may lie. Here each unit
    bends at an input that is drawn for it. Layers are scaled so that the norm of their activations
    stays what it was, in the mean over inputs.

    Args:
        hidden: Linear layers, each followed by its nonlinearity; dropout is passed over.
        encoded: Encoded inputs ``[samples, inputs]`` to draw from, of the layers' dtype.
    """
    layers = [layer for layer in hidden if not isinstance(layer, nn.Dropout)]
    for linear, bend in zip(layers[::2], layers[1::2], strict=True):
        assert isinstance(linear, nn.Linear)
        drawn = encoded[torch.randint(len(encoded), (linear.out_features,), device=encoded.device)]
        with torch.no_grad():
            before = bend(encoded @ linear.weight.T).norm(dim=1).mean()
            linear.bias.copy_(-(linear.weight * drawn).sum(1))
            after = bend(linear(encoded)).norm(dim=1).mean()
            factor = before / after.clamp_min(torch.finfo(after.dtype).tiny)
            linear.weight.mul_(factor)
            linear.bias.mul_(factor)
            encoded = bend(linear(encoded))


def is_odd(nonlinearity: nn.Module) -> bool:
    """Whether a nonlinearity mirrors a changed sign, up to a constant.

    Of a mirrored pair of rows, the second then says nothing that the first does not.
    """
    points = torch.linspace(0.1, 3.0, 16).unsqueeze(0)
    with torch.no_grad():
        both, zero = nonlinearity(points) + nonlinearity(-points), nonlinearity(0 * points)
    return torch.allclose(both, 2 * zero, atol=1e-6)


def independent_value(name: str, parameter: Tensor, distribution: str | None, bias: float) -> None:
    """Draw one of the weights that no input changes, in place, by its name and shape.

    One for entries called gamma or scale and one-dimensional weights (of normalisations), ``bias``
    for those called bias, zero for beta, shift and other entries of fewer than two dimensions,
    ``distribution`` by a leaky ReLU's gain for the rest.
    """
    leaf = name.rpartition(".")[2]
    if leaf in _ONES or (leaf == "weight" and parameter.dim() < 2):
        nn.init.ones_(parameter)
    elif leaf == "bias":
        nn.init.constant_(parameter, bias)
    elif leaf in _ZEROS or parameter.dim() < 2:
        nn.init.zeros_(parameter)
    else:
        plain = "kaiming_normal" if distribution == "constant_norm" else distribution
        fill(parameter, plain, gain_of("LeakyReLU"))


def encoding_norm(encoding: str | None, inputs: int) -> float:
    """Return the root mean square norm of encoded inputs that are uniform in [0, 1].

    For ``"cos|sin"`` it is the norm of every encoded input, sqrt(inputs).
    """
    squared = {"cos|sin": 1.0, "z|1-z": 2 / 3, None: 1 / 3}[encoding]
    return math.sqrt(inputs * squared)


def fill_by_output(
    weight: Tensor, shapes: Mapping[str, Sequence[int]], distribution: str | None, gain: float
) -> None:
    """Draw the last layer as one layer for each output, of which it holds the rows in turn."""
    row = 0
    for shape in shapes.values():
        rows = math.prod(shape)
        fill(weight[row : row + rows], distribution, gain)
        row += rows
