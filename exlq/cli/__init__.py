"""The command line: arguments, progress, exit codes. The only place that prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from exlq import __doc__ as summary_of_exlq
from exlq import __version__
from exlq.cli import convert, evaluate, imatrix, quantize
from exlq.cli.shared import errors
from exlq.errors import ConfigError, ExlqError, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """`exlq COMMAND …`; the exit code: 0 done, 1 the work failed, 2 the input cannot be used."""
    parser = argparse.ArgumentParser(prog="exlq", description=summary_of_exlq)
    parser.add_argument("--version", action="version", version=f"exlq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.arrange(command)
        command.set_defaults(run=module.run)
    return _run(parser.parse_args(arguments))


def convert_main() -> int:
    """`python scripts/convert.py …`: the `convert` command alone."""
    return main(["convert", *sys.argv[1:]])


def _run(parsed: argparse.Namespace) -> int:
    _quiet_libraries()
    try:
        if parsed.threads is not None:
            if parsed.threads < 1:
                raise ConfigError(f"--threads {parsed.threads}: at least 1 is wanted")
            torch.set_num_threads(parsed.threads)
        parsed.run(parsed)
    except ExlqError as exc:
        _fail(str(exc))
        return 2 if isinstance(exc, InputError) else 1
    except OSError as exc:
        _fail(f"{exc.filename or 'a file'}: {exc.strerror or exc}")
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it can")
        return 130
    return 0


def _fail(message: str) -> None:
    errors.print(f"error: {' '.join(message.split())}", markup=False, highlight=False)


def _quiet_libraries() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)


COMMANDS: Mapping[str, ModuleType] = {
    "convert": convert,
    "eval": evaluate,
    "imatrix": imatrix,
    "quantize": quantize,
}
