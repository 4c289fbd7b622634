"""The hypernetwork: additive outputs around weights that no input changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from compress.modules.hypernet.encoding import Encoding, check_encoding, encode
from compress.modules.hypernet.initialization import (
    EMITTED,
    check_distribution,
    encoding_norm,
    fill,
    fill_by_output,
    fill_keeping_norm,
    gain_of,
    independent_value,
    is_odd,
    spread_kinks,
)
from compress.modules.hypernet.options import (
    HypernetOptions,
    hidden_sizes_of,
    perceptron,
    settings_of,
)
from compress.modules.hypernet.sizes import shape as checked_shape

Shapes = Mapping[str, Sequence[int]]
# Among how many inputs those are drawn at which units bend.
INPUTS_DRAWN = 256


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
        **options: Keyword arguments, as follows.
        layer_sizes: The same argument as ``hidden_sizes``.
        nonlinearity: Makes the module between two layers, or names its class in ``torch.nn``.
        norm: Makes a normalisation of a given width, as ``nn.LayerNorm``, for every hidden layer,
            before its nonlinearity. None has none.
        dropout_prob: Probability of dropout after every hidden layer.
        init_distribution: Of the weights of h. ``"constant_norm"``, the default, keeps the norm of
            the activations at one from the first hidden layer to the last, whatever the number of
            inputs and the widths: weights are orthogonal and, before nonlinearities that are not
            odd, their rows come in pairs of opposite sign, which keep the norm of every input
            where ``init_bias`` is zero, and else in the mean.
            What h emits from them is multiplied by 0.1.
            ``"kaiming_normal_fanout"`` is HyperLight's, with which activations have the norm of
            the encoding, the square root of the number of inputs. Also
            ``"kaiming_normal"`` (by the fan-in), ``"kaiming_uniform"``,
            ``"kaiming_uniform_fanout"``, ``"glorot_normal"``, ``"glorot_uniform"``,
            ``"orthogonal"``, ``"zeros"``, and None for what ``nn.Linear`` does.
        init_bias: First value of the biases of h's hidden layers; None for what ``nn.Linear`` does.
            ``"spread"``, the default, is zero but with ``"constant_norm"`` for a single number as
            input, before nonlinearities that are not odd and without ``norm``: each unit then bends
            at an input drawn from [0, 1], and norms are one in the mean over inputs.
        init_independent_weights: Whether θ₀ starts as described above, or as ``init_bias``.
        output_split_init: Whether the last layer of h starts as a layer for each output, or as a
            single one, whose weights are smaller the more it emits.
        fc_kws: HyperLight's way to pass ``nonlinearity``, ``dropout_prob``, ``init_distribution``
            and ``init_bias`` (and ``norm``).
        device: Where the parameters are.
        dtype: Their dtype.

    Shape:
        Each input ``[*shape]`` or ``[B, *shape]``; each output ``[*shape]`` for one input or a
        batch of one, else ``[B, *shape]``. `per_sample` runs a network with the latter.

    Raises:
        TypeError: Sizes that are not integers, an unknown option, an option of the wrong type.
        ValueError: No outputs or inputs, sizes below 1, both or neither of the size arguments, an
            option out of range.

    References:
        Gonzalez Ortiz, Guttag, Dalca, arXiv 2304.07645.
    """

    def __init__(
        self,
        input_shapes: Shapes,
        output_shapes: Shapes,
        hidden_sizes: Sequence[int] | None = None,
        encoding: Encoding = "cos|sin",
        **options: Unpack[HypernetOptions],
    ) -> None:
        super().__init__()
        check_encoding(encoding)
        settings = settings_of(options)
        self.input_shapes = _sorted_shapes("input_shapes", input_shapes)
        self.output_shapes = _sorted_shapes("output_shapes", output_shapes)
        self.hidden_sizes = hidden_sizes_of(hidden_sizes, settings.layer_sizes)
        self.encoding: Encoding = encoding
        self.init_distribution = settings.init_distribution
        self.init_bias = settings.init_bias
        self.output_split_init = settings.output_split_init
        self._has_norm = settings.norm is not None
        activation = settings.activation()
        self._gain, self._mirrored = gain_of(activation), not is_odd(activation)
        where: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
        self.independent = nn.ParameterList(
            nn.Parameter(torch.empty(shape, **where)) for shape in self.output_shapes.values()
        )
        self._inputs = sum(math.prod(shape) for shape in self.input_shapes.values())
        if self._inputs == 0:
            raise ValueError("Hypernet has inputs without elements; it needs at least one element.")
        size = self._inputs * (1 if encoding is None else 2)
        self.hidden = perceptron(size, self.hidden_sizes, settings)
        total = sum(math.prod(shape) for shape in self.output_shapes.values())
        # θ₀ is its bias.
        self.output = nn.Linear([size, *self.hidden_sizes][-1], total, bias=False, **where)
        self._starts_independent = settings.init_independent_weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights for θ₀ and h, by the options that this was made with."""
        distribution = self.init_distribution
        linear = [layer for layer in self.hidden if isinstance(layer, nn.Linear)]
        for layer in self.hidden:
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
        for layer in linear:
            self._draw_hidden(layer)
        if distribution is None:
            self.output.reset_parameters()
        elif self.output_split_init:
            fill_by_output(self.output.weight, self.output_shapes, distribution, self._gain)
        else:
            fill(self.output.weight, distribution, 1.0)
        if distribution == "constant_norm":
            self._bring_norms_to_one([*linear, self.output])
            if self._spreads:
                self._spread_kinks()
        if self._starts_independent:
            self.init_independent_weights()
        else:
            for parameter in self.independent:
                nn.init.constant_(parameter, self._constant_bias or 0.0)

    @property
    def _constant_bias(self) -> float | None:
        """The first value of biases that are not drawn; None for what ``nn.Linear`` does."""
        return 0.0 if self.init_bias == "spread" else self.init_bias

    def _draw_hidden(self, layer: nn.Linear) -> None:
        if self.init_distribution == "constant_norm":
            fill_keeping_norm(layer.weight, self._gain, mirrored=self._mirrored)
        else:
            fill(layer.weight, self.init_distribution, self._gain)
        if self._constant_bias is not None:
            nn.init.constant_(layer.bias, self._constant_bias)

    @property
    def _spreads(self) -> bool:
        """Whether `_spread_kinks` is for this network.

        It is for a single input only: several lie in all directions, and units whose biases are
        zero bend among them anyway.
        """
        wanted = self.init_bias == "spread" and not self.output.weight.is_meta
        return wanted and self._inputs == 1 and self._mirrored and not self._has_norm

    def _spread_kinks(self) -> None:
        """Draw biases by inputs that are uniform in [0, 1], which is what encodings are for."""
        like = self.output.weight
        drawn = torch.rand(INPUTS_DRAWN, self._inputs, device=like.device, dtype=like.dtype)
        spread_kinks(self.hidden, encode(drawn, self.encoding))

    def _bring_norms_to_one(self, layers: list[nn.Linear]) -> None:
        """Divide the first layer by the norm of what enters, which the others then keep.

        After normalisation layers, the last layer by that of theirs: a normalised activation has
        the norm sqrt(width), and its nonlinearity takes away the gain.
        """
        with torch.no_grad():
            layers[0].weight.div_(encoding_norm(self.encoding, self._inputs))
            self.output.weight.mul_(EMITTED)
            if self._has_norm and self.hidden_sizes:
                self.output.weight.div_(math.sqrt(self.hidden_sizes[-1]) / self._gain)

    def init_independent_weights(
        self,
        init_distribution: str | None = "kaiming_normal",
        init_bias: float = 0.0,
    ) -> None:
        """Draw new weights only for θ₀.

        Args:
            init_distribution: Of the entries that are neither zero nor one at first.
            init_bias: First value of the entries called bias.

        Raises:
            ValueError: An unknown distribution.
        """
        check_distribution("init_distribution", init_distribution)
        for name, parameter in zip(self.output_shapes, self.independent, strict=True):
            independent_value(name, parameter, init_distribution, init_bias)

    @classmethod
    def from_existing(
        cls,
        weights: Mapping[str, Tensor],
        input_shapes: Shapes,
        hidden_sizes: Sequence[int] | None = None,
        encoding: Encoding = "cos|sin",
        *,
        output_shapes: Shapes | None = None,
        **options: Unpack[HypernetOptions],
    ) -> Self:
        """Return a hypernetwork that emits exactly ``weights`` at first, whatever its inputs.

        θ₀ is ``weights``, each in its own dtype, and the last layer of h is zero; it learns from
        the first step on, because its gradient is not.

        Args:
            weights: By name, as `hypernetize` returns them.
            input_shapes: As for `Hypernet`.
            hidden_sizes: As for `Hypernet`.
            encoding: As for `Hypernet`.
            output_shapes: Checked against ``weights`` where given.
            **options: Further options of `Hypernet`; dtype and device are those of the first
                weight where not given.

        Raises:
            ValueError: ``output_shapes`` that are not those of ``weights``.
        """
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if output_shapes is not None:
            given = _sorted_shapes("output_shapes", output_shapes)
            _check_names(cls.__name__, "output", given, shapes)
            for name, shape in given.items():
                if shape != shapes[name]:
                    raise ValueError(
                        f"{cls.__name__}: the output {name!r} has shape {shapes[name]} in the "
                        f"values and {shape} in output_shapes."
                    )
        for value in weights.values():
            options.setdefault("device", value.device)
            options.setdefault("dtype", value.dtype)
            break
        hypernet = cls(input_shapes, shapes, hidden_sizes, encoding, **options)
        nn.init.zeros_(hypernet.output.weight)
        for index, name in enumerate(hypernet.output_shapes):
            device = hypernet.output.weight.device
            hypernet.independent[index] = nn.Parameter(weights[name].detach().to(device).clone())
        return hypernet

    def independent_weights(self) -> dict[str, Tensor]:
        """Return θ₀ by name, detached."""
        pairs = zip(self.output_shapes, self.independent, strict=True)
        return {name: parameter.detach() for name, parameter in pairs}

    def get_independent_weights(self) -> dict[str, Tensor]:
        """Return θ₀ by name, detached; the same as `independent_weights`."""
        return self.independent_weights()

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

    def unfreeze_independent_weights(self) -> Self:
        """Let θ₀ learn again, and return self."""
        return self.freeze_independent_weights(frozen=False)

    def forward(
        self, inputs: Mapping[str, Tensor] | Tensor | None = None, /, **named: Tensor
    ) -> dict[str, Tensor]:
        """Emit the outputs for inputs given by name, or as one dict.

        Raises:
            TypeError: An input without its name.
            ValueError: Missing or unexpected inputs, other shapes or batch sizes.
        """
        if isinstance(inputs, Tensor):
            first = next(iter(self.input_shapes), "h")
            raise TypeError(
                f"{type(self).__name__} takes its inputs by name, such as {first}=..., or as a "
                "dict, not as a tensor alone."
            )
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
    # A list of pairs will do for a dict.
    named = dict(shapes)
    if not named:
        raise ValueError(f"Hypernet has empty {what}; name at least one shape.")
    return {name: checked_shape(f"{what}[{name!r}]", named[name]) for name in sorted(named)}


def _check_names(kind: str, what: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    if missing or unexpected:
        parts = [f"missing {what}s: {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {what}s: {', '.join(map(str, unexpected))}"] if unexpected else []
        raise ValueError(f"{kind} has {'; '.join(parts)}.")
