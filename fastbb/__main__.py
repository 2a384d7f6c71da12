"""`python -m fastbb` is the command `fastbb`."""

from .cli import main

if __name__ == "__main__":
    main()
