"""Which of the things in a checkpoint are the weights: containers, keys and prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import CheckpointError, near_matches
from compress.inputs.checkpoint.formats import RESAVE, listed

CONTAINERS = ("state_dict", "model", "model_state_dict", "ema")
PREFIXES = ("module.", "model.", "_orig_mod.")

# No network nests or names deeper; what does is made to cost time.
_MOST_NESTED = 8
_LONGEST_NAME = 1000
_MOST_PLACES = 100


@dataclass(frozen=True)
class Pick:
    """Which of a checkpoint's entries are the weights, where the user says so.

    Attributes:
        key: Where the state dict lies in the file, dotted; ``""`` for the usual places.
        prefix: What the names of its entries begin with; ``""`` for all entries.
    """

    key: str = ""
    prefix: str = ""

    def __bool__(self) -> bool:
        return bool(self.key or self.prefix)


def find_state(
    content: Mapping[Any, Any], path: Path, key: str = ""
) -> tuple[Mapping[Any, Any], str]:
    """Return the state dict and its place.

    Without a key, containers are descended into as long as one holds tensors.

    Raises:
        CheckpointError: There is none, or nothing under the key.
    """
    place: list[str] = []
    state = content
    if key:
        state, place = _under(content, key, path), [key]
    # A file may hold itself: it ends nowhere.
    while inner := next((c for c in CONTAINERS if _holds_tensors(state.get(c))), None):
        place.append(inner)
        state = state[inner]
        if len(place) > _MOST_NESTED:
            raise CheckpointError(
                f"The checkpoint {path} holds state dicts in each other, more than "
                f"{_MOST_NESTED} deep or without end; {RESAVE}."
            )
    if any(isinstance(value, Tensor) for value in state.values()):
        return state, ".".join(place)
    keys = listed([key_text(k) for k in state]) if state else "nothing"
    others = list(state_places(state))
    remedy = (
        f"choose one of its state dicts with --checkpoint-key: {listed(others)}"
        if others
        else "pass a file that holds a model's state dict"
    )
    raise CheckpointError(
        f"The checkpoint {path} has no weights, bare or under {', '.join(CONTAINERS)}: it holds "
        f"{keys}; {remedy}."
    )


def _under(content: Mapping[Any, Any], key: str, path: Path) -> Mapping[Any, Any]:
    """Return what lies under a dotted key.

    Raises:
        CheckpointError: Nothing does, or nothing with weights in it.
    """
    found = _at(content, key)
    if isinstance(found, Mapping) and (_holds_tensors(found) or any(state_places(found))):
        return found
    places = list(state_places(content))
    what = "nothing" if found is None else "no weights"
    there = listed(places) if places else "no key: its entries are the weights themselves"
    raise CheckpointError(
        f"The checkpoint {path} has {what} under the key {key!r}.{near_matches(key, places)} It "
        f"holds state dicts under {there}."
    )


def _at(content: object, key: str) -> object:
    """Follow a dotted key; keys of a file may have dots themselves, and the longest is taken."""
    parts = key.split(".")
    while parts and isinstance(content, Mapping):
        count = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in content), 0)
        if not count:
            return None
        content, parts = content[".".join(parts[:count])], parts[count:]
    return None if parts else content


def state_places(content: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the dotted keys under which dictionaries of tensors lie, the nearest first."""
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen: set[int] = {id(content)}
    count = 0
    for _ in range(_MOST_NESTED):
        deeper = []
        for front, each in level:
            for key, value in each.items():
                if not isinstance(key, str) or not isinstance(value, Mapping) or id(value) in seen:
                    continue
                seen.add(id(value))
                deeper.append((f"{front}{key}.", value))
                if any(isinstance(v, Tensor) for v in value.values()):
                    count += 1
                    yield front + key
                if count >= _MOST_PLACES:
                    return
        level = deeper


def _holds_tensors(value: object) -> bool:
    """Whether a state dict or a container in it holds tensors, down to `_MOST_NESTED`."""
    level = [value]
    seen: set[int] = set()
    for _ in range(_MOST_NESTED):
        dicts = [v for v in level if isinstance(v, Mapping) and id(v) not in seen]
        if any(isinstance(v, Tensor) for d in dicts for v in d.values()):
            return True
        seen.update(map(id, dicts))
        level = [d[c] for d in dicts for c in CONTAINERS if c in d]
    return False


def entry_name(key: object, path: Path) -> str:
    """Return the name of a tensor's entry.

    Raises:
        CheckpointError: It is no text, or longer than any network's.
    """
    text = key_text(key)
    if not isinstance(key, str | int) or len(text) > _LONGEST_NAME:
        raise CheckpointError(
            f"The checkpoint {path} holds a tensor under {text[:60]!r}, which is no name of a "
            f"network's entry (text of up to {_LONGEST_NAME} characters); {RESAVE}."
        )
    return text


def key_text(key: object) -> str:
    """Return what an entry is called; a key that is neither text nor a number, by its type."""
    plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 63)
    return str(key) if plain else type(key).__name__


def strip_prefixes(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Strip wrappers' prefixes; return the rest, the prefix and averaging counters left out.

    ``n_averaged`` is the counter that ``torch.optim.swa_utils.AveragedModel`` keeps beside
    ``module.``; it is not a weight of the network.
    """
    counters = tuple(n for n in tensors if n == "n_averaged")
    names = [n for n in tensors if n not in counters]
    stripped = ""
    while names:
        prefix = next((p for p in PREFIXES if all(n.startswith(stripped + p) for n in names)), None)
        if prefix is None:
            break
        stripped += prefix
    if not stripped:
        return tensors, "", ()
    return {n[len(stripped) :]: tensors[n] for n in names}, stripped, counters


def take_prefix(tensors: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """Return the entries whose names begin with a prefix, without it.

    The prefix is also looked for behind those that wrappers put in front of everything.

    Raises:
        CheckpointError: None does; the message says what they begin with.
    """
    front = prefix if prefix.endswith(".") else f"{prefix}."
    bare = strip_prefixes(tensors)[0]
    for entries in (tensors, bare):
        taken = {
            n[len(front) :]: t for n, t in entries.items() if n.startswith(front) and n != front
        }
        if taken:
            return taken
    heads = first_parts(bare)
    raise CheckpointError(
        f"The checkpoint {path} has no entry that begins with {front!r}."
        f"{near_matches(front, heads)} Its entries begin with {listed(heads)}."
    )


def first_parts(names: Iterable[str]) -> list[str]:
    """Return what names begin with, to the first dot, each once."""
    heads = (name.partition(".") for name in names)
    return list(dict.fromkeys(head + dot for head, dot, _ in heads))
