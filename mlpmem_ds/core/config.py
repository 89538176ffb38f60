"""A command's Config: a frozen dataclass, of which each field is a flag with its help, default and bounds.

Flags are spelled with hyphens (`--block-size`) and accepted with underscores too (`--block_size`), which is
how DeepSpeed's users write them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import operator
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.flag_values import converter_of
from mlpmem_ds.core.objects.urls import named_url_of
from mlpmem_ds.core.world import World

ConfigType = TypeVar("ConfigType", bound="Flags")
Identity = Literal["own", "resolved", "none"]
_WIDTH = 118  # columns of the help
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What every Config inherits: however it is made, its numbers are finite and within their fields' bounds.

    A Config defines `check` and not `__post_init__`, so that the bounds are always checked, and first. Its
    docstring is what `--help` says of the command; the first line stands in the list of all commands.
    """

    example: ClassVar[str] = ""
    """a command line, for `--help`"""
    memory_flags: ClassVar[tuple[str, ...]] = ()
    """those that take less memory when they are lowered, for the message when it runs out"""

    def __init_subclass__(cls) -> None:
        assert "__post_init__" not in vars(cls), f"{cls.__qualname__}: write check(self) for __post_init__"

    @classmethod
    def dependent_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Defaults of some flags on a command line that gives these values; flags that it gives itself keep
        their values."""
        return {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_numbers(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Check what ties several flags together, or needs more than bounds.

        Raises:
            UserError: with the flags, their values and the remedy.
        """

    def given(self, *names: str) -> list[str]:
        """Of these optional flags those with another value than their default, as users write them: a switch
        that is on by default as `--no-x`."""
        owner = type(self)
        changed = [name for name in names if getattr(self, name) != default_of(owner, name)]
        flags = {name: flag_of(field_of(owner, name)) for name in changed}
        return [
            flag.replace("--", "--no-", 1) if default_of(owner, name) is True else flag
            for name, flag in flags.items()
        ]

    def refuse_unused(self, *names: str, of: str) -> None:
        """Refuse settings that nothing would read: for `check`.

        Args:
            names: of flags that count only with another one.
            of: that one, as users write it.

        Raises:
            UserError: with all of them that have another value than their default.
        """
        if unused := self.given(*names):
            are, them = ("is", "it") if len(unused) == 1 else ("are", "them")
            raise UserError(f"{', '.join(unused)} {are} of {of}: add that, or leave {them} out")


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    identity: Identity = "own",
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    positional: bool = False,
    by_url: bool = False,
    implied: Any = None,
    one_rank_a_host: str = "",
) -> Any:
    """A field of a Config.

    Args:
        help: one line with the unit.
        default: left out for a required flag.
        at_least, at_most, above, below: bounds of the number, or of each number of a tuple; None and text are
            not compared.
        identity: what the flag decides. "own": its value decides the bytes of the result, so that a rerun
            which changes it is refused. "resolved": the stage makes another value of it, which decides the
            bytes in its place (`auto` becomes a number). "none": it changes no byte (batch sizes, devices,
            threads) and may change from run to run.
        parse: text to value, where the field's type alone does not say it.
        metavar: the placeholder in the help.
        flag: the flag's name without hyphens in front, where it is not the field's (`lambda` is a word of
            Python).
        choices: the words allowed, where the type does not list them.
        positional: the value is given as a word of its own; the flag is accepted too.
        by_url: an input directory that may also be a URL, which is fetched before the command opens it
            (core/objects/inputs.py); also in words NAME=URL.
        implied: the value where the flag is given without one; None: it needs one.
        one_rank_a_host: why any other value than the default is for a rank that has its host to itself, in
            words that go on after the flag; "": it is not (`refuse_shared_host`).
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {
        "help": help,
        "bounds": {words: limit for words, limit in limits.items() if limit is not None},
        "identity": identity,
        "parse": parse,
        "metavar": metavar,
        "flag": flag,
        "choices": choices,
        "positional": positional,
        "by_url": by_url,
        "implied": implied,
        "one_rank_a_host": one_rank_a_host,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(
    config_class: type[ConfigType],
    argv: Sequence[str] | None,
    *,
    prog: str,
) -> ConfigType:
    """Read a Config from the command line; on a wrong flag argparse prints the usage and exits with 2."""
    paragraphs = description_of(config_class).split("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        description="\n\n".join(textwrap.fill(paragraph, _WIDTH) for paragraph in paragraphs),
        epilog=f"example:\n  {config_class.example}",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=_WIDTH
        ),
    )
    hints = typing.get_type_hints(config_class)
    for field in _in_order_of_help(config_class):
        _add_flag(parser, field, hints[field.name])
    words = [_hyphenate(word) for word in (sys.argv[1:] if argv is None else argv)]
    for field in dataclasses.fields(config_class):
        if field.metadata["positional"]:
            words = [word.removeprefix(f"{flag_of(field)}=") for word in words if word != flag_of(field)]
    _refuse_unknown_flags(parser, words)
    _refuse_repeated_flags(parser, words)
    values = vars(parser.parse_args(words))
    if defaults := config_class.dependent_defaults(values):
        parser.set_defaults(**defaults)
        values = vars(parser.parse_args(words))
    return config_class(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )


def description_of(config_class: type[Flags]) -> str:
    """The docstring; read from the source where Python leaves docstrings out (`python -OO`)."""
    if sys.flags.optimize < 2:
        return inspect.getdoc(config_class) or ""
    source = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    return ast.get_docstring(source) or "" if isinstance(source, ast.ClassDef) else ""


def _in_order_of_help(config_class: type[Flags]) -> list[dataclasses.Field[Any]]:
    """As they are written, but optional flags that other commands have too come last."""
    own = vars(config_class).get("__annotations__", {})
    return sorted(
        dataclasses.fields(config_class),
        key=lambda field: field.name not in own and field.default is not dataclasses.MISSING,
    )


def _refuse_unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Name a misspelt flag and the one most like it, before argparse says that the right one is missing."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if word == "--":
            break
        if flag.startswith("--") and " " not in word and flag not in flags:
            similar = difflib.get_close_matches(flag, flags, n=1)
            parser.error(f"there is no flag {flag}" + (f"; did you mean {similar[0]}?" if similar else ""))


def _refuse_repeated_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """argparse takes the last of several: of `--input a --input b` it would leave out a.

    For a single value the last stays the one that counts: scripts add `"$@"` to change what they give.
    """
    seen: set[str] = set()
    for word in words[: words.index("--")] if "--" in words else words:
        flag = word.partition("=")[0]
        action = parser._option_string_actions.get(flag)
        if action is None or action.nargs != "+":
            continue
        if flag in seen:
            parser.error(f"argument {flag}: it is given twice: give all its values after one {flag}")
        seen.add(flag)


def check_numbers(field: dataclasses.Field[Any], value: Any) -> None:
    """Check a flag's number, or each of its numbers.

    Raises:
        UserError: the first that is not finite or breaks a bound, with the flag and all its bounds.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float):
            continue
        bounds = field.metadata.get("bounds", {})
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{flag_of(field)} must be a finite number, not {number}")
        if not all(_BOUNDS[words](number, limit) for words, limit in bounds.items()):
            rule = " and ".join(f"{words} {limit}" for words, limit in bounds.items())
            raise UserError(f"{flag_of(field)} must be {rule}, not {number}")


def _hyphenate(word: str) -> str:
    """--block_size=4 → --block-size=4; other words unchanged."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def flag_of(field: dataclasses.Field[Any]) -> str:
    """A field's flag, as users spell it: `--block-size`."""
    return flag_name(field.metadata["flag"] or field.name)


def flag_name(field_name: str) -> str:
    """`block_size` → `--block-size`"""
    return "--" + field_name.replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = flag_of(field)
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
    settings["type"] = converter_of(
        base,
        parse=field.metadata["parse"],
        takes_url=field.metadata["by_url"],
        may_be_none=type(None) in typing.get_args(hint),
    )
    settings["metavar"] = field.metadata["metavar"] or (None if choices else _metavar(base))
    if field.metadata["positional"]:
        names = {name: settings[name] for name in ("type", "metavar", "help")}
        optional: dict[str, Any] = {} if required else {"nargs": "?", "default": field.default}
        parser.add_argument(field.name, **names, **optional)
        return
    if is_tuple:
        settings["nargs"] = "+"
    if field.metadata["implied"] is not None:
        settings |= {"nargs": "?", "const": field.metadata["implied"]}
    if choices:
        settings["choices"] = choices
    parser.add_argument(flag, **settings)


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


def has_urls(config: Flags) -> bool:
    """Whether a flag that takes a URL has one."""
    for field in dataclasses.fields(config):
        if field.metadata.get("by_url"):
            value = getattr(config, field.name)
            words = value if isinstance(value, tuple) else (value,)
            if any(named_url_of(word) for word in words if isinstance(word, str | Path)):
                return True
    return False


def field_of(config_class: type[Flags], name: str) -> dataclasses.Field[Any]:
    """The field of the flag `name`, which must be there."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return field


def refuse_shared_host(config: Flags, world: World) -> None:
    """Refuse flags that are for a rank alone on its host (`option`), where other ranks are on it.

    Raises:
        UserError: with the flag, why, and the remedy.
    """
    for field in dataclasses.fields(config):
        value, reason = getattr(config, field.name), field.metadata.get("one_rank_a_host")
        if reason and value != field.default and world.shares_host:
            raise UserError(
                f"{flag_of(field)} {value} {reason}, and this host has several ranks: start one on each host"
                f" (by hand: with LOCAL_RANK=0), or leave {flag_of(field)} out"
            )


def default_of(config_class: type[Flags], name: str) -> Any:
    """The default of the flag `name`, which must have one."""
    field = field_of(config_class, name)
    assert field.default is not dataclasses.MISSING, f"{flag_of(field)} is required"
    return field.default


def plain_values(config: Flags) -> dict[str, Any]:
    """The Config as JSON values (paths as text, tuples as lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def deciding_values(
    config: Flags, resolved: Mapping[str, Any], *, flags: Collection[str] | None = None
) -> dict[str, Any]:
    """Flag → the value that decides the bytes of the result, where it is not the flag's default.

    So a flag that is added later, with a default that changes nothing, is no other identity. Paths are left
    out: the inputs' hashes say what they held.

    Args:
        resolved: what the stage made of every flag of identity "resolved"; a flag that decides nothing next
            to the others has its default here.
        flags: those that decide, where one command writes several directories; None = all.
    """
    fields = [field for field in dataclasses.fields(config) if flags is None or field.name in flags]
    expected = {name for name in resolved_flags(type(config)) if flags is None or name in flags}
    assert resolved.keys() == expected, f"resolved: {sorted(resolved.keys() ^ expected)} too many or missing"
    hints = typing.get_type_hints(type(config))
    own = plain_values(config)
    values = {
        field.name: own[field.name]
        for field in fields
        if field.metadata.get("identity", "own") == "own" and _read_hint(hints[field.name])[0] is not Path
    } | {name: _plain(value) for name, value in resolved.items()}
    defaults = default_values(type(config))
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def resolved_flags(config_class: type[Flags]) -> list[str]:
    """The fields of identity "resolved", in the order of the class."""
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.metadata.get("identity") == "resolved"
    ]


def default_values(config_class: type[Flags]) -> dict[str, Any]:
    """Every flag's default as a JSON value; required flags have none."""
    return {
        field.name: _plain(field.default)
        for field in dataclasses.fields(config_class)
        if field.default is not dataclasses.MISSING
    }
