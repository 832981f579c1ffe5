"""`python -m qjax` is the command `qjax`."""

import sys

from qjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
