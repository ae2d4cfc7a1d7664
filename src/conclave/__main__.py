"""``python -m conclave``: the command line."""

from conclave.cli.main import main

if __name__ == "__main__":
    main()
