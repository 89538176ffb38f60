"""How the bytes of a file are damaged: by a disk, a copy that broke off, an editor, a wrong join."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

_BLOCK = 512  # bytes of a disk's sector, and of a tar's block
Mutation = Callable[[Random, bytes, bytes], bytes]


def _range(random: Random, content: bytes) -> tuple[int, int]:
    """A range of the content: some bytes, some blocks, or any length."""
    size = random.choice(
        (random.randint(1, 8), _BLOCK * random.randint(1, 4), random.randint(1, len(content)))
    )
    start = random.randrange(len(content))
    if random.random() < 0.3:
        start -= start % _BLOCK
    return start, min(len(content), start + size)


def flip_bits(random: Random, content: bytes, _: bytes) -> bytes:
    """One to three bits, anywhere."""
    flipped = bytearray(content)
    for _number in range(random.randint(1, 3)):
        flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def change_start(random: Random, content: bytes, _: bytes) -> bytes:
    """A byte of the first 64, where headers have their lengths, kinds and versions."""
    return _with_byte(random, content, random.randrange(min(64, len(content))))


def change_end(random: Random, content: bytes, _: bytes) -> bytes:
    """A byte of the last 64, where footers have theirs."""
    return _with_byte(random, content, len(content) - 1 - random.randrange(min(64, len(content))))


def _with_byte(random: Random, content: bytes, position: int) -> bytes:
    value = random.choice((0x00, 0xFF, 0x7F, 0x80, random.randrange(256)))
    return content[:position] + bytes([value]) + content[position + 1 :]


def cut(random: Random, content: bytes, _: bytes) -> bytes:
    """The end is missing: a few bytes, down to whole blocks, or anything."""
    stop = random.choice((len(content) - random.randint(1, 16), random.randrange(len(content))))
    if random.random() < 0.3:
        stop -= stop % _BLOCK
    return content[: max(0, stop)]


def cut_start(random: Random, content: bytes, _: bytes) -> bytes:
    return content[_range(random, content)[1] :]


def delete(random: Random, content: bytes, _: bytes) -> bytes:
    start, stop = _range(random, content)
    return content[:start] + content[stop:]


def duplicate(random: Random, content: bytes, _: bytes) -> bytes:
    start, stop = _range(random, content)
    return content[:stop] + content[start:stop] + content[stop:]


def zero(random: Random, content: bytes, _: bytes) -> bytes:
    """A range of zeros: a sector that was never written."""
    start, stop = _range(random, content)
    return content[:start] + bytes(stop - start) + content[stop:]


def swap(random: Random, content: bytes, _: bytes) -> bytes:
    """Two neighbouring ranges change places."""
    first, second, third = sorted(random.randrange(len(content) + 1) for _number in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def insert(random: Random, content: bytes, _: bytes) -> bytes:
    """Bytes that were not there: at the start, at the end, or anywhere."""
    position = random.choice((0, len(content), random.randrange(len(content) + 1)))
    added = random.choice(
        (
            random.randbytes(random.randint(1, 40)),
            bytes(random.choice((1, _BLOCK, 2 * _BLOCK))),
            b"\xef\xbb\xbf",
            b"\r\n",
            b"\xe2\x80\xa8",
            b"\xed\xa0\x80",
        )
    )
    return content[:position] + added + content[position:]


def join(random: Random, content: bytes, other: bytes) -> bytes:
    """Two files one after the other, as `cat` joins them."""
    return content + other if random.random() < 0.5 else content + content


def splice(random: Random, content: bytes, other: bytes) -> bytes:
    """The start of one file and the end of another, perhaps of another kind."""
    return content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other) + 1) :]


def exchange(_: Random, __: bytes, other: bytes) -> bytes:
    """The content of another file, perhaps of another kind."""
    return other


def empty(_: Random, __: bytes, ___: bytes) -> bytes:
    return b""


def text_mode(_: Random, content: bytes, __: bytes) -> bytes:
    """As a transfer of a binary file in text mode changes it."""
    return content.replace(b"\r\n", b"\n") if b"\r\n" in content else content.replace(b"\n", b"\r\n")


_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "../x", "\0", "a" * 300,
    [], {}, [None], [[]], {"": None}, {"text": 3},
)  # fmt: skip


def change_json(random: Random, content: bytes, _: bytes) -> bytes:
    """A value of a JSON document, or of one of its lines, is another one, or missing, or has another name."""
    lines = content.split(b"\n")
    for whole in (True, False):
        number = 0 if whole else random.randrange(len(lines))
        try:
            value = json.loads(content if whole else lines[number])
        except (ValueError, RecursionError):
            continue
        changed = json.dumps(_with_odd_value(random, value)).encode()
        return changed if whole else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    return content


def _with_odd_value(random: Random, value: Any) -> Any:
    if not value or not isinstance(value, dict | list) or random.random() < 0.15:
        return random.choice(_ODD)
    if isinstance(value, list):
        number = random.randrange(len(value))
        return [*value[:number], _with_odd_value(random, value[number]), *value[number + 1 :]]
    key = random.choice(list(value))
    rest = {name: item for name, item in value.items() if name != key}
    match random.randrange(6):
        case 0:
            return rest
        case 1:
            return {**value, f"{key}2": value[key]}
        case 2:
            return {**rest, random.choice(("", "files", "text", key.upper())): value[key]}
    return {**value, key: _with_odd_value(random, value[key])}


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        flip_bits,
        change_start,
        change_end,
        cut,
        cut_start,
        delete,
        duplicate,
        zero,
        swap,
        insert,
        join,
        splice,
        exchange,
        empty,
        text_mode,
        change_json,
    )
}
_USUAL = (
    "flip_bits",
    "change_start",
    "change_end",
    "cut",
    "delete",
    "insert",
    "zero",
    "change_json",
    "change_json",
)


def mutate(random: Random, content: bytes, other: bytes) -> tuple[str, bytes]:
    """(name of the mutation, bytes that differ from `content`, which is not empty)."""
    while True:
        name = random.choice((*MUTATIONS, *_USUAL))
        changed = MUTATIONS[name](random, content, other)
        if changed != content:
            return name, changed
