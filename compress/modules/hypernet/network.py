"""The hypernetwork: additive outputs around weights that no input changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.modules.hypernet.encoding import Encoding, check_encoding, encode

Shapes = Mapping[str, Sequence[int]]
_ONES = ("gamma", "scale")
_ZEROS = ("bias", "beta", "shift")


class Hypernet(nn.Module):
    """A network that emits the values of another's external parameters.

    The outputs are ``θ = θ₀ + h(E(γ))``: a perceptron ``h`` of the encoded inputs added to weights
    ``θ₀`` that do not depend on them, so that the outputs are not proportional to the inputs'
    size. θ₀ starts as the weights of an ordinary network would: one for entries called gamma or
    scale and one-dimensional weights (of normalisations), zero for those called bias, beta or
    shift and other one-dimensional ones, Kaiming normal for the rest.

    Inputs and outputs are laid out in the order of their names, whatever the order of the dicts.

    Args:
        input_shapes: Shape of each input, by name.
        output_shapes: Shape of each output, by name, as `HyperModule.external_shapes` gives.
        hidden_sizes: Widths of the hidden layers; may be empty.
        encoding: Of the inputs, see `encode`.
        layer_sizes: The same argument as ``hidden_sizes``.
        nonlinearity: Makes the module between two layers.
        device: Where the parameters are.
        dtype: Their dtype.

    Shape:
        Each input ``[*shape]`` or ``[B, *shape]``; each output ``[*shape]`` for one input or a
        batch of one, else ``[B, *shape]``.

    Raises:
        ValueError: No outputs or inputs, sizes below 1, both or neither of the size arguments.

    References:
        Gonzalez Ortiz, Guttag, Dalca, arXiv 2304.07645.
    """

    def __init__(
        self,
        input_shapes: Shapes,
        output_shapes: Shapes,
        hidden_sizes: Sequence[int] | None = None,
        encoding: Encoding = "cos|sin",
        *,
        layer_sizes: Sequence[int] | None = None,
        nonlinearity: Callable[[], nn.Module] = nn.LeakyReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_encoding(encoding)
        self.input_shapes = _sorted_shapes("input_shapes", input_shapes)
        self.output_shapes = _sorted_shapes("output_shapes", output_shapes)
        self.hidden_sizes = _sizes(hidden_sizes, layer_sizes)
        self.encoding: Encoding = encoding
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.independent = nn.ParameterList(
            nn.Parameter(torch.empty(shape, **where)) for shape in self.output_shapes.values()
        )
        size = sum(math.prod(shape) for shape in self.input_shapes.values())
        size *= 1 if encoding is None else 2
        layers: list[nn.Module] = []
        for hidden in self.hidden_sizes:
            layers += [nn.Linear(size, hidden, **where), nonlinearity()]
            size = hidden
        self.hidden = nn.Sequential(*layers)
        total = sum(math.prod(shape) for shape in self.output_shapes.values())
        # θ₀ is its bias.
        self.output = nn.Linear(size, total, bias=False, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights for θ₀ and h; h's last layer by its fan-out, so that it starts small."""
        for layer in self.hidden.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="leaky_relu")
                nn.init.zeros_(layer.bias)
        nn.init.kaiming_normal_(self.output.weight, mode="fan_out", nonlinearity="linear")
        for name, parameter in zip(self.output_shapes, self.independent, strict=True):
            leaf = name.rpartition(".")[2]
            if leaf in _ONES or (leaf == "weight" and parameter.dim() < 2):
                nn.init.ones_(parameter)
            elif leaf in _ZEROS or parameter.dim() < 2:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="leaky_relu")

    @classmethod
    def from_existing(
        cls,
        values: Mapping[str, Tensor],
        input_shapes: Shapes,
        hidden_sizes: Sequence[int] | None = None,
        encoding: Encoding = "cos|sin",
        *,
        output_shapes: Shapes | None = None,
        **options: Any,
    ) -> Self:
        """Return a hypernetwork that emits exactly ``values`` at first, whatever its inputs.

        θ₀ is ``values``, each in its own dtype, and the last layer of h is zero; it learns from
        the first step on, because its gradient is not.

        Args:
            values: By name, as `hypernetize` returns them.
            input_shapes: As for `Hypernet`.
            hidden_sizes: As for `Hypernet`.
            encoding: As for `Hypernet`.
            output_shapes: Checked against ``values`` where given.
            **options: Further options of `Hypernet`; dtype and device are those of the first
                value where not given.

        Raises:
            ValueError: ``output_shapes`` that are not those of ``values``.
        """
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if output_shapes is not None:
            given = _sorted_shapes("output_shapes", output_shapes)
            _check_names(cls.__name__, "output", given, shapes)
            for name, shape in given.items():
                if shape != shapes[name]:
                    raise ValueError(
                        f"{cls.__name__}: the output {name!r} has shape {shapes[name]} in the "
                        f"values and {shape} in output_shapes."
                    )
        for value in values.values():
            options = {"device": value.device, "dtype": value.dtype, **options}
            break
        hypernet = cls(input_shapes, shapes, hidden_sizes, encoding, **options)
        nn.init.zeros_(hypernet.output.weight)
        for index, name in enumerate(hypernet.output_shapes):
            device = hypernet.output.weight.device
            hypernet.independent[index] = nn.Parameter(values[name].detach().to(device).clone())
        return hypernet

    def independent_weights(self) -> dict[str, Tensor]:
        """Return θ₀ by name, detached."""
        pairs = zip(self.output_shapes, self.independent, strict=True)
        return {name: parameter.detach() for name, parameter in pairs}

    def set_independent_weights(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into θ₀.

        Raises:
            ValueError: Missing or unexpected names, other shapes; nothing is copied.
        """
        _check_names(type(self).__name__, "output", self.output_shapes, values)
        for name, shape in self.output_shapes.items():
            if tuple(values[name].shape) != shape:
                raise ValueError(
                    f"{type(self).__name__}: the output {name!r} has shape {shape}; it got "
                    f"{tuple(values[name].shape)}."
                )
        with torch.no_grad():
            for name, parameter in zip(self.output_shapes, self.independent, strict=True):
                parameter.copy_(values[name])

    def freeze_independent_weights(self, frozen: bool = True) -> Self:
        """Stop θ₀ from learning (or let it again), and return self."""
        for parameter in self.independent:
            parameter.requires_grad_(not frozen)
        return self

    def forward(
        self, inputs: Mapping[str, Tensor] | None = None, /, **named: Tensor
    ) -> dict[str, Tensor]:
        """Emit the outputs for inputs given by name, or as one dict.

        Raises:
            ValueError: Missing or unexpected inputs, other shapes or batch sizes.
        """
        batch = self._batched({**(inputs or {}), **named})
        hidden = self.hidden(encode(batch, self.encoding))
        sizes = [math.prod(shape) for shape in self.output_shapes.values()]
        pieces = self.output(hidden).split(sizes, dim=-1)
        outputs = {}
        for (name, shape), piece, fixed in zip(
            self.output_shapes.items(), pieces, self.independent, strict=True
        ):
            full = shape if batch.shape[0] == 1 else (batch.shape[0], *shape)
            outputs[name] = fixed + piece.reshape(full).to(fixed.dtype)
        return outputs

    def _batched(self, given: dict[str, Tensor]) -> Tensor:
        """All inputs as one ``[B, n]``, in the order of their names."""
        kind = type(self).__name__
        _check_names(kind, "input", self.input_shapes, given)
        rows = []
        for name, shape in self.input_shapes.items():
            value = given[name]
            if tuple(value.shape) == shape:
                rows.append(value.reshape(1, -1))
            elif tuple(value.shape[1:]) == shape and value.dim() == len(shape) + 1:
                rows.append(value.reshape(value.shape[0], math.prod(shape)))
            else:
                raise ValueError(
                    f"{kind}: the input {name!r} has shape {shape} or {('B', *shape)}; it got "
                    f"{tuple(value.shape)}."
                )
        sizes = {name: row.shape[0] for name, row in zip(self.input_shapes, rows, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{kind}: the inputs have different batch sizes: {sizes}.")
        return torch.cat(rows, dim=-1)

    def extra_repr(self) -> str:
        """Show the inputs, the number of outputs and the encoding."""
        total = self.output.out_features
        return (
            f"inputs={self.input_shapes}, outputs={len(self.output_shapes)} ({total} values), "
            f"encoding={self.encoding!r}"
        )


HyperNet = Hypernet


def _sorted_shapes(what: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    if not shapes:
        raise ValueError(f"Hypernet has empty {what}; name at least one shape.")
    return {name: tuple(int(side) for side in shapes[name]) for name in sorted(shapes)}


def _sizes(hidden: Sequence[int] | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    if (hidden is None) == (layers is None):
        given = "both" if hidden is not None else "neither"
        raise ValueError(
            f"Hypernet takes hidden_sizes or layer_sizes, which are the same; it got {given}."
        )
    sizes = tuple(hidden if hidden is not None else layers or ())
    if any(size < 1 for size in sizes):
        raise ValueError(f"Hypernet has hidden sizes {list(sizes)}; they must be at least 1.")
    return sizes


def _check_names(kind: str, what: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        parts = [f"missing {what}s: {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {what}s: {', '.join(map(str, unexpected))}"] if unexpected else []
        raise ValueError(f"{kind} has {'; '.join(parts)}.")
