"""The commands there are: where their flags and their work are, and what each is for."""

from __future__ import annotations

from typing import NamedTuple

NOTHING_LOST = "nothing was left half written"
GOES_ON = "the same command goes on after the last finished block"
SO_FAR = "what came is above"


class Command(NamedTuple):
    """`module` names both `exlq.cli.arguments.<module>`, its flags, and `exlq.cli.<module>`, its work."""

    module: str
    group: str
    interrupted: str = NOTHING_LOST


COMMANDS: dict[str, Command] = {
    "convert": Command("convert", "make", GOES_ON),
    "quantize": Command("quantize", "make"),
    "imatrix": Command("imatrix", "make"),
    "plan": Command("plan", "look"),
    "solve": Command("solve", "look"),
    "explain": Command("explain", "look"),
    "eval": Command("evaluate", "look"),
    "inspect": Command("inspect", "look"),
    "doctor": Command("doctor", "look"),
    "report": Command("report", "look"),
    "run": Command("run", "use", SO_FAR),
    "chat": Command("chat", "use"),
    "serve": Command("serve", "use"),
}
GROUPS = {
    "make": "Make a model",
    "look": "Choose and look",
    "use": "Use a model",
}
