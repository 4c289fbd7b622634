"""Fitting a plan, perhaps edited, to the model it is applied to."""

from __future__ import annotations

from dataclasses import replace

from compress.choose.choices import make_choice
from compress.errors import PlanError, near_matches
from compress.linalg.schemes import scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, Choice, Plan


def check_plan(plan: Plan, sites: tuple[LayerSite, ...]) -> Plan:
    """Fit a plan, perhaps edited, to the model: costs and limits made anew.

    Raises:
        PlanError: It names a layer that the model lacks, lacks one that the model has, or asks a
            layer for what it cannot be; all problems are listed.
    """
    by_name = {site.name: site for site in sites}
    problems = []
    choices = []
    for choice in plan.choices:
        site = by_name.pop(choice.name, None)
        if site is None:
            problems.append(f"no layer {choice.name!r} in the model")
            continue
        problem = _misfit(choice, site)
        if problem is not None:
            problems.append(f"layer {choice.name!r}: {problem}")
            continue
        made = make_choice(
            site, choice.scheme, choice.ranks, choice.reason, choice.break_even, choice.width
        )
        choices.append(replace(made, locked=choice.locked))
    problems += [f"layer {name!r} is missing from the plan" for name in by_name]
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(f"The plan does not fit the model: {shown}{more}.")
    order = {site.name: i for i, site in enumerate(sites)}
    choices.sort(key=lambda c: order[c.name])
    return Plan(
        plan.rule, plan.value, plan.metric, tuple(choices),
        plan.model, plan.source_sha256, plan.calibration,
    )  # fmt: skip


def _misfit(choice: Choice, site: LayerSite) -> str | None:
    if choice.shape != site.shape or choice.kind != site.kind:
        return f"the plan has {choice.kind} {choice.shape}, the model {site.kind} {site.shape}"
    if choice.scheme == DENSE:
        return None if not choice.ranks else "a dense layer has no ranks"
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
