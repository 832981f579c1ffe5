"""Quantizes a pretrained model and compares it with the float one; see --help."""

import sys

from qjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
