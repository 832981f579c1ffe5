"""The command line: `qjax COMMAND`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qjax.cli import accumulators, compilation_cache, explain, export, quantize, study, trace
from qjax.cli.output import patient
from qjax.cli.signals import Stopped, stopping
from qjax.cli.wording import worded, words_of
from qjax.table import printable

COMMANDS = (
    *(trace.COMMAND, quantize.COMMAND, explain.COMMAND, accumulators.COMMAND, study.COMMAND),
    export.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: its arguments; by default those of the process.

    Returns:
      The exit code: 0; 2 for bad input, with the reason on standard error; 130 after Ctrl-C and
      143 after SIGTERM.
    """
    try:
        with stopping(), patient():
            arguments = _parser().parse_args(argv)
            with compilation_cache.caching(arguments), worded(words_of(arguments)):
                arguments.run(arguments)
    except Stopped as stopped:
        print(f"qjax: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, ImportError) as error:
        print(f"qjax: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qjax", description="Post-training quantization of JAX networks.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name, help=command.summary, description=command.description
        )
        command.add_arguments(own)
        compilation_cache.add_argument(own.add_argument)
        own.set_defaults(run=command.run)
    return parser
