"""The group of commands, and what becomes of an error: one paragraph and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from compress import __version__
from compress.commands.terminal import say
from compress.errors import CompressError, near_matches

INTERRUPTED = 130
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
DEBUG = "compress.debug"


class Commands(click.Group):
    """A click group whose errors are one paragraph on stderr, with the exit code they stand for."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: FBT001 - click's own signature
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and exit: 0, 1, 2, 3, 70 or 130 (see ``docs/reference/cli.md``)."""
        del standalone_mode  # errors are always handled here
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            text = " ".join(error.format_message().split()).rstrip(".")
            context = getattr(error, "ctx", None)
            hint = f" See '{context.command_path} --help'." if context else ""
            _explain(arguments, f"Error: {text}.{hint}")
            sys.exit(error.exit_code)
        except click.Abort:
            say("Interrupted; nothing was left behind.", err=True)
            sys.exit(INTERRUPTED)
        except CompressError as error:
            _explain(arguments, f"Error: {error}")
            sys.exit(error.exit_code)
        except Exception as error:
            text = " ".join(str(error).split())
            _explain(
                arguments,
                f"Error: unexpected {type(error).__name__}{f': {text}' if text else ''}. This is a "
                "defect of compress or something it did not foresee: run the same command with "
                "--debug and report what it prints.",
            )
            sys.exit(UNEXPECTED)
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name those nearest to what was typed."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            commands = self.list_commands(ctx)
            ctx.fail(
                f"No command {args[0]!r}.{near_matches(args[0], commands)} "
                f"The commands are {', '.join(commands)}."
            )
        return super().resolve_command(ctx, args)


def _explain(arguments: Sequence[str], message: str) -> None:
    """Print an error, after its traceback where --debug asks for that."""
    if "--debug" in arguments:
        for line in traceback.format_exc().splitlines():
            say(line, err=True)
    say(message, err=True)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "\b\nTry it:  compress demo\n"
        "Then:    compress run weights.pt --model torchvision:resnet18 \\\n"
        "           --data imagefolder:train --test imagefolder:val --output smaller"
    ),
)
@click.version_option(__version__, prog_name="compress")
def cli() -> None:
    """Compress a trained PyTorch network by low-rank factors, and prove what it costs.

    Calibrates on images without labels, chooses ranks, rewrites layers as short chains of plain
    layers, and verifies the result on held-out images before it saves it.
    """
