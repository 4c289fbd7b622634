"""``compress demo``: the whole path on what the package carries."""

from __future__ import annotations

from pathlib import Path

import click

from compress.commands.options import Settings, configured, example
from compress.commands.output import say
from compress.commands.run import run_and_show
from compress.commands.terminal import Terminal

OUTPUT = "demo-result"


@click.command(
    epilog=example(
        "compress demo",
        "compress demo --macs 0.3 --output smaller-digits",
    )
)
@configured("output", "rules", "schemes", "gates", "curve", "compute")
def demo(settings: Settings, terminal: Terminal) -> None:
    """Compress the embedded network with the embedded images: no download, under a minute.

    A network of six convolutions that reads handwritten digits. The result is written to
    ./demo-result, where an earlier demo's is replaced, unless --output says otherwise.
    """
    if not settings.given("output"):
        settings.flags.update(output=OUTPUT, force=True)
    folder = Path(__file__).resolve().parents[1] / "demo_data"
    config = settings.config(
        checkpoint=str(folder / "digits-width32.safetensors"),
        model="compress.demo_data.network:width32",
        data=f"tensors:{folder / 'digits-train.npz'}",
        test=f"tensors:{folder / 'digits-test.npz'}",
        resize=28,
        max_drop=1.0,
    )
    run_and_show(config, terminal)
    if not terminal.quiet and not terminal.as_json:
        say(f"Open {config.output}/report.html in a browser for the whole story.")
