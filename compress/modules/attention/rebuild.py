"""What the unpacked modules are built with: linear layers around existing parameters."""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import UnsupportedLayer

_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build an `nn.Linear` around existing parameters.

    Args:
        weight: ``[out, in]``. A parameter is shared; of any other tensor a copy becomes one.
        bias: ``[out]``, likewise, or None.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone(), value.requires_grad)
        linear.register_parameter(name, value)
    return linear


def find_obstacle(module: nn.Module, linears: tuple[str, ...] = ()) -> str | None:
    """Return why a module of a known type cannot be rebuilt around its children, or None.

    Args:
        module: The module that would be replaced.
        linears: Its children whose weights it reads, which must be plain linear layers.
    """
    for name in ("", *linears):
        part = module.get_submodule(name)
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return f"hooks are attached to {name or 'it'}, which an equal would lose"
        if name and type(part) not in _LINEARS:
            return f"its {name} is a {type(part).__name__}, not a plain linear layer"
    return None


def require(module: nn.Module, obstacle: str | None) -> None:
    """Raise `UnsupportedLayer` where there is an obstacle."""
    if obstacle:
        raise UnsupportedLayer(f"{type(module).__name__} has no unpacked equal: {obstacle}")
