"""``python -m prunevit``: the command ``prunevit``."""

from prunevit.cli import main

if __name__ == "__main__":
    main()
