"""`python -m hope` is the `hope` command."""

import sys

from hope.cli import main

if __name__ == "__main__":
    sys.exit(main())
