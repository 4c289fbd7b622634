"""Fitting a plan, perhaps edited, to the model it is applied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compress.calibrate.removal import groups_of
from compress.choose.choices import make_choice, narrowed_site
from compress.errors import PlanError, near_matches
from compress.linalg.schemes import scheme_named
from compress.network.channels import ChannelGroup, ChannelMap
from compress.network.sites import LayerSite
from compress.plan import DENSE, NARROW, NARROWER, Choice, Plan

Sites = Mapping[str, LayerSite]


def check_plan(plan: Plan, sites: tuple[LayerSite, ...], channels: ChannelMap) -> Plan:
    """Fit a plan, perhaps edited, to the model: costs and limits made anew.

    Args:
        plan: The plan.
        sites: The model's layers.
        channels: Its channels.

    Raises:
        PlanError: It names a layer that the model lacks, lacks one that the model has, asks a
            layer for what it cannot be, or widths that do not agree; all problems are listed.
    """
    by_name = {site.name: site for site in sites}
    missing = dict(by_name)
    problems = []
    fitting: dict[str, Choice] = {}
    for choice in plan.choices:
        site = missing.pop(choice.name, None)
        if site is None:
            twice = choice.name in by_name
            problems.append(
                f"layer {choice.name!r} is in the plan twice" if twice
                else f"no layer {choice.name!r} in the model"
            )  # fmt: skip
            continue
        problem = _misfit(choice, site)
        if problem is not None:
            problems.append(f"layer {choice.name!r}: {problem}")
            continue
        fitting[choice.name] = choice
    problems += [f"layer {name!r} is missing from the plan" for name in missing]
    problems += _disagreeing(fitting, by_name, channels)
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(f"The plan does not fit the model: {shown}{more}.")
    return Plan(
        plan.rule, plan.value, plan.metric,
        tuple(_made(fitting[site.name], site) for site in sites),
        plan.model, plan.source_sha256, plan.calibration, plan.slices,
    )  # fmt: skip


def _made(choice: Choice, site: LayerSite) -> Choice:
    """A choice that fits, with its costs; widths that take nothing out are none."""
    scheme, width = choice.scheme, choice.width
    if width == _whole(site):
        scheme, width = DENSE if scheme in NARROWER else scheme, None
    made = make_choice(site, scheme, choice.ranks, choice.reason, choice.break_even, width)
    return replace(made, locked=choice.locked)


def _whole(site: LayerSite) -> tuple[int, int]:
    return site.geometry.in_channels, site.geometry.out_channels


def _misfit(choice: Choice, site: LayerSite) -> str | None:
    """What is wrong with a choice by itself, or None."""
    if choice.shape != site.shape or choice.kind != site.kind:
        return f"the plan has {choice.kind} {choice.shape}, the model {site.kind} {site.shape}"
    if choice.width is not None:
        limits = _whole(site)
        if any(not 1 <= w <= limit for w, limit in zip(choice.width, limits, strict=True)):
            return f"width {list(choice.width)} is outside 1 to {list(limits)}"
        if choice.scheme == DENSE:
            return f"a dense layer has no width; with one its scheme is {NARROW!r}"
        site = narrowed_site(site, choice.width)
    if choice.scheme in (DENSE, *NARROWER):
        if choice.ranks:
            return f"a {choice.scheme} layer has no ranks"
        if choice.scheme in NARROWER and choice.width is None:
            return f"a {choice.scheme} layer has a width: how many inputs and outputs stay"
        return None
    return _unranked(choice, site)


def _unranked(choice: Choice, site: LayerSite) -> str | None:
    """Why a layer, as wide as it will be, cannot take a scheme at its ranks, or None."""
    if site.skip is not None:
        return f"it cannot be rewritten: {site.skip}"
    if choice.scheme not in site.schemes:
        names = (*site.schemes, DENSE)
        return f"no scheme {choice.scheme!r} for it ({', '.join(names)})" + near_matches(
            choice.scheme, names
        )
    full = scheme_named(choice.scheme).full_ranks(site.geometry)
    if len(choice.ranks) != len(full):
        return f"scheme {choice.scheme!r} takes {len(full)} rank(s), not {len(choice.ranks)}"
    if any(not 1 <= r <= f for r, f in zip(choice.ranks, full, strict=True)):
        return f"ranks {list(choice.ranks)} are outside 1 to {list(full)}"
    return None


def _disagreeing(choices: Mapping[str, Choice], sites: Sites, channels: ChannelMap) -> list[str]:
    """Where the widths of layers do not fit each other.

    A group of channels is as wide as its producers say, and all that it passes follows. Layers
    with problems of their own, which ``choices`` lacks, say nothing of the others.
    """
    if all(choice.width is None for choice in choices.values()):
        return []
    problems: list[str] = []
    unknown: set[str] = set()
    gone: dict[str, list[int]] = {}
    for group in groups_of(channels, sites.values()):
        layers = [name for name in group.modules if name in sites]
        widths = {
            slot.name: _width(choices[slot.name], sites[slot.name])[1]
            for slot in group.producers
            if slot.name in choices
        }
        if len(set(widths.values())) > 1:
            made = ", ".join(f"{width} of {name!r}" for name, width in widths.items())
            problems.append(f"layers that make the same channels do not keep as many: {made}")
        if len(set(widths.values())) != 1 or any(name not in choices for name in layers):
            unknown.update(layers)
            continue
        _take(gone, group, next(iter(widths.values())))
    for name, choice in choices.items():
        if name in unknown:
            continue
        width, whole = _width(choice, sites[name]), _whole(sites[name])
        inputs, outputs = gone.get(name, [0, 0])
        follows = (whole[0] - inputs, whole[1] - outputs)
        if width != follows:
            problems.append(
                f"layer {name!r}: its width is {list(width)}, and {list(follows)} is what the "
                f"widths of the layers around it leave{_why(name, channels)}"
            )
    return problems


def _width(choice: Choice, site: LayerSite) -> tuple[int, int]:
    return _whole(site) if choice.width is None else choice.width


def _take(gone: dict[str, list[int]], group: ChannelGroup, width: int) -> None:
    """Count the inputs and outputs that layers lose with a group of some width."""
    for slots, sides in (
        (group.producers, (1,)), (group.through, (0, 1)), (group.consumers, (0,)),
    ):  # fmt: skip
        for slot in slots:
            for side in sides:
                lost = (group.size - width) * slot.places.shape[1]
                gone.setdefault(slot.name, [0, 0])[side] += lost


def _why(name: str, channels: ChannelMap) -> str:
    """Why a layer's outputs are left, in brackets, where that is known."""
    reason = channels.left.get(name)
    return "" if reason is None else f" (its outputs are left: {reason})"
