"""What the user fixes by glob: layers to keep, schemes, ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress.config import RunConfig
from compress.errors import ConfigError, near_matches
from compress.linalg.schemes import OUTPUT, Ranks, scheme_for_ranks, scheme_named, too_long
from compress.network.sites import LayerSite
from compress.plan import DENSE


@dataclass(frozen=True)
class Latitude:
    """What a budget may choose from for one layer.

    Attributes:
        schemes: Names of schemes.
        ranks: The ranks that the user fixed; None where they are free.
        round_to: Free ranks are multiples of this, or full.
        forced: Whether fixed ranks are taken even where they save nothing.
    """

    schemes: tuple[str, ...]
    ranks: Ranks | None = None
    round_to: int | None = None
    forced: bool = False

    def allows(self, ranks: Ranks, full: Ranks) -> bool:
        """Whether these ranks of a scheme may be chosen, of which ``full`` are the largest."""
        if self.ranks is not None:
            wanted = [min(fixed, limit) for fixed, limit in zip(self.ranks, full, strict=True)]
            return list(ranks) == wanted
        multiple = self.round_to or 1
        return all(r % multiple == 0 or r == limit for r, limit in zip(ranks, full, strict=True))


class Overrides:
    """What the user fixed by glob: layers to keep, schemes, ranks.

    Raises:
        ConfigError: A glob that matches no layer (with near matches), a scheme that a layer
            cannot take, ranks that do not suit it, or a layer both kept and ranked.
    """

    def __init__(self, config: RunConfig, sites: Iterable[LayerSite]) -> None:
        self.config = config
        self.sites = {site.name: site for site in sites}
        for what, patterns in (
            ("keep", config.keep),
            ("scheme", config.scheme),
            ("rank", config.rank),
        ):
            for pattern in patterns:
                if not any(self._matches(pattern, site) for site in self.sites.values()):
                    raise ConfigError(
                        f"--{what} {pattern!r} matches no layer."
                        f"{near_matches(pattern, self.sites)} `compress inspect` lists the layers."
                    )
        for site in self.sites.values():
            self._check(site)

    @staticmethod
    def _matches(pattern: str, site: LayerSite) -> bool:
        return any(fnmatch.fnmatchcase(alias, pattern) for alias in site.aliases)

    def _last(self, patterns: Mapping[str, str], site: LayerSite) -> str | None:
        found = [value for pattern, value in patterns.items() if self._matches(pattern, site)]
        return found[-1] if found else None

    def kept(self, site: LayerSite) -> str | None:
        """The reason to keep a layer, or None."""
        if site.skip is not None:
            return site.skip
        if any(self._matches(p, site) for p in self.config.keep):
            return "kept on request"
        return "kept on request" if self._last(self.config.scheme, site) == DENSE else None

    def fixes(self, name: str) -> bool:
        """Whether the user says anything of a module, so that its width stays too."""
        named = (*self.config.keep, *self.config.scheme, *self.config.rank)
        aliases = self.sites[name].aliases if name in self.sites else (name,)
        return any(fnmatch.fnmatchcase(a, p) for a in aliases for p in named)

    def scheme(self, site: LayerSite) -> str | None:
        """The scheme asked for, or None; output in the place of one that is not offered.

        A layer whose patches are too long takes no other, which a warning says.
        """
        asked = self._last(self.config.scheme, site)
        if asked in (None, DENSE) or too_long(site.geometry) is None:
            return asked
        return OUTPUT.name if scheme_named(asked).rank_count == OUTPUT.rank_count else asked

    def ranks(self, site: LayerSite) -> Ranks | None:
        """The ranks asked for, or None."""
        text = self._last(self.config.rank, site)
        return None if text is None else tuple(int(part) for part in text.split(","))

    def schemes(self, site: LayerSite) -> tuple[str, ...]:
        """The schemes in play for a layer."""
        asked = self.scheme(site)
        allowed = self.config.ways if asked is None else (asked,)
        return tuple(s for s in site.schemes if s in allowed)

    def unsuited(self, site: LayerSite) -> str | None:
        """Why no scheme in play can stand for a layer; None where one can."""
        if self.schemes(site):
            return None
        return OUTPUT.unavailable(site.geometry) or "none of the schemes in play suits it"

    def latitude(self, site: LayerSite) -> Latitude:
        """What a budget may choose from for a layer."""
        config = self.config
        return Latitude(
            self.schemes(site), self.ranks(site), config.round_to, forced=config.force_rank
        )

    def _check(self, site: LayerSite) -> None:
        scheme, ranks = self.scheme(site), self.ranks(site)
        if site.skip is not None:
            return
        if scheme is not None and scheme != DENSE:
            reason = scheme_named(scheme).unavailable(site.geometry)
            exact = any(p in site.aliases for p in self.config.scheme)
            if reason is not None and exact:
                raise ConfigError(f"Layer {site.name!r} cannot take {scheme!r}: {reason}.")
        if ranks is None:
            return
        if any(self._matches(p, site) for p in self.config.keep):
            raise ConfigError(f"Layer {site.name!r} is both kept and given a rank.")
        wanted = scheme or scheme_for_ranks(ranks).name
        if wanted != DENSE and len(ranks) != scheme_named(wanted).rank_count:
            raise ConfigError(
                f"Layer {site.name!r} takes {scheme_named(wanted).rank_count} rank(s) in "
                f"scheme {wanted!r}; --rank gives {len(ranks)}."
            )
