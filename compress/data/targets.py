"""What a dataset gives beside an image: class numbers, other numbers, masks, pictures, several.

Targets reach a loss or a metric of the user's own as they are. Only accuracy asks for class
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from compress.errors import one_line

UNLABELLED = -1


def as_target(given: Any) -> Any:
    """Return a target as a number, a tensor, or whatever else it is; -1 for none."""
    if given is None:
        return UNLABELLED
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(np.ascontiguousarray(given))
    if isinstance(given, np.generic):
        given = given.item()
    if isinstance(given, Tensor):
        whole = not given.is_floating_point() and given.numel() == 1
        return given.item() if given.dim() == 0 or whole else given
    if isinstance(given, str) and given.strip().lstrip("-").isdigit():
        return int(given)
    return int(given) if isinstance(given, bool) else given


def class_number(target: Any) -> int:
    """Return the class that a target names or marks (one-hot), -1 where it does neither."""
    if isinstance(target, Tensor) and target.dim() == 1 and len(target) > 1:
        marked = (target == 1).nonzero()
        only = len(marked) == 1 and int((target != 0).sum()) == 1
        return int(marked[0, 0]) if only else UNLABELLED
    if isinstance(target, int | float) and float(target).is_integer():
        return int(target)
    return UNLABELLED


def collated(targets: Sequence[Any]) -> Any:
    """Put the targets of a batch together: numbers as one tensor, tensors stacked, dicts by key.

    Raises:
        ValueError: They differ in shape or kind.
    """
    if all(isinstance(t, int) for t in targets):
        return torch.tensor(targets)
    if all(isinstance(t, int | float) for t in targets):
        return torch.tensor(targets, dtype=torch.float32)
    try:
        return default_collate(list(targets))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(one_line(error)) from error


def joined(first: Any, second: Any) -> Any:
    """Return two batches' targets as those of one batch; None for none."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: joined(value, second[key]) for key, value in first.items()}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*[joined(a, b) for a, b in zip(first, second, strict=True)])
    if isinstance(first, list | tuple) and any(isinstance(part, str) for part in first):
        return [*first, *second]  # one text an image
    return type(first)(joined(a, b) for a, b in zip(first, second, strict=True))


def part(targets: Any, start: int, end: int | None) -> Any:
    """Return the targets of some images of a batch; None for none."""
    if targets is None:
        return None
    if isinstance(targets, Tensor):
        return targets[start:end]
    if isinstance(targets, Mapping):
        return {key: part(value, start, end) for key, value in targets.items()}
    if isinstance(targets, tuple) and hasattr(targets, "_fields"):
        return type(targets)(*[part(value, start, end) for value in targets])
    if isinstance(targets, list | tuple) and any(isinstance(value, str) for value in targets):
        return targets[start:end]
    return type(targets)(part(value, start, end) for value in targets)


def size(target: Any) -> int:
    """Return the bytes that a target takes, about."""
    if isinstance(target, Tensor):
        return target.numel() * target.element_size()
    if isinstance(target, Mapping):
        return sum(map(size, target.values()))
    return sum(map(size, target)) if isinstance(target, list | tuple) else 32


def content(target: Any) -> bytes:
    """Return bytes that change when the target does."""
    if isinstance(target, Tensor):
        head = f"{target.dtype} {tuple(target.shape)}:".encode()
        return head + target.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(target, Mapping):
        return b"".join(f"{key}=".encode() + content(value) for key, value in target.items())
    if isinstance(target, list | tuple):
        return b",".join(map(content, target))
    return str(target).encode()
