"""The schemes: which chain of narrower layers can stand for one layer.

To add one, write its `Scheme` in a file of its own and put it into `SCHEMES`.
"""

from __future__ import annotations

from compress.errors import near_matches
from compress.linalg.schemes.input import INPUT
from compress.linalg.schemes.output import OUTPUT
from compress.linalg.schemes.record import (
    LONGEST_PATCH,
    Ranks,
    Scheme,
    chain_macs,
    chain_params,
    too_long,
)
from compress.linalg.schemes.spatial import SPATIAL
from compress.linalg.schemes.two_sided import TWO_SIDED

__all__ = [
    "LONGEST_PATCH",
    "OUTPUT",
    "SCHEMES",
    "SCHEME_NAMES",
    "Ranks",
    "Scheme",
    "chain_macs",
    "chain_params",
    "scheme_for_ranks",
    "scheme_named",
    "too_long",
]

# In the order in which they are tried; the first of each number of ranks is the one that ranks
# given by hand stand for.
SCHEMES: tuple[Scheme, ...] = (OUTPUT, INPUT, TWO_SIDED, SPATIAL)
SCHEME_NAMES = tuple(scheme.name for scheme in SCHEMES)


def scheme_named(name: str) -> Scheme:
    """Return the scheme of a name.

    Raises:
        ValueError: There is none; near matches are named.
    """
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    raise ValueError(f"no scheme {name!r}.{near_matches(name, SCHEME_NAMES)}")


def scheme_for_ranks(ranks: Ranks) -> Scheme:
    """Return the scheme that ranks given by hand stand for where none is named.

    Raises:
        ValueError: No scheme takes that many.
    """
    for scheme in SCHEMES:
        if scheme.rank_count == len(ranks):
            return scheme
    raise ValueError(f"no scheme takes {len(ranks)} ranks")
