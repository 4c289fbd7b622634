"""Finding the layers of a model: what each is, how often it runs, why it is kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from compress.layers import kind_of, registered
from compress.linalg.geometry import Geometry, Sizes
from compress.linalg.schemes import SCHEMES
from compress.running.forward import evaluation_mode, forward_hooks, run_model
from compress.running.modules import is_hooked, module_names
from compress.running.structure import count

# What errors in outputs cost is a matrix of their number squared: of more outputs it would take
# more than half a gigabyte a layer, its roots as much each, and minutes to find them.
MOST_OUTPUTS = 8192


@dataclass(frozen=True)
class Call:
    """One use of a layer in a forward pass over one image.

    Attributes:
        size: Height and width of its input, in three dimensions the depth before them.
        repeats: How many such inputs an image gives (windows, tokens folded into the batch).
    """

    size: Sizes
    repeats: Fraction


@dataclass(frozen=True)
class LayerSite:
    """One layer of the model.

    Attributes:
        name: Its first qualified name; ``""`` where the model itself is the layer.
        aliases: All its names; more than one where a module is shared.
        kind: Name of its type.
        geometry: Its geometry.
        biased: Whether it has a bias.
        calls: Its uses in one forward pass, in order.
        skip: Why it is kept whatever the rule; None where it may be rewritten.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    geometry: Geometry
    biased: bool
    calls: tuple[Call, ...]
    skip: str | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, over all calls."""
        return self.count_macs(lambda call: self.geometry.macs(call.size))

    def count_macs(self, per_call: Callable[[Call], int]) -> int:
        """Sum a per-call count over the calls of one image."""
        return int(sum((c.repeats * per_call(c) for c in self.calls), Fraction(0)))

    @property
    def params(self) -> int:
        """Number of parameters, bias included."""
        return self.geometry.weight_numel + (self.geometry.out_channels if self.biased else 0)

    @property
    def positions(self) -> int:
        """Output positions per image, over all calls."""
        return self.count_macs(lambda call: math.prod(self.geometry.output_size(call.size)))

    def input_shape(self, call: Call, batch: int) -> tuple[int, ...]:
        """The shape of the layer's input at one of its calls, for a batch of images."""
        images, channels = int(batch * call.repeats), self.geometry.in_channels
        if self.geometry.kind == "linear":
            positions = call.size[0]
            return (images, positions, channels) if positions > 1 else (images, channels)
        one = self.geometry.kind.endswith("1d")
        return (images, channels, *(call.size[1:] if one else call.size))

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that can stand for it."""
        if self.skip is not None:
            return ()
        return tuple(s.name for s in SCHEMES if s.unavailable(self.geometry) is None)

    @property
    def shape(self) -> str:
        """A short description, such as ``64→128 3x3 s2 g4``."""
        g = self.geometry
        text = f"{g.in_channels}→{g.out_channels}"
        if g.kind != "linear":
            text += f" {'x'.join(map(str, g.kernel_size))}"
        if any(step != 1 for step in g.stride):
            same = len(set(g.stride)) == 1 or g.kind.endswith("1d")
            text += f" s{g.stride[-1] if same else 'x'.join(map(str, g.stride))}"
        if g.groups > 1:
            text += f" g{g.groups}"
        return text


def find_sites(
    model: nn.Module, example: Any, keep: Callable[[nn.Module], str | None] = lambda _: None
) -> tuple[LayerSite, ...]:
    """Find every layer with a weight matrix, in order of execution.

    Args:
        model: The network; it is left as it was.
        example: One input with the batch axis, ``[1, ...]``.
        keep: Further reasons to keep a module, by module.

    Returns:
        One site per module of a registered kind (or a subclass of one), shared modules once.

    Raises:
        ModelError: The model does not run on the example.
    """
    names = module_names(model)
    types = tuple(kind.module_type for kind in registered())
    layers = [module for module in names if isinstance(module, types)]
    calls: dict[nn.Module, list[Call]] = {}
    transformed: dict[nn.Module, str] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind = kind_of(module)
        seen = calls.setdefault(module, [])
        if is_functorch_wrapped_tensor(output):
            transformed[module] = "it runs within torch.vmap or torch.func"
        elif kind is not None:
            images = kind.images(inputs[0])
            repeats = Fraction(images.shape[0], count(example))
            seen.append(Call(tuple(images.shape[2:]), repeats))

    with evaluation_mode(model), torch.no_grad(), forward_hooks(dict.fromkeys(layers, record)):
        run_model(model, example)
    reasons = {**_tied(model), **transformed}
    ordered = list(calls) + [m for m in layers if m not in calls]
    return tuple(
        _site(module, names[module], calls.get(module), keep(module) or reasons.get(module))
        for module in ordered
    )


def _tied(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose weight is another module's too, with the reason to keep them."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[weight.data_ptr() if weight.numel() else id(weight)].append((module, name))
    reasons = {}
    for group in owners.values():
        for module, _ in group if len(group) > 1 else ():
            others = ", ".join(n for m, n in group if m is not module)
            reasons[module] = f"its weight is tied to {others}, which rewriting would untie"
    return reasons


def _site(
    module: nn.Module, names: tuple[str, ...], calls: list[Call] | None, reason: str | None
) -> LayerSite:
    kind = kind_of(module)
    base = next(k for k in registered() if isinstance(module, k.module_type))
    geometry = (kind or base).geometry(module)
    skip = reason
    if kind is None:
        general = f"a subclass of {base.name} ({type(module).__name__}) may compute something else"
        skip = reason or general
    elif calls is None:
        skip = skip or "never called in a forward pass (its parent may read its weight directly)"
    elif is_hooked(module):
        skip = skip or "it carries forward hooks, which a rewrite would lose"
    else:
        skip = skip or kind.unsupported(module)
        weight = module._parameters.get("weight")
        if weight is None:
            skip = skip or "its weight is no parameter of its own"
        elif weight.is_complex():
            skip = skip or "its weights are complex numbers"
        if not any(call.repeats for call in calls):
            skip = skip or "nothing reached it on the first image"
        if geometry.out_features > MOST_OUTPUTS:
            skip = skip or (
                f"its {geometry.out_features:,} outputs are more than {MOST_OUTPUTS:,}, too many "
                "to tell what an error in each costs"
            )
    return LayerSite(
        name=names[0],
        aliases=names,
        kind=type(module).__name__,
        geometry=geometry,
        biased=getattr(module, "bias", None) is not None,
        calls=tuple(calls or ()),
        skip=skip,
    )
