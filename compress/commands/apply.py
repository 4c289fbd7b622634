"""``compress apply``: carry out a plan, perhaps edited."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.run import run_and_show
from compress.commands.terminal import Terminal
from compress.errors import PlanError
from compress.rules import RULE_NAMES

if TYPE_CHECKING:
    from compress.plan import Plan


@click.command(
    epilog=example(
        "compress apply plan.json --checkpoint resnet18.pth --data imagefolder:train \\",
        "  --test imagefolder:val --output smaller",
    )
)
@click.argument("plan_file", metavar="PLAN")
@click.option("--checkpoint", metavar="FILE", help="The checkpoint that the plan was made for.")
@click.option("--trust-code", is_flag=True, help="Import the code that the plan's model names.")
@configured(
    "model", "data", "test", "output", "schemes", "gates", "images", "calibration", "fit",
    "evaluation", "compute",
)  # fmt: skip
def apply(settings: Settings, terminal: Terminal, plan_file: str, *, trust_code: bool) -> None:
    """Carry out PLAN: fit, rewrite, verify, save, report. Model and metric are the plan's."""
    from compress.plan import read_plan

    plan = read_plan(plan_file)
    _check_trust(plan, settings, trust_code=trust_code)
    rule = {plan.rule: plan.value} if plan.rule in RULE_NAMES else {}
    config = settings.config(model=plan.model, metric=plan.metric, **rule)
    run_and_show(config, terminal, plan)


def _check_trust(plan: Plan, settings: Settings, *, trust_code: bool) -> None:
    """Reading a plan must not run code that the user did not name."""
    from compress.specs import needs_trust

    if settings.given("model") or trust_code or not plan.model or not needs_trust(plan.model):
        return
    raise PlanError(
        f"The plan's model is built by the code {plan.model!r}, which a plan must not run unasked: "
        "pass --model yourself, or --trust-code where you trust that code."
    )
