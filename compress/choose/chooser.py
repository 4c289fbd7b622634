"""Choosing by what calibration found out: a `compress.rules.Planning` without images or a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from compress.calibrate.removal import Narrower
from compress.calibrate.statistics import Calibration
from compress.choose.budgets import Budgets, options
from compress.choose.by_spectrum import Asked, choose_by_spectrum
from compress.choose.choices import problems
from compress.choose.costs import Costs, Counted
from compress.choose.overrides import Overrides
from compress.choose.widths import Grid, Widths, width_options
from compress.config import RunConfig
from compress.errors import ConfigError
from compress.network.baseline import Network
from compress.network.channels import ChannelMap
from compress.network.sites import LayerSite
from compress.plan import Candidate, Choice, Plan
from compress.progress import Track, silent
from compress.rules import Currency, RankOf, Sized


@dataclass(frozen=True)
class Chooser:
    """What rules can choose by where only statistics are known.

    Attributes:
        model: The network, norms folded.
        sites: Its layers.
        calibration: Their statistics.
        config: Rule, overrides, schemes.
        track: Progress.
        whole: What the whole network costs; by default the layers together.
        elsewhere: MACs of what is none of the layers, by module.
        channels: Channels that may be taken out.
    """

    model: nn.Module
    sites: tuple[LayerSite, ...]
    calibration: Calibration
    config: RunConfig
    track: Track = silent
    whole: Sized | None = None
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    channels: ChannelMap = field(default_factory=ChannelMap)

    @classmethod
    def of(
        cls, network: Network, calibration: Calibration, config: RunConfig, track: Track = silent
    ) -> Chooser:
        """Return the chooser of a network, whose budgets are shares of all that it computes."""
        channels = network.channels if config.narrower else ChannelMap()
        return cls(
            network.model, network.sites, calibration, config, track, network, network.elsewhere,
            channels,
        )  # fmt: skip

    def plan(self) -> Plan:
        """Choose by the configuration's rule.

        Raises:
            BudgetError: The budget cannot be reached; the smallest reachable fraction is named.
            ConfigError: Overrides that fit no layer, or a rule that needs more than statistics.
        """
        config = self.config
        choices = config.chosen_rule.choose(self, config.rule_value or 0.0)
        return Plan(
            config.rule, config.rule_value, config.metric, tuple(choices),
            slices=config.slices,
        )  # fmt: skip

    def by_spectrum(self, rank_of: RankOf | None, rule: str) -> list[Choice]:
        """Give each layer the rank that its spectrum calls for; see `compress.rules.Planning`."""
        overrides, problem = (
            Overrides(self.config, self.sites),
            problems(self.model, self.calibration),
        )
        asked = Asked(rank_of, rule)

        def spectra(site: LayerSite) -> list[list[float]]:
            return [spectrum.tolist() for spectrum in problem(site).plain_spectrum]

        tracked = self.track(self.sites, "plan", len(self.sites))
        return [choose_by_spectrum(site, overrides, spectra, asked) for site in tracked]

    def budgets(self, currency: Currency) -> Budgets:
        """Make the candidates that all budgets in a currency choose from."""
        overrides = Overrides(self.config, self.sites)
        problem = problems(self.model, self.calibration, fitted=True)
        found = options(self.sites, overrides, problem, currency.size, self.track)
        dense = {site.name: float(currency.size(site)) for site in self.sites}
        fixed = sum(cost for name, cost in dense.items() if name not in found)
        layers = sum(dense.values())
        total = max(float(currency.size(self.whole)), layers) if self.whole else layers
        return Budgets(
            self.sites, overrides, found, currency, total, fixed + total - layers,
            elsewhere=self.elsewhere if currency.name == "macs" else self._params_elsewhere(),
            widths=self.widths(overrides, found, Counted(currency)),
        )  # fmt: skip

    def _params_elsewhere(self) -> dict[str, int]:
        """Parameters of what is none of the layers, by module."""
        layers = {alias for site in self.sites for alias in site.aliases}
        own = {
            name: sum(p.numel() for p in module.parameters(recurse=False))
            for name, module in self.model.named_modules()
            if name not in layers
        }
        return {name: count for name, count in own.items() if count}

    def narrower(self) -> Narrower | None:
        """What takes channels out; None where nothing may."""
        ways = self.config.narrower
        if not ways or not self.channels.groups:
            return None
        return Narrower(self.model, self.sites, self.channels, self.calibration, ways)

    def widths(
        self,
        overrides: Overrides,
        found: Mapping[str, Sequence[Candidate]],
        costs: Costs,
        grid: Grid | None = None,
    ) -> Widths | None:
        """What may become narrower, with its cost; None where nothing may.

        Args:
            overrides: What the user fixed.
            found: Candidates by layer.
            costs: What layers cost at their widths.
            grid: The widths of a group; see `width_options`.
        """
        narrower = self.narrower()
        if narrower is None:
            return None
        options = width_options(narrower, overrides, self.track, grid)
        sites = {site.name: site for site in self.sites}
        return Widths(options, sites, found, costs) if options else None

    def within(self, currency: Currency, fraction: float) -> list[Choice]:
        """Spend a fraction of the dense network's cost; see `compress.rules.Planning`."""
        return self.budgets(currency).spend(fraction)

    def within_time(self, fraction: float) -> list[Choice]:
        """Refuse: time is measured on whole networks.

        Raises:
            ConfigError: Always.
        """
        del fraction
        raise self._more_than_statistics()

    def within_drop(self, points: float) -> list[Choice]:
        """Refuse: accuracy is measured on images.

        Raises:
            ConfigError: Always.
        """
        del points
        raise self._more_than_statistics()

    def _more_than_statistics(self) -> ConfigError:
        return ConfigError(
            f"the {self.config.rule} rule measures whole networks, which a plan from statistics "
            "does not"
        )
