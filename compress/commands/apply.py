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
@configured(
    "model", "data", "test", "output", "schemes", "gates", "images", "calibration", "fit",
    "evaluation", "curve", "export", "compute",
)  # fmt: skip
def apply(settings: Settings, terminal: Terminal, plan_file: str) -> None:
    """Carry out PLAN: fit, rewrite, verify, save, report. Model and metric are the plan's."""
    from compress.plan import read_plan

    plan = read_plan(plan_file)
    _check_trust(plan, settings)
    rule = {plan.rule: plan.value} if plan.rule in RULE_NAMES else {}
    config = settings.config(model=plan.model, metric=plan.metric, **rule)
    run_and_show(config, terminal, plan)


def _check_trust(plan: Plan, settings: Settings) -> None:
    """Reading a plan must not run code that the user did not name."""
    from compress.trust import require_trusted_model

    if plan.model and not settings.given("model") and not settings.trust_code:
        require_trusted_model(plan.model, "The plan's model", PlanError)
