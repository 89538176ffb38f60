"""Part of `generate`: the texts to continue, from the flags or from a file, as they stand there; with --chat
the conversations to answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.chats import ANSWERS, CHAT_LISTS, Conversation, NoConversationError, conversation_of
from mlpmem_ds.formats.json_lines import JsonRecord, json_records, text_lines
from mlpmem_ds.stages.generation.config import Config

_logger = logging.getLogger(__name__)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_MANY = 5
T = TypeVar("T")


def read_prompts(config: Config) -> list[str]:
    """The prompts of `--prompt` or `--prompts-file`, as they stand there.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a prompt is no text that UTF-8 can write.
    """
    if config.prompts_file is None:
        prompts, flag = [_as_utf_8(prompt) for prompt in config.prompt], "--prompt"
    else:
        flag = f"--prompts-file {config.prompts_file}"
        prompts = _read_file(config.prompts_file, _prompt_of)
    for number, prompt in enumerate(prompts, start=1):
        _check_text(prompt, f"{flag}: prompt {number}")
    return prompts


def read_conversations(config: Config) -> list[Conversation]:
    """What `--chat` answers: each prompt is said by a user, after `--system`; a line of JSON may hold a
    conversation of its own.

    Raises:
        UserError: as `read_prompts`; also for what is no conversation, one that the assistant ended, or one
            with two system messages at its head.
    """
    if config.prompts_file is None:
        conversations = [_said_by_a_user(prompt) for prompt in read_prompts(config)]
    else:
        read = _read_file(config.prompts_file, _conversation_of)
        conversations = [_said_by_a_user(one) if isinstance(one, str) else one for one in read]
        for number, one in enumerate(conversations, start=1):
            _check_text(one.to_text(), f"--prompts-file {config.prompts_file}: conversation {number}")
    if config.system is None:
        return conversations
    system = {"role": "system", "content": _as_utf_8(config.system)}
    _check_text(system["content"], "--system")
    for number, one in enumerate(conversations, start=1):
        if one.messages[0]["role"] == "system":
            raise UserError(
                f"--prompts-file {config.prompts_file}: conversation {number} has a system message of its"
                " own, and --system gives another: leave out one of the two"
            )
    return [replace(one, messages=(system, *one.messages)) for one in conversations]


def _said_by_a_user(prompt: str) -> Conversation:
    return Conversation(messages=({"role": "user", "content": prompt},))


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds {text[error.start]!r} at character {error.start + 1:,}, which is no text: give it"
            " as UTF-8 (a terminal in another encoding gives such bytes), or in a --prompts-file in UTF-8"
        ) from error


def _as_utf_8(prompt: str) -> str:
    """A word of the command line; by UTF-8 also where the locale's encoding is ASCII (POSIX)."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return prompt


def _read_file(path: Path, read_json_line: Callable[[str, JsonRecord], T]) -> list[str | T]:
    """Every line that is not blank; of a file of JSON what `read_json_line` makes of each. A line ends at a
    line feed: a form feed or U+2028 may stand inside it."""
    if not path.exists():
        raise UserError(f"--prompts-file {path} does not exist: give a text file with one prompt a line")
    if path.is_fifo():
        _logger.info("--prompts-file %s is a pipe: reading until its writer closes it", path)
    name = f"--prompts-file {path}"
    try:
        with path.open("rb") as stream:
            if path.suffix.lower() in _JSON_SUFFIXES:
                prompts: list[str | T] = [
                    read_json_line(name, each) for each in json_records(stream, name=name)
                ]
            else:
                prompts = [*_lines_of(stream, name)]
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror}): give a text file with one prompt a line"
        ) from error
    if not prompts:
        raise UserError(f"{name} holds no prompt: write one a line")
    return prompts


def _lines_of(stream: BinaryIO, name: str) -> list[str]:
    lines = list(text_lines(stream, name=name))
    if zero := next((number for number, line in lines if "\0" in line), None):
        raise UserError(
            f"{name} line {zero} holds zero bytes, as UTF-16 without a mark has: write the file as UTF-8, or"
            " as JSON lines (.jsonl) if they are meant"
        )
    blank = [number for number, line in lines if not line.strip()]
    if 0 < len(blank) < len(lines):
        more = ", …" if len(blank) > _MANY else ""
        _logger.warning(
            "%s: blank lines are no prompts and are left out: %d (line %s%s)",
            name, len(blank), ", ".join(map(str, blank[:_MANY])), more,
        )  # fmt: skip
    return [line for _, line in lines if line.strip()]


def _prompt_of(name: str, record: JsonRecord) -> str:
    value = record.value.get("prompt") if isinstance(record.value, dict) else record.value
    if not isinstance(value, str):
        raise UserError(f"{name}, {record.place} is no text and has none in `prompt`: write one of the two")
    if isinstance(record.value, dict) and record.value.get("system"):
        raise UserError(
            f"{name}, {record.place} has a system message, which only --chat reads: add it, or leave that out"
        )
    return value


def _conversation_of(name: str, record: JsonRecord) -> str | Conversation:
    """The conversation of a line, or the one text that a user says."""
    value = record.value
    if not isinstance(value, dict):
        return _prompt_of(name, record)
    if isinstance(prompt := value.get("prompt"), str):
        if listed := [field for field in CHAT_LISTS if value.get(field) is not None]:
            raise UserError(
                f"{name}, {record.place} has both `prompt` and `{listed[0]}`: leave out one of them"
            )
        said = [{"role": "user", "content": prompt}]
        value = {"messages": said, "system": value.get("system"), "tools": value.get("tools")}
    try:
        conversation = conversation_of(value)
    except NoConversationError as error:
        raise UserError(f"{name}, {record.place} is no text and no conversation: {error}") from error
    if not conversation.messages or conversation.messages[-1]["role"] == ANSWERS:
        raise UserError(
            f"{name}, {record.place}: nothing is left to answer after its last message: end it with what the"
            " user says"
        )
    if [message["role"] for message in conversation.messages[:2]] == ["system", "system"]:
        raise UserError(f"{name}, {record.place} has two system messages at its head: leave out one of them")
    return conversation
