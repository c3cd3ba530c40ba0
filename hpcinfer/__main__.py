"""`hpcinfer COMMAND`: each command is one file. Nothing heavy is imported before the arguments are parsed."""

import argparse
import importlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from hpcinfer import __version__
from hpcinfer.comm.launcher import let_first_speak, read_launch
from hpcinfer.errors import EXIT_USAGE, HpcInferError, PeerError, storage_error

COMMANDS = ("run", "convert", "evaluate", "inspect", "status", "merge", "doctor", "calibrate", "supervise", "study")


class _Parser(argparse.ArgumentParser):
    """Speaks on the first rank only, so that a wrong option is said once and not by every rank."""

    def error(self, message: str) -> NoReturn:
        if read_launch().rank == 0:
            self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n  hint: {self.prog} --help\n")
        let_first_speak()
        sys.exit(EXIT_USAGE)


def build_parser(prog: str = "hpcinfer", names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Make the parser of commands."""
    parser = _Parser(prog=prog, description="Distributed LLM inference for HPC clusters: prompts in, completions out.")
    parser.add_argument("--version", action="version", version=f"hpcinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name in names:
        module = importlib.import_module(f"hpcinfer.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False,
                                      epilog=f"example:\n  {module.EXAMPLE}",
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.command, parser=command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args))
    except PeerError as error:
        return error.exit_code
    except HpcInferError as error:
        return _say(error)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if refusal := storage_error(error):
            return _say(refusal)
        raise


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; of a command that is named first, no other's module is imported."""
    names = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS
    with _untranslated():
        args, unknown = build_parser(names=names).parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


@contextmanager
def _untranslated() -> Iterator[None]:
    """Keep argparse from looking for a catalogue of its words, in four files for each of some thirty texts."""
    before = os.environ.get("LANGUAGE")
    os.environ["LANGUAGE"] = "C"
    try:
        yield
    finally:
        os.environ.pop("LANGUAGE")
        if before is not None:
            os.environ["LANGUAGE"] = before


def _say(error: HpcInferError) -> int:
    """Print an error, with rank, size and host where a launcher has started several ranks."""
    launch = read_launch()
    who = f"rank {launch.rank}/{launch.size} on {socket.gethostname()}: " if launch.size > 1 else ""
    print(f"{type(error).__name__}: {who}{error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
