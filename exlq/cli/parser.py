"""The parser of the command line: flags in groups, help with examples, errors of one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from exlq import __doc__ as summary_of_exlq
from exlq import __version__
from exlq.cli.commands import COMMANDS, GROUPS

UNKNOWN = "unrecognized arguments: "
CHOICE = re.compile(r"argument COMMAND: invalid choice: '([^']*)'.*")


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that say what to do, and no abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(self._explained(message).split())}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            used = self._commands().get(getattr(parsed, "command", ""), self)
            used.error(UNKNOWN + " ".join(unknown))
        return parsed

    def _explained(self, message: str) -> str:
        """The message, with the nearest thing there is to what was not known."""
        if message.startswith(UNKNOWN):
            unknown = message.removeprefix(UNKNOWN).split()[0]
            return f"{unknown} is not known here{_nearest(unknown, self._option_string_actions)}"
        if found := CHOICE.fullmatch(message):
            return f"there is no command {found[1]}{_nearest(found[1], COMMANDS)}"
        return message

    def _commands(self) -> dict[str, Parser]:
        found = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}


def whole_parser() -> Parser:
    """The parser of `exlq` with all its commands."""
    parser = Parser(prog="exlq", description=summary_of_exlq, epilog=_overview())
    parser.add_argument("--version", action="version", version=f"exlq {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", dest="command", help=argparse.SUPPRESS, parser_class=Parser
    )
    for name, command in COMMANDS.items():
        module = import_module(f"exlq.cli.arguments.{command.module}")
        examples = "examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES)
        made = commands.add_parser(name, description=module.SUMMARY, epilog=examples)
        module.arrange(made)
        _arrange_screen(made.add_argument_group("what is shown"))
    return parser


def _overview() -> str:
    """All commands with what they do, by what they are for."""
    lines = []
    for group, title in GROUPS.items():
        lines.append(f"{title}:")
        for name, command in COMMANDS.items():
            if command.group == group:
                summary = import_module(f"exlq.cli.arguments.{command.module}").SUMMARY
                lines.append(f"  {name:<10} {summary}")
        lines.append("")
    return "\n".join([*lines, "exlq COMMAND --help says more of each."])


def _arrange_screen(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-q", "--quiet", action="store_true", help="the result alone: no plan, no progress")
    add("-v", "--verbose", action="store_true", help="a line for every step")
    add("--status-json", action="store_true", help="JSON lines on stdout, for other programs")
    add("--debug", action="store_true", help="the traceback of a failure")


def _nearest(name: str, known: Any) -> str:
    names: Sequence[str] = list(known)
    given = name.partition("=")[0]
    longer = [each for each in names if each.startswith(given)]
    found = longer or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
