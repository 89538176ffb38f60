"""Conversations as data sets hold them, brought to one form: messages of the roles system, user, assistant
and tool.

    {"messages": [{"role": "user", "content": "…"}, …]}          OpenAI, and most data sets of the Hub
    {"conversations": [{"from": "human", "value": "…"}, …]}      ShareGPT
    {"prompt": "…", "completion": "…"}                           or "response"; texts, or lists of messages
    {"instruction": "…", "input": "…", "output": "…"}            Alpaca; "context", "response": Dolly

A conversation travels through the corpus' readers as a text, its canonical JSON, so that it is hashed, dealt
and listed as every document is; `engines/chat_template.py` renders it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import Record, RepeatedFieldError, field_of, group_name, listed, partition_of

Message = dict[str, Any]
ANSWERS = "assistant"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": ANSWERS, "gpt": ANSWERS, "chatgpt": ANSWERS, "bot": ANSWERS, "model": ANSWERS,
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""what data sets call them → what templates call them"""
CHAT_LISTS = ("messages", "conversations", "conversation", "chat")
"""fields that may hold a list of messages"""
_PAIRS = (("prompt", ("completion", "response")), ("instruction", ("output", "response")))
_MORE = ("input", "context")  # of an instruction
CHAT_FIELDS = (
    *CHAT_LISTS,
    "prompt",
    "completion",
    "response",
    "instruction",
    "output",
    *_MORE,
    "system",
    "tools",
)
"""the fields that are read of a table"""
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # of a message, for templates that use it


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with `role` (a value of ROLES) and `content`, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()

    @property
    def answers(self) -> list[str]:
        """What the assistant says, turn by turn."""
        return [message["content"] for message in self.messages if message["role"] == ANSWERS]

    @property
    def has_answer(self) -> bool:
        """Whether the assistant says something, or calls a tool."""
        return any(says_something(message) for message in self.messages if message["role"] == ANSWERS)

    def to_text(self) -> str:
        values: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            values["tools"] = list(self.tools)
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Conversation:
        values = json.loads(text)
        return cls(messages=tuple(values["messages"]), tools=tuple(values.get("tools", ())))


def says_something(message: Message) -> bool:
    """Whether a message has a text or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


class NoConversationError(ValueError):
    """An object is no conversation; the message says why, and what to do."""


def chat_record(path: Path, place: str, key: str, values: Any, group_field: str | None) -> Record | Omission:
    """The record of an object with a conversation; an omission where it has no answer.

    Raises:
        UserError: it holds no conversation, or a role that no one knows; names the place.
    """
    try:
        if not isinstance(values, Mapping):
            raise NoConversationError("it is no object: mend it or leave the file out")
        conversation = conversation_of(values)
        if not conversation.has_answer:
            return Omission(name=key, reason="no answer")
        text = conversation.to_text()
        text.encode()  # half a surrogate pair is no text
        return Record(key=key, text=text, group=_group(path, values, group_field))
    except (NoConversationError, UnicodeError, TypeError) as error:
        raise UserError(f"{path} {place} is no conversation: {error}") from error
    except RepeatedFieldError as error:
        raise UserError(f"{path} {place}: its {error} stands there more than once: mend it") from error


def _group(path: Path, values: Mapping[str, Any], name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return group_name(field_of(values, name))
    except KeyError:
        try:
            return partition_of(path, name)
        except KeyError as error:
            raise NoConversationError(
                f"it has no field {name!r} (it has {listed(values)}): name one with --group-field"
            ) from error


def conversation_of(values: Mapping[str, Any]) -> Conversation:
    """The conversation in an object of one of the forms above.

    Raises:
        NoConversationError: it has none of these forms, or a message has another one.
    """
    tools = tuple(_parsed(values.get("tools")) or ())
    system = values.get("system")
    before = [{"role": "system", "content": _content(system)}] if system else []
    for name in CHAT_LISTS:
        found = _parsed(values.get(name))
        if found is not None:
            return Conversation(messages=(*before, *_messages(name, found)), tools=tools)
    for question, answers in _PAIRS:
        answer = next((name for name in answers if values.get(name) is not None), None)
        if values.get(question) is not None and answer is not None:
            asked, said = values[question], values[answer]
            messages = (*_turns(question, asked, "user", values), *_turns(answer, said, ANSWERS, values))
            return Conversation(messages=(*before, *messages), tools=tools)
    raise NoConversationError(
        f"it has the fields {listed(values)}; needed are messages, conversations, prompt and completion, or"
        " instruction and output"
    )


def _parsed(value: Any) -> Any:
    """Some tables hold lists as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _turns(name: str, value: Any, role: str, values: Mapping[str, Any]) -> list[Message]:
    """A side of a pair: messages, or the text of one."""
    value = _parsed(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _messages(name, value)
    content = _content(value)
    if name == "instruction":
        parts = [_content(values[more]) for more in _MORE if values.get(more)]
        content = "\n\n".join([content, *parts])
    return [{"role": role, "content": content}]


def _messages(name: str, value: Any) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise NoConversationError(f"its {name} is {type(value).__name__}, not a list of messages")
    return [_message(name, number, message) for number, message in enumerate(value, start=1)]


def _message(name: str, number: int, message: Any) -> Message:
    where = f"message {number} of its {name}"
    if not isinstance(message, Mapping):
        raise NoConversationError(f"{where} is {type(message).__name__}, not an object with role and content")
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise NoConversationError(
            f"{where} has the role {role!r}; these are known: {', '.join(ROLES)}: rename it or leave it out"
        )
    try:
        content = _content(
            next((message[key] for key in ("content", "value") if message.get(key) is not None), None)
        )
    except NoConversationError as error:
        raise NoConversationError(f"{where}: {error}") from error
    others = {key: message[key] for key in _KEPT if message.get(key) is not None}
    return {"role": ROLES[role.lower()], "content": content, **others}


def _content(value: Any) -> str:
    """A text, or the texts of a list of parts; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "".join(_part(part) for part in value)
    raise NoConversationError(f"a content is {type(value).__name__}, not text")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise NoConversationError(f"a content has a part of type {kind!r}, and only text is read: leave it out")
