"""BatchNorms, and subclasses that do more: what is left of one when its normalisation is folded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.running.forward import evaluation_mode, forward_hooks

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def after_norm(module: nn.Module) -> nn.Module | None:
    """Return what a BatchNorm does after normalising, or None where it is no BatchNorm to fold.

    Of a subclass with its activation inside, as most of timm's networks have, these are the modules
    that it calls. Whether it is nothing but the normalisation and then those, a run decides.

    Returns:
        The identity, one of the module's children, or several of them in sequence.
    """
    if not isinstance(module, NORMS) or module.running_mean is None:
        return None
    if type(module) in NORMS:
        return nn.Identity()
    called: list[nn.Module] = []

    def record(child: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs, output
        if not isinstance(child, nn.Identity):
            called.append(child)

    x = _example(module)
    try:
        with (
            torch.no_grad(),
            evaluation_mode(module),
            forward_hooks(dict.fromkeys(module.children(), record)),
        ):
            expected = module(x.clone())
        rest = (
            called[0] if len(called) == 1 else nn.Sequential(*called) if called else nn.Identity()
        )
        with torch.no_grad(), evaluation_mode(rest):
            found = rest(_normalised(module, x))
    except KeyboardInterrupt:
        raise
    except BaseException:  # a forward of the user's may want anything else of its input
        return None
    same = isinstance(expected, Tensor) and found.shape == expected.shape
    return rest if same and torch.allclose(found, expected, rtol=1e-5, atol=1e-6) else None


def _example(norm: Norm) -> Tensor:
    """Numbers on both sides of every channel's mean ``[4, channels, ...]``."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    sides = (3,) * (NORMS.index(next(k for k in NORMS if isinstance(norm, k))) + 1)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, len(mean), *sides, generator=generator).to(mean)
    axes = (-1, *[1] * len(sides))
    return mean.view(axes) + 2 * variance.sqrt().view(axes) * numbers


def _normalised(norm: Norm, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )
