"""A conversation: what has been said, and the commands that change it."""

from __future__ import annotations

from dataclasses import dataclass, replace

COMMANDS = {
    "/exit": "end the chat (also Ctrl-D)",
    "/reset": "forget what was said, keep the system text",
    "/system TEXT": "begin anew with this system text; without TEXT, with none",
    "/help": "these commands",
}
HELP = "\n".join(
    [*(f"{name:<13} {what}" for name, what in COMMANDS.items()), "Ctrl-C ends an answer, not the chat."]
)


@dataclass(frozen=True)
class Conversation:
    """What has been said: the system text, and turns of user and assistant."""

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # role, content

    def messages(self, user: str) -> list[dict[str, str]]:
        """As chat templates take it, with what the user says now at the end."""
        said = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in (*said, *self.turns, ("user", user))]

    def after(self, user: str, answer: str) -> Conversation:
        return replace(self, turns=(*self.turns, ("user", user), ("assistant", answer)))


@dataclass(frozen=True)
class Command:
    """What a command leads to: the conversation after it, what to say of it, whether the chat ends."""

    conversation: Conversation
    said: str
    ends: bool = False


def command(line: str, now: Conversation) -> Command | None:
    """What a line that begins with a slash means; None for one that does not, which is for the model."""
    if not line.startswith("/"):
        return None
    name, _, text = line.partition(" ")
    known = {
        "/exit": Command(now, "", ends=True),
        "/reset": Command(Conversation(now.system), "The conversation begins anew."),
        "/system": Command(Conversation(text.strip()), "The conversation begins anew with this system text."),
        "/help": Command(now, HELP),
    }
    return known.get(name, Command(now, f"There is no command {name}.\n{HELP}"))
