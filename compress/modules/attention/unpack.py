"""Putting the unpacked modules in place of those that read their children's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from compress.errors import ModelError, UnsupportedLayer, near_matches
from compress.modules.attention.encoder import (
    UnpackedEncoder,
    UnpackedEncoderLayer,
    encoder_layer_obstacle,
    encoder_obstacle,
)
from compress.modules.attention.multihead import UnpackedAttention, attention_obstacle
from compress.modules.attention.window import (
    SWIN,
    UnpackedWindowAttention,
    swin_name,
    window_obstacle,
)

_SWIN_VIDEO = "torchvision.models.video.swin_transformer"
_OBSTACLES = (attention_obstacle, window_obstacle, encoder_layer_obstacle, encoder_obstacle)


def attention_names(model: nn.Module) -> tuple[str, ...]:
    """Name the modules that `unpack` would replace, outermost only, in the order of the tree.

    Subclasses of the known types may compute something else, and modules with hooks would lose
    them: such a module is left alone with all that is in it. A module that stands in several places
    is named once. The root's name is the empty string.
    """
    left_alone = {
        inside
        for module in model.modules()
        if _is_left_alone(module)
        for inside in module.modules()
    }
    return tuple(name for name, module in _outermost("", model, set()) if module not in left_alone)


def unpack(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replace the named modules by their unpacked equals, wherever else they stand as well.

    The model is changed in place; its parameters stay the same objects, apart from biases that are
    split. Repeating this with the same names on a freshly built model gives the same state names.

    Returns:
        The model, or its equal where the root itself is named.

    Raises:
        ModelError: A name that the model does not have, or a module with no known equal.
    """
    for name in names:
        known = dict(model.named_modules())
        if name not in known:
            raise ModelError(
                f"The model has no module {name!r} whose attention could be unpacked; is it the "
                f"model that the names came from?{near_matches(name, known)}"
            )
        module = known[name]
        try:
            new = _unpacked(module, _parent(model, name))
        except UnsupportedLayer as reason:
            raise ModelError(f"The attention of {name!r} cannot be unpacked: {reason}") from reason
        for parent in list(model.modules()):
            for child, old in parent._modules.items():
                if old is module:
                    parent._modules[child] = new
        model = new if module is model else model
    return model


def reads_child_weights(parent: nn.Module) -> tuple[str, ...]:
    """Name the linear layers below ``parent`` whose weights it reads instead of calling them.

    Subclasses count, since most inherit ``forward``. Names are relative to ``parent``.
    """
    layer = ("self_attn.out_proj", "linear1", "linear2")
    if isinstance(parent, nn.MultiheadAttention):
        return ("out_proj",)
    if isinstance(parent, nn.TransformerEncoderLayer):
        return layer
    if isinstance(parent, nn.TransformerEncoder) and getattr(parent, "use_nested_tensor", False):
        return tuple(f"layers.0.{name}" for name in layer)
    modules = {base.__module__ for base in type(parent).__mro__}
    if modules & {SWIN, _SWIN_VIDEO} and {"qkv", "proj"} <= parent._modules.keys():
        return ("qkv", "proj")
    return ()


def _is_left_alone(module: nn.Module) -> bool:
    """Whether ``module`` reads its children's weights and has no unpacked equal."""
    return bool(reads_child_weights(module)) and all(o(module) for o in _OBSTACLES)


def _outermost(
    name: str, module: nn.Module, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that read their children's weights."""
    if module in seen:
        return
    seen.add(module)
    if reads_child_weights(module):
        yield name, module
        return
    for child, inside in module.named_children():
        yield from _outermost(f"{name}.{child}" if name else child, inside, seen)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    above, _, child = name.rpartition(".")
    return model.get_submodule(above), child


def _unpacked(module: nn.Module, place: tuple[nn.Module, str]) -> nn.Module:
    if swin_name(module):
        return UnpackedWindowAttention.from_module(module)
    if isinstance(module, nn.TransformerEncoderLayer):
        return UnpackedEncoderLayer.from_module(module)
    if isinstance(module, nn.TransformerEncoder):
        return UnpackedEncoder.from_module(module)
    parent, child = place
    crossing = isinstance(parent, nn.TransformerDecoderLayer) and child == "multihead_attn"
    return UnpackedAttention.from_module(module, packed=not crossing)
