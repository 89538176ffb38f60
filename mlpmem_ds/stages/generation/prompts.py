"""Part of `generate`: the texts to continue, from the flags or from a file, as they stand there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import BinaryIO

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.json_lines import JsonRecord, json_records, text_lines
from mlpmem_ds.stages.generation.config import Config

_logger = logging.getLogger(__name__)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_MANY = 5


def read_prompts(config: Config) -> list[str]:
    """The prompts of `--prompt` or `--prompts-file`, as they stand there.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a prompt is no text that UTF-8 can write.
    """
    if config.prompts_file is None:
        prompts, flag = [_as_utf_8(prompt) for prompt in config.prompt], "--prompt"
    else:
        prompts, flag = _read_file(config.prompts_file), f"--prompts-file {config.prompts_file}"
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{flag}: prompt {number} holds {prompt[error.start]!r} at character {error.start + 1:,},"
                " which is no text: give it as UTF-8 (a terminal in another encoding gives such bytes), or in"
                " a --prompts-file in UTF-8"
            ) from error
    return prompts


def _as_utf_8(prompt: str) -> str:
    """A word of the command line; by UTF-8 also where the locale's encoding is ASCII (POSIX)."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return prompt


def _read_file(path: Path) -> list[str]:
    """Every line that is not blank. A line ends at a line feed: a form feed or U+2028 may stand inside it."""
    if not path.exists():
        raise UserError(f"--prompts-file {path} does not exist: give a text file with one prompt a line")
    if path.is_fifo():
        _logger.info("--prompts-file %s is a pipe: reading until its writer closes it", path)
    name = f"--prompts-file {path}"
    try:
        with path.open("rb") as stream:
            if path.suffix.lower() in _JSON_SUFFIXES:
                prompts = [_prompt_of(name, record) for record in json_records(stream, name=name)]
            else:
                prompts = _lines_of(stream, name)
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
    return value
