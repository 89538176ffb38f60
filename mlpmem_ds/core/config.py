"""From a frozen dataclass to a command line: each field is a flag, its metadata the help, its default the
default.

Flags are spelled with hyphens (`--block-size`) and accepted with underscores too (`--block_size`), which is
how DeepSpeed's users write them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from mlpmem_ds.core.errors import UserError

ConfigType = TypeVar("ConfigType")
_WIDTH = 118  # columns of the help
_MAX_DIGITS = 20  # of a whole number, so that 1e999999 is refused and not written out


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    identity: bool = True,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    positional: bool = False,
) -> Any:
    """A field of a Config.

    Args:
        help: one line with the unit.
        default: left out for a required flag.
        identity: whether the field decides the bytes of the result; a rerun that changes such a field is
            refused, while the others (batch sizes, devices, threads) may change from run to run.
        parse: text to value, where the field's type alone does not say it.
        metavar: the placeholder in the help.
        flag: the flag's name without hyphens in front, where it is not the field's (`lambda` is a word of
            Python).
        choices: the words allowed, where the type does not list them.
        positional: the value is given as a word of its own; the flag is accepted too. For a required field.
    """
    metadata = {
        "help": help,
        "identity": identity,
        "parse": parse,
        "metavar": metavar,
        "flag": flag,
        "choices": choices,
        "positional": positional,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(
    config_class: type[ConfigType],
    argv: Sequence[str] | None,
    *,
    prog: str | None,
    description: str,
    example: str,
) -> ConfigType:
    """Read a Config from the command line; on a wrong flag argparse prints the usage and exits with 2."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=textwrap.fill(description, _WIDTH),
        epilog=f"example:\n  {example}",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=_WIDTH
        ),
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        _add_flag(parser, field, hints[field.name])
    words = [_hyphenate(word) for word in (sys.argv[1:] if argv is None else argv)]
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if field.metadata["positional"]:
            words = [word.removeprefix(f"{_flag(field)}=") for word in words if word != _flag(field)]
    values = vars(parser.parse_args(words))
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        value = values[field.name]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_flag(field)} {value}: give a finite number")
    return config_class(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )


def _hyphenate(word: str) -> str:
    """--block_size=4 → --block-size=4; other words unchanged."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def require_at_least(config: Any, least: int, names: Sequence[str]) -> None:
    """Check numbers of a Config, in its `__post_init__`.

    Raises:
        UserError: the first that is less, as its flag.
    """
    for name in names:
        if getattr(config, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {least}, not {getattr(config, name)}"
            )


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + (field.metadata["flag"] or field.name).replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = _flag(field)
    required = field.default is dataclasses.MISSING
    base, is_tuple, choices = _read_hint(hint)
    choices = choices or field.metadata["choices"] or None
    help_text = field.metadata["help"].replace("%", "%%")
    if not required and field.default not in (None, ()):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text += f" (default: {shown})"
    settings: dict[str, Any] = {"dest": field.name, "required": required, "help": help_text}
    if not required:
        settings["default"] = field.default
    if base is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    settings["type"] = field.metadata["parse"] or (_whole_number if base is int else base)
    settings["metavar"] = field.metadata["metavar"] or (None if choices else _metavar(base))
    if field.metadata["positional"]:
        parser.add_argument(field.name, type=settings["type"], metavar=settings["metavar"], help=help_text)
        return
    if is_tuple:
        settings["nargs"] = "+"
    if choices:
        settings["choices"] = choices
    parser.add_argument(flag, **settings)


def _whole_number(word: str) -> int:
    """`64`, `1_000_000` or `1e9`; a fraction is refused."""
    try:
        return int(word)
    except ValueError:
        pass
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number, such as 1000000, 1_000_000 or 1e6")
    return int(number)


def _read_hint(hint: Any) -> tuple[Callable[[str], Any], bool, tuple[Any, ...] | None]:
    """(converter of one word, whether the flag takes several, the words allowed) of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _read_hint(inner[0])
    if origin is tuple:
        base, _, choices = _read_hint(arguments[0])
        return base, True, choices
    if origin is typing.Literal:
        return type(arguments[0]), False, arguments
    return hint, False, None


def _metavar(base: Any) -> str:
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(base, "TEXT")


def plain_values(config: Any) -> dict[str, Any]:
    """The Config as JSON values (paths as text, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def identity_values(config: Any) -> dict[str, Any]:
    """Those values of the Config that decide the bytes of the result; paths are left to the inputs'
    hashes."""
    values = plain_values(config)
    hints = typing.get_type_hints(type(config))
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(config)
        if field.metadata.get("identity", True) and _read_hint(hints[field.name])[0] is not Path
    }
