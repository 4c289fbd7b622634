"""Run the command line from a checkout: ``python cli.py run ...``, the same as ``compress run ...``."""

from compress.commands import main

if __name__ == "__main__":
    main()
