"""The command line: arguments, screen, exit codes. The only place that prints."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from exlq.cli.commands import COMMANDS
from exlq.cli.parser import Parser, whole_parser
from exlq.cli.screen import Screen, make_screen
from exlq.errors import ExlqError, InputError

INTERRUPTED = 130  # as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """`exlq COMMAND …`; the exit code: 0 done, 1 the work failed, 2 the input cannot be used."""
    parsed = whole_parser().parse_args(arguments)
    _quiet_libraries()
    with make_screen(parsed) as screen:
        if parsed.debug:
            _run(parsed, screen)
            return 0
        return _exit_code(parsed, screen)


def convert_main() -> int:
    """`python scripts/convert.py …`: the `convert` command alone."""
    return main(["convert", *sys.argv[1:]])


def _run(parsed: argparse.Namespace, screen: Screen) -> None:
    module = import_module(f"exlq.cli.{COMMANDS[parsed.command].module}")
    if getattr(parsed, "threads", None) is not None:
        import_module("exlq.cli.threads").use(parsed.threads)
    module.run(parsed, screen)


def _exit_code(parsed: argparse.Namespace, screen: Screen) -> int:
    """Runs the command; every failure becomes one line."""
    try:
        _run(parsed, screen)
    except ExlqError as exc:
        code = 2 if isinstance(exc, InputError) else 1
        screen.fail(str(exc), code)
        return code
    except OSError as exc:
        advice = ADVICE.get(exc.errno or 0, "")
        screen.fail(f"{exc.filename or 'a file'}: {exc.strerror or exc}{advice}", 1)
        return 1
    except MemoryError:
        screen.fail("there is not enough memory; close other programs, then give the command again", 1)
        return 1
    except KeyboardInterrupt:
        screen.fail(f"interrupted; {COMMANDS[parsed.command].interrupted}", INTERRUPTED)
        return INTERRUPTED
    except Exception as exc:
        screen.fail(f"a fault of exlq: {type(exc).__name__}: {exc}; --debug shows where, please report it", 1)
        return 1
    return 0


_FULL = "; make room, then give the command again: what is done is kept"
_CLOSED = "; choose a place that can be written to"
ADVICE: Mapping[int, str] = {  # what to do where the system refuses
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "; lift the limit of a file's size (ulimit -f) or choose another disk",
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
}


def _quiet_libraries() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)


__all__ = ["Parser", "convert_main", "main"]
