"""What a torch file says it holds, compared with its size before torch takes memory for it.

torch believes a file: it allocates the storages that the pickle names, lets tensors be larger than
their storage, and reads a storage of an archive as far as it is said to go. Here the pickle is read
first, by an unpickler that makes nothing: every class and function in it becomes a stand-in, and
only storages and tensors leave a record of the bytes that they would take.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from compress.untrusted import Unreadable, check_expansion, open_archive

# Deeper tuples and stranger keys than these are in no checkpoint, and hashing them may recurse.
_PLAIN = (str, bytes, int, float, bool, type(None))
_REPEATED = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
# Only what pickle itself writes for bytes: others take time that grows with the square of the text.
_ENCODINGS = ("latin1", "latin-1")
_LONGEST_NAME = 500
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages

# What an unpickler raises of a damaged file, depending on the byte that is wrong.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
    AssertionError, ImportError, OverflowError, NotImplementedError, RecursionError, struct.error,
)  # fmt: skip


def check_declared(path: Path) -> None:
    """Refuse a file of torch.save that announces more than it holds, or that grows out of bounds.

    In an archive, the checksum of every member is compared, which torch does not do.

    What else is wrong with the file is left to torch, which then takes no more memory than the
    file is worth.

    Raises:
        OSError: The file cannot be read.
        Unreadable: The reason, without a full stop.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"PK"
    if packed:
        _check_archive(path)
    else:
        _check_legacy(path)


def _check_archive(path: Path) -> None:
    with open_archive(path, expands=False) as (archive, members):
        sizes = {member.name: member.size for member in members}
        names = [name for name in sizes if name.endswith("/data.pkl") or name == "data.pkl"]
        if not names:
            return  # no file of torch.save, as torch will say
        if len(names) > 1:
            raise Unreadable(f"it holds {len(names)} pickles, {names[0]!r} and {names[1]!r}")
        with archive.open(names[0]) as opened:
            content = opened.read(sizes[names[0]])
    folder = names[0].removesuffix("data.pkl")
    declared = Declared()
    _Dry(io.BytesIO(content), declared, len(content)).run()
    for key, size in declared.storages.items():
        held = sizes.get(f"{folder}data/{key}")
        if held is not None and held != size:
            raise Unreadable(f"its storage {key!r} should have {size:,} bytes and has {held:,}")
    check_expansion(path.stat().st_size, declared.tensor_bytes)


def _check_legacy(path: Path) -> None:
    size = path.stat().st_size
    declared = Declared()
    with open(path, "rb") as file:
        for _ in range(_LEGACY_PICKLES):
            if file.tell() < size:
                _Dry(file, declared, size).run()
    announced = sum(declared.storages.values())
    if announced > size:
        raise Unreadable(f"its storages should have {announced:,} bytes and the file has {size:,}")
    check_expansion(size, declared.tensor_bytes)


@dataclass
class Declared:
    """What a pickle announces.

    Attributes:
        storages: Bytes of each storage by its key.
        tensor_bytes: Bytes that its tensors would take if each were written out.
    """

    storages: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int = 0


@dataclass(frozen=True)
class _Storage:
    """A storage that the pickle names."""

    numel: int
    itemsize: int


class _Made:
    """Stands in for whatever a call in the pickle would return; keeps nothing."""

    def __init__(self, declared: Declared) -> None:
        self._declared = declared

    def __call__(self, *_: Any, **__: Any) -> _Made:
        return self

    def __setstate__(self, state: Any) -> None:
        # Tensors of the first torch versions get their storage in this way.
        if isinstance(state, tuple) and len(state) == 4 and isinstance(state[0], _Storage):
            _count(self._declared, state)

    def __setitem__(self, key: Any, value: Any) -> None:
        _check_key(key)

    def append(self, item: Any) -> None:
        """Take an item as a list does."""

    def extend(self, items: Any) -> None:
        """Take items as a list does."""

    def add(self, item: Any) -> None:
        """Take an item as a set does."""
        _check_key(item)


@dataclass(frozen=True)
class _Named:
    """Stands in for a class or function that the pickle names, called by nobody."""

    module: str
    name: str
    declared: Declared
    most: int

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        if self.name in _REPEATED and len(arguments) > 3:
            _count(self.declared, arguments[:4])
        elif self.name == "_rebuild_from_type_v2" and isinstance(arguments[0], _Named):
            arguments[0](*arguments[2])
        elif self.name == "encode" and self.module == "_codecs":
            self._check_encoding(arguments)
        else:
            self._check_sizes(arguments)
        return _Made(self.declared)

    def _check_encoding(self, arguments: tuple[Any, ...]) -> None:
        if len(arguments) > 1 and arguments[1] not in _ENCODINGS:
            raise Unreadable(f"it holds bytes in the encoding {str(arguments[1])[:40]!r}")

    def _check_sizes(self, arguments: tuple[Any, ...]) -> None:
        """Refuse to make something of a size that is only announced, such as a bytearray."""
        makes = self.name == "bytearray" or self.name.endswith(("Tensor", "Storage"))
        if makes and any(isinstance(a, int) and a > self.most for a in arguments):
            raise Unreadable(f"it asks for a {self.name} larger than itself")
        if self.name in ("set", "OrderedDict", "Counter"):
            for key in _keys(arguments):
                _check_key(key)


def _keys(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            for item in argument:
                yield item[0] if isinstance(item, list | tuple) and item else item


class _Bounded:
    """A file that is never asked for more than it has: memory is taken for what is asked."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        """Read some bytes."""
        if count > self._size - self._file.tell():
            raise EOFError("it ends in the middle of a value")
        return self._file.read(count)


class _Dry(pickle._Unpickler):
    """Reads one pickle and makes nothing of it."""

    # The unpickler in Python, not the one in C, whose memo is an array as long as it is told.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], declared: Declared, most: int) -> None:
        super().__init__(_Bounded(file, most), encoding="bytes")
        self.declared, self.most = declared, most

    def run(self) -> None:
        """Read it.

        Raises:
            Unreadable: It is damaged, or announces what it must not.
        """
        try:
            self.load()
        except Unreadable:
            raise
        except _DAMAGE as error:
            raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in: nothing is imported."""
        if len(module) + len(name) > _LONGEST_NAME:  # torch looks through its own message for long
            raise Unreadable(f"it names the global {module[:40]}.{name[:40]}…")
        return _Named(module, name, self.declared, self.most)

    def get_extension(self, code: int) -> None:
        """Refuse names that only a running program knows."""
        raise Unreadable(f"it holds the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage."""
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] not in ("storage", b"storage")
        ):
            return _Made(self.declared)  # the source of a module's class, in old files
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Named) or not isinstance(key, str | bytes | int):
            raise Unreadable("it holds a storage without type or key")
        if type(numel) is not int or numel < 0:
            raise Unreadable(f"it holds a storage of {str(numel)[:20]} numbers")
        itemsize = _itemsize(kind.name)
        text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
        known = self.declared.storages.setdefault(text, numel * itemsize)
        if known != numel * itemsize:
            raise Unreadable(f"its storage {text[:40]!r} has two sizes")
        return _Storage(numel, itemsize)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key in items[::2]:
            _check_key(key)

    def _set_item(self) -> None:
        self.stack.pop()
        _check_key(self.stack.pop())

    def _add_items(self) -> None:
        for item in self.pop_mark():
            _check_key(item)

    def _new(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)

    def _dictionary(self) -> None:
        for key in self.pop_mark()[::2]:
            _check_key(key)
        self.stack.append({})

    def _refuse(self) -> None:
        raise Unreadable("it holds a kind of value that no checkpoint has")

    # Dictionaries and sets stay empty: only their keys are looked at.
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.ADDITEMS[0]] = _add_items
    dispatch[pickle.DICT[0]] = _dictionary
    dispatch[pickle.NEWOBJ[0]] = _new
    # torch reads none of these, and some take memory before they read.
    for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.FROZENSET, pickle.NEWOBJ_EX):
        dispatch[_code[0]] = _refuse


def _check_key(key: Any) -> None:
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (*_PLAIN, _Made, _Named, _Storage)) for part in parts):
        raise Unreadable(f"it holds an entry under a {type(key).__name__}, which is no name")


def _itemsize(storage: str) -> int:
    """Bytes of a number in a storage, by the name of its class."""
    if storage == "UntypedStorage":
        return 1
    try:
        dtype = torch.serialization.StorageType(storage).dtype
    except KeyError as error:
        raise Unreadable(f"it holds a {storage[:60]}, which torch does not know") from error
    return int(torch._utils._element_size(dtype))


def _count(declared: Declared, arguments: tuple[Any, ...]) -> None:
    """Check a tensor's place in its storage, and add what it would take on its own."""
    storage, offset, size, stride = arguments
    if not isinstance(storage, _Storage):
        return  # on the meta device, or of another kind: it takes nothing from a storage
    numbers = (offset, *_whole(size), *_whole(stride))
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise Unreadable("it holds a tensor whose shape is none")
    numel, last = 1, offset
    for count, step in zip(size, stride, strict=True):
        numel *= count
        last += (count - 1) * step
    if numel and last >= storage.numel:
        raise Unreadable(
            f"it holds a tensor of shape {list(size)[:8]} in a storage of {storage.numel:,} numbers"
        )
    declared.tensor_bytes += numel * storage.itemsize


def _whole(sizes: Any) -> tuple[Any, ...]:
    return tuple(sizes) if isinstance(sizes, list | tuple) else (None,)
