"""Part of `generate`: the texts to continue, from the flags or from a file, as they stand there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.generation.config import Config

_logger = logging.getLogger(__name__)
_MANY = 5


def read_prompts(config: Config) -> list[str]:
    """The prompts of `--prompt` or `--prompts-file`.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a prompt is no text that UTF-8 can write.
    """
    if config.prompts_file is None:
        prompts, flag = list(config.prompt), "--prompt"
    else:
        prompts, flag = _read_lines(config.prompts_file), f"--prompts-file {config.prompts_file}"
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


def _read_lines(path: Path) -> list[str]:
    """Every line that is not blank; a line ends at a line feed, or a carriage return and a line feed."""
    if not path.exists():
        raise UserError(f"--prompts-file {path} does not exist: give a text file with one prompt a line")
    if path.is_fifo():
        _logger.info("--prompts-file %s is a pipe: reading until its writer closes it", path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts-file {path} cannot be read as UTF-8 text ({error}): give a text file"
            " with one prompt a line"
        ) from error
    # Not str.splitlines, which also ends a line at a form feed or U+2028 inside it.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompt: write one a line")
    if blank:
        _logger.warning(
            "--prompts-file %s: %d blank lines are no prompts and are left out (%s)",
            path,
            len(blank),
            _some(blank),
        )
    return prompts


def _some(numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > _MANY else ""
    return f"line {', '.join(map(str, numbers[:_MANY]))}{more}"
