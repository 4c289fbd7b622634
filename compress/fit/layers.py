"""From a plan to a rewritten model: fitting the chosen factors, then refitting them in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from compress.calibrate.problems import absorbed_bias, bias_of, fit_problem, layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.removal import Narrower, group_widths
from compress.calibrate.statistics import FEW_SAMPLES, Calibration, LayerStatistics
from compress.data import Loader, Split
from compress.fit.by_module import Watched, refit_by_module
from compress.fit.factors import Factors, partly, whole
from compress.fit.in_order import refit
from compress.fit.jointly import Improved, Movable, refit_jointly
from compress.fit.predict import (
    HeldOut,
    PredictedError,
    held_out_statistics,
    seen_errors,
    unseen_mse,
)
from compress.fit.walk import Labelled, RefitImages, RefitSettings, Traced
from compress.fit.whole import SHARES, best_share, divergences
from compress.layers import registered_kind
from compress.linalg.fit import fit
from compress.network.baseline import Network
from compress.network.chains import rewrite
from compress.network.narrowing import Cut, Kept
from compress.network.sites import LayerSite
from compress.plan import NARROWER, Choice, Plan
from compress.progress import Track, silent
from compress.running.memory_format import in_memory_format
from compress.running.structure import placed


@dataclass(frozen=True)
class RefitPath:
    """How layers were refitted.

    Attributes:
        path: ``"graph"`` along the network's graph, ``"modules"`` by watching its layers, or
            ``"none"``.
        reason: Why not along the graph; empty where they were.
        further: How many images the joint refit learned from beside those fitted to.
    """

    path: str = "none"
    reason: str = ""
    further: int = 0


@dataclass(frozen=True)
class Replaced:
    """A rewritten model and what was predicted for it.

    Attributes:
        model: The rewritten model, float32.
        fitted: The same before the refit, whose per-layer errors the prediction is about.
        predicted: By layer name, for every layer with statistics.
        refitted: Names of the layers whose refit was kept, dense ones included.
        refit: How that was done.
        cut: The network with channels taken out, before any layer was factored.
    """

    model: nn.Module
    fitted: nn.Module
    predicted: dict[str, PredictedError]
    refitted: tuple[str, ...] = ()
    refit: RefitPath = RefitPath()
    cut: Cut | None = None


@dataclass(frozen=True)
class Fitted:
    """The factors of a plan's replaced layers, fitted to the statistics.

    Attributes:
        factors: By layer name.
        predicted: By layer name, for every layer with statistics.
        free: Names of the dense layers whose weights a refit may change.
        cut: The network with channels taken out, before any layer is factored.
    """

    factors: dict[str, Factors]
    predicted: dict[str, PredictedError]
    free: tuple[str, ...] = ()
    cut: Cut | None = None

    @property
    def narrowed(self) -> Cut:
        """`cut`, where there is one.

        Raises:
            ValueError: There is none.
        """
        if self.cut is None:
            raise ValueError("nothing was cut")
        return self.cut


@dataclass(frozen=True)
class Fitter:
    """What plans are carried out with.

    Attributes:
        network: The dense baseline.
        split: Images that a refit is fitted to and judged on.
        loader: How they reach the network.
        recipe: How its statistics were taken, which is how errors are weighed.
        refit: Whether factors are refitted on the network as compressed so far.
        track: Progress.
        further: Batches that a refit may learn from too.
    """

    network: Network
    split: Split
    loader: Loader
    recipe: Recipe
    refit: bool = True
    track: Track = silent
    further: Labelled = ()

    def carry_out(self, plan: Plan, calibration: Calibration) -> Replaced:
        """Fit every chosen scheme in the data's metric, rewrite the model, refit it.

        Args:
            plan: What to do with each layer.
            calibration: The layers' statistics.
        """
        return self.replace(self.fit(plan, calibration))

    def fit(self, plan: Plan, calibration: Calibration) -> Fitted:
        """Fit every chosen scheme to nothing but the statistics; arguments as `carry_out`.

        Layers that the plan before treated the same way are taken over (`Calibration.fits`).
        """
        network, known = self.network, calibration.fits
        narrower = Narrower(network.model, network.sites, network.channels, calibration, plan.ways)
        cut, lost = narrower.cut(group_widths(plan, network.channels))
        sites, statistics = cut.sites, narrower.statistics(cut)
        modules = dict(cut.model.named_modules(remove_duplicate=False))
        factors: dict[str, Factors] = {}
        predicted: dict[str, PredictedError] = {}
        measured = [c for c in plan.choices if c.name in statistics]
        for choice in self.track(measured, "fit", len(measured)):
            name, asked = choice.name, _Asked.of(choice, cut, self.recipe)
            if name not in known or not known[name][0].same(asked):
                layer = _Layer(sites[name], modules[name], statistics[name])
                known[name] = asked, *layer.fit(choice, pooled=self.recipe.pool)
            _, found, error = known[name]
            predicted[name] = error.with_lost(lost.get(name))
            if found is not None:
                factors[name] = found
        free = [
            c.name for c in plan.choices
            if not c.rewritten and not c.locked and sites[c.name].skip is None
        ]  # fmt: skip
        # Depthwise layers that became narrower.
        free += [c.name for c in plan.choices if c.scheme in NARROWER and c.name not in factors]
        return Fitted(factors, predicted, tuple(free), cut)

    def with_held_out(self, fitted: Fitted, calibration: Calibration) -> Fitted:
        """Add the errors on the validation images of layers with few samples.

        Args:
            fitted: What was fitted.
            calibration: To these statistics.
        """
        images, predicted = self.split.validation, fitted.predicted
        seen = {
            name: calibration.statistics[name]
            for name in fitted.factors
            if predicted[name].samples_per_dimension < FEW_SAMPLES
            and name not in fitted.narrowed.kept
        }
        if not seen or not len(images):
            return fitted
        modules = dict(self.network.model.named_modules(remove_duplicate=False))
        held_out = HeldOut(images, self.loader, self.recipe)
        unseen = held_out_statistics(self.network, seen, held_out)
        found = dict(predicted)
        for name, statistics in seen.items():
            fit = fitted.factors[name].fit
            mse = unseen_mse(modules[name], fit, statistics, unseen[name])
            found[name] = replace(predicted[name], held_out_mse=mse)
        return replace(fitted, predicted=found)

    def replace(self, fitted: Fitted) -> Replaced:
        """Rewrite the model with fitted factors, and refit them."""
        now = Improved(fitted.factors, {})
        first = model = self._rewritten(fitted, now)
        path = self._refit_path(fitted)
        if path.path == "none":
            return Replaced(first, first, fitted.predicted, refit=path, cut=fitted.cut)
        said = [path.reason] if path.reason else []
        further = 0
        for title, stage in self._stages(fitted):
            after = stage(now)
            further = after.further
            share, why, chosen = self._kept_share(fitted, model, (now, after))
            if why:
                part = "was taken back" if share == 0 else f"was kept to {100 * share:.0f}%"
                said.append(f"{title} {part}, since {why}")
            if chosen is not None:
                now, model = chosen
        factors = fitted.factors
        changed = tuple(name for name in factors if now.factors[name] is not factors[name])
        path = replace(path, reason="; ".join(said), further=further)
        changed += tuple(now.kept)
        return Replaced(model, first, fitted.predicted, changed, path, fitted.cut)

    def _rewritten(self, fitted: Fitted, now: Improved) -> nn.Module:
        cut = self._cut(fitted)
        return rewrite(cut.model, cut.sites, {n: f.chain for n, f in now.factors.items()}, now.kept)

    def _kept_share(
        self, fitted: Fitted, model: nn.Module, stages: tuple[Improved, Improved]
    ) -> tuple[float, str, tuple[Improved, nn.Module] | None]:
        """How much of a refit brings the whole network nearest to the original.

        Args:
            fitted: What the refit began with.
            model: The network before it.
            stages: What the layers were before and after it.

        Returns:
            The share, why it is not all, and what the layers and the network then are; None of
            them where nothing is kept.
        """
        before, after = stages
        if not self.network.reading.parts:  # nothing says how far results are apart
            return 1.0, "", (after, self._rewritten(fitted, after))
        apart = [self._apart(model)]
        best: tuple[Improved, nn.Module] | None = None
        for share in SHARES:
            mixed = self._partly(fitted, before, after, share)
            tried = self._rewritten(fitted, mixed)
            apart.append(self._apart(tried))
            if best is None or best_share(apart)[0] == share:
                best = mixed, tried
            if len(apart) > 2 and apart[-1] >= apart[-2]:
                break
        share, why = best_share(apart)
        return share, why, best if share else None

    def _apart(self, model: nn.Module) -> float:
        """How far a network's outputs on validation images are from the original's."""
        batches = (inputs for inputs, _ in self.loader.placed(self.split.validation))
        reading, form = self.network.reading, self.loader.memory_format
        return divergences([self.network.model, model], batches, reading, form)[1]

    def _partly(self, fitted: Fitted, before: Improved, after: Improved, share: float) -> Improved:
        """What the layers are with a share of their changes."""
        cut = self._cut(fitted)
        factors = {
            name: partly(before.factors[name], new, share, cut.sites[name].geometry)
            for name, new in after.factors.items()
        }
        kept = {}
        for name, new in after.kept.items():
            old = before.kept.get(name) or cut.model.get_submodule(name).state_dict()
            kept[name] = {
                key: torch.lerp(old[key].to(value), value, share) if share < 1 else value
                for key, value in new.items()
            }
        return Improved(factors, {**before.kept, **kept})

    def _cut(self, fitted: Fitted) -> Cut:
        """The network whose layers are factored."""
        network = self.network
        return fitted.cut or Cut(network.model, {site.name: site for site in network.sites})

    def _given(self, batches: Labelled) -> Iterator[tuple[Any, Any]]:
        """Batches where the network is, with their targets where a loss looks at them."""
        loader = self.loader
        for inputs, targets in batches:
            given = placed(inputs, loader.device, loader.memory_format)
            yield given, None if self.recipe.loss is None else targets

    def _refit_path(self, fitted: Fitted) -> RefitPath:
        if not self.refit:
            return RefitPath("none", "it was switched off")
        if not fitted.factors:
            return RefitPath("none", "no layer was rewritten")
        if not len(self.split.validation):
            return RefitPath("none", "there are no validation images to judge it on")
        if self.network.graph is None:
            return RefitPath("modules", "the network has no graph")
        return RefitPath("graph")

    def _stages(self, fitted: Fitted) -> list[tuple[str, Callable[[Improved], Improved]]]:
        """Refits, each with a name: in execution order, then jointly between cuts of the graph."""
        network, recipe, split = self.network, self.recipe, self.split
        sites = self._cut(fitted).sites
        settings = RefitSettings(
            seed=recipe.seed, weigh=recipe.weigh, loss=recipe.loss, reading=recipe.reading,
            in_place=recipe.in_place,
        )  # fmt: skip

        def images() -> RefitImages:
            sets = (split.fit, split.validation)
            fit, validation = (self._given(self.loader.batches(images)) for images in sets)
            whole = recipe.loss is not None and split.fit.source.collates
            return RefitImages(fit, validation, self._given(self.further), whole)

        def by_module(now: Improved) -> Improved:
            watched = Watched(network.model, sites)
            with in_memory_format(network.model, self.loader.memory_format):
                found, _ = refit_by_module(watched, now.factors, images(), settings, self.track)
            return Improved(found, {})

        if network.graph is None:
            return [("it", by_module)]
        traced = Traced(network.model, network.graph, sites, network.result, fitted.cut)

        def in_order(now: Improved) -> Improved:
            with in_memory_format(network.model, self.loader.memory_format):
                found, _ = refit(traced, now.factors, images(), settings, self.track)
            return Improved(found, {})

        def jointly(now: Improved) -> Improved:
            movable = Movable(now.factors, fitted.free)
            with in_memory_format(network.model, self.loader.memory_format):
                return refit_jointly(traced, movable, images(), settings, self.track)

        return [("the refit layer by layer", in_order), ("the joint refit", jointly)]


@dataclass(frozen=True)
class _Asked:
    """What a plan wants of one layer, which is all that its fit depends on beside statistics."""

    scheme: str
    ranks: tuple[int, ...]
    kept: Kept
    pooled: bool

    @classmethod
    def of(cls, choice: Choice, cut: Cut, recipe: Recipe) -> Self:
        return cls(choice.scheme, choice.ranks, cut.kept.get(choice.name, Kept()), recipe.pool)

    def same(self, other: Self) -> bool:
        plain = (self.scheme, self.ranks, self.pooled) == (other.scheme, other.ranks, other.pooled)
        return plain and self.kept.same(other.kept)


@dataclass(frozen=True)
class _Layer:
    """One layer and what is known of it."""

    site: LayerSite
    module: nn.Module
    statistics: LayerStatistics

    def fit(self, choice: Choice, *, pooled: bool) -> tuple[Factors | None, PredictedError]:
        """Fit the chosen scheme, if any; also what the statistics predict for it."""
        statistics = self.statistics
        problem = layer_problem(self.site, self.module, statistics)
        factors, loss, mse = None, 0.0, 0.0
        if choice.scheme in NARROWER:
            weight = registered_kind(self.module).weight(self.module).double()
            factors = Factors(whole(weight), bias_of(self.module), problem.weighting)
        elif choice.rewritten:
            metric = fit_problem(self.site, self.module, statistics) if pooled else problem
            found = fit(metric, choice.scheme, choice.ranks)
            loss, mse = seen_errors(self.module, statistics, problem, found)
            if metric is not problem:
                loss = found.loss
            bias = absorbed_bias(self.module, statistics, found)
            factors = Factors(found, bias, problem.weighting)
        variance = problem.variance()
        spectrum = problem.plain_spectrum.flatten().sort(descending=True)[0]
        return factors, PredictedError(
            loss=0.5 * self.site.positions * loss,
            mse=mse,
            relative_mse=mse / variance if variance > 1e-20 else None,
            eigenvalues=tuple(spectrum.tolist()),
            samples=statistics.samples,
            samples_per_dimension=statistics.samples_per_dimension,
            variance=variance,
        )
