"""What the commands of a chat do."""

from __future__ import annotations

from exlq.run.conversation import COMMANDS, Conversation, command

BEGUN = Conversation("be kind").after("hi", "hello")


def test_a_conversation_is_what_templates_take() -> None:
    assert BEGUN.messages("how?") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how?"},
    ]
    assert [m["role"] for m in Conversation().messages("hi")] == ["user"]


def test_commands_change_what_was_said() -> None:
    exits, reset, system, none, wrong = (
        command(line, BEGUN) for line in ("/exit", "/reset", "/system be brief ", "/system", "/rest")
    )
    assert exits is not None
    assert exits.ends
    assert reset is not None
    assert reset.conversation == Conversation("be kind")
    assert system is not None
    assert system.conversation == Conversation("be brief")
    assert none is not None
    assert none.conversation == Conversation()
    assert wrong is not None
    assert (wrong.conversation, wrong.ends) == (BEGUN, False)
    assert "no command /rest" in wrong.said
    assert all(name in wrong.said for name in COMMANDS)


def test_what_begins_without_a_slash_is_for_the_model() -> None:
    assert command("exit", BEGUN) is None
