"""The group of commands, and what becomes of an error: one paragraph and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from compress import __version__
from compress.commands.apply import apply
from compress.commands.demo import demo
from compress.commands.evaluate import evaluate
from compress.commands.export import export
from compress.commands.inspect import inspect
from compress.commands.interruption import INTERRUPTED, say_interrupted
from compress.commands.output import cannot_print, discard, say
from compress.commands.plan import plan
from compress.commands.recover import recover
from compress.commands.report import report
from compress.commands.run import run
from compress.commands.sweep import sweep
from compress.commands.verify import verify
from compress.errors import ArtefactError, CompressError, near_matches, what_raised

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended


class _NobodyReads(Exception):  # noqa: N818 - an end, not an error
    """The pipe that the output goes into has been closed."""


@contextmanager
def _read_by_somebody() -> Iterator[None]:
    """Keep a closed pipe from click, which ends the program with the code of a broken limit."""
    try:
        yield
    except BrokenPipeError as error:
        raise _NobodyReads from error


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
        """Run a command line and exit: 0 to 3, 70, 130 or 141 (see ``docs/reference/cli.md``)."""
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
        except _NobodyReads:
            discard(sys.stdout)
            sys.exit(BROKEN_PIPE)
        except click.Abort:
            say_interrupted()
            sys.exit(INTERRUPTED)
        except CompressError as error:
            _explain(arguments, " ".join((f"Error: {error}", *_notes(error))))
            sys.exit(error.exit_code)
        except Exception as error:
            sys.exit(_explain_unexpected(arguments, error))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            sys.exit(_explain_ended(arguments, error))
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the command line."""
        with _read_by_somebody():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _read_by_somebody():
            return super().invoke(ctx)

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


def _explain_unexpected(arguments: Sequence[str], error: Exception) -> int:
    """Say what was not foreseen; return the exit code."""
    if isinstance(error, OSError) and _room(error) == "click":  # its help, which it prints itself
        discard(sys.stdout)
        _explain(arguments, f"Error: {cannot_print(error)}")
        return CompressError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = f"{str(error.filename)[:40]}…"
        _explain(arguments, f"Error: {name} is too long a name for a file; pass a shorter one.")
        return CompressError.exit_code
    text = " ".join(str(error).split())
    _explain(
        arguments,
        f"Error: unexpected {type(error).__name__}{f': {text}' if text else ''}. This is a defect "
        "of compress or something it did not foresee: run the same command with --debug and report "
        + " ".join(("what it prints.", *_notes(error))),
    )
    return UNEXPECTED


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way, such as where the work is kept."""
    return list(getattr(error, "__notes__", ()))


def _explain_ended(arguments: Sequence[str], error: BaseException) -> str | int | None:
    """Say that the user's code ended the program, unless it did not; return the exit code.

    Without a word it would end the program as if all was done.
    """
    if isinstance(error, SystemExit) and _room(error) in ("click", "compress"):
        return error.code
    _explain(
        arguments,
        "Error: The code of the model, the data or a function of yours ended the program: it "
        f"raised {what_raised(error)}. Let it return, or raise an ordinary exception.",
    )
    return CompressError.exit_code


def _room(error: BaseException) -> str:
    """The package whose code raised an error."""
    traceback, module = error.__traceback__, ""
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__"))
        traceback = traceback.tb_next
    return module.partition(".")[0]


def _explain(arguments: Sequence[str], message: str) -> None:
    """Print an error, after its traceback where --debug asks for that."""
    try:
        if "--debug" in arguments:
            say(*traceback.format_exc().splitlines(), err=True)
        say(message, err=True)
    except (BrokenPipeError, ArtefactError):  # nobody is left to be told; the exit code says it
        discard(sys.stderr)


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


for command in (
    run, inspect, plan, apply, recover, sweep, report, verify, evaluate, export, demo,
):  # fmt: skip
    cli.add_command(command)
