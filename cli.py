"""Run the command line from a checkout: ``python cli.py run ...`` is ``compress run ...``."""

from compress.commands import main

if __name__ == "__main__":
    main()
