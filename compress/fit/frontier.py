"""What each batch still needs on its way through both networks: in memory, beyond a cap on disk.

Values are put away one by one, so that what a later node reads (the skip connections of a U-Net)
stays where it is while the walk goes on with the rest: put away by the batch, all of it would be
written and read again for every layer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtefactError
from compress.running.structure import mapped, size, tensors


@dataclass
class Pair:
    """One value in the dense and in the compressed network; one object while they agree."""

    dense: Any
    compressed: Any

    @property
    def same(self) -> bool:
        """Whether nothing before this value was replaced."""
        return self.dense is self.compressed


Environment = dict[str, Pair]


@dataclass
class _Unit:
    """Values that share memory, and therefore move together: in memory, or in a file."""

    names: frozenset[str]
    size: int
    values: Environment = field(default_factory=dict)
    file: Path | None = None

    def look(self) -> Environment:
        if self.file is None:
            return self.values
        flat = torch.load(self.file, weights_only=True)
        return {n: Pair(d, d if c is None else c) for n, (d, c) in flat.items()}


class Frontier:
    """What each batch still needs, in memory up to ``cap`` bytes, the rest in a folder."""

    def __init__(self, cap: int, folder: Path) -> None:
        self.cap, self.folder = cap, folder
        self.units: dict[int, list[_Unit]] = {}
        self.used = 0
        self.written = 0

    def put(self, batch: int, environment: Environment) -> None:
        """Keep values of a batch, beside those that were not taken.

        Raises:
            ArtefactError: They cannot be written.
        """
        units = self.units.setdefault(batch, [])
        for values in _apart(environment):
            taken = sum(
                size(p.dense) + (0 if p.same else size(p.compressed)) for p in values.values()
            )
            unit = _Unit(frozenset(values), taken)
            if self.used + taken > self.cap:
                unit.file = self._write(values)
            else:
                unit.values = values
                self.used += taken
            units.append(unit)

    def _write(self, values: Environment) -> Path:
        self.written += 1
        file = self.folder / f"{self.written}.pt"
        flat = {name: (p.dense, None if p.same else p.compressed) for name, p in values.items()}
        try:
            torch.save(_by_themselves(flat), file)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            raise ArtefactError(
                f"The refit puts what memory does not hold into {self.folder}, and that cannot "
                f"be written: {' '.join(str(error).split())}; set TMPDIR to a folder with more "
                "space, take fewer --calibration-images, or pass --no-refit."
            ) from error
        return file

    def look(self, batch: int) -> Environment:
        """Return a batch's values, which stay where they are."""
        return {name: p for unit in self.units[batch] for name, p in unit.look().items()}

    def take(self, batch: int, names: Collection[str] | None = None) -> Environment:
        """Take a batch's values out: all, or those of some names with what shares their memory."""
        environment: Environment = {}
        left = []
        for unit in self.units[batch]:
            if names is not None and unit.names.isdisjoint(names):
                left.append(unit)
                continue
            environment |= unit.look()
            if unit.file is None:
                self.used -= unit.size
            else:
                unit.file.unlink()
        self.units[batch] = left
        return environment


def _by_themselves(values: Any) -> Any:
    """Values whose file holds little more than they are, as that of views of all images would."""
    held: Counter[int] = Counter()
    for tensor in {id(t): t for t in tensors(values).values()}.values():
        held[tensor.untyped_storage().data_ptr()] += tensor.numel() * tensor.element_size()

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        return tensor.clone() if storage.nbytes() > 2 * held[storage.data_ptr()] else tensor

    return mapped(values, own)


def _apart(environment: Environment) -> list[Environment]:
    """Divide values into those that share no memory with each other."""
    groups: list[tuple[set[int], Environment]] = []
    for name, pair in environment.items():
        memory = _storages(pair.dense) | _storages(pair.compressed)
        together: Environment = {}
        apart = []
        for known, values in groups:
            if known.isdisjoint(memory):
                apart.append((known, values))
            else:
                memory |= known
                together |= values
        groups = [*apart, (memory, {**together, name: pair})]
    return [values for _, values in groups]


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(value).values()}


@contextmanager
def spill_folder() -> Iterator[Path]:
    """A temporary folder for what memory does not hold.

    Raises:
        ArtefactError: It cannot be made.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="compress-")
    except OSError as error:
        raise ArtefactError(
            f"The refit's temporary folder cannot be made: {error.strerror}; set TMPDIR to a "
            "folder that you may write in, or pass --no-refit."
        ) from error
    with made as folder:
        yield Path(folder)
