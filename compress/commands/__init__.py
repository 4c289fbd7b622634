"""The command line: ``compress run``, ``inspect``, ``plan``, ... as one click group.

Importing this package imports nothing yet, so that `main` can answer Ctrl-C from the first moment.
No command imports torch before it needs it, so that ``compress --help`` is quick.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    from compress.commands.interruption import ending_cleanly

    with ending_cleanly():
        import sys
        import warnings

        from compress.commands.group import cli

        if "--debug" not in sys.argv and not sys.warnoptions:
            # What torch and a user's forward warn of would stand before an error's one paragraph.
            warnings.simplefilter("ignore")
        cli.main(prog_name="compress")
