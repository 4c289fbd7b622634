"""``python -m compress.commands``: the command line where no console script is installed."""

from compress.commands import main

if __name__ == "__main__":
    main()
