"""Samples in archives: how texts are laid out in members, and what members hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from mlpmem_ds.benchmarks.fuzz.documents import (
    as_file_text,
    content_of,
    decoded,
    encoded,
    json_line,
    made_up_fields,
    parsed_json,
    text_of_file,
    text_of_record,
    with_plain_line_ends,
)
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged

_TEXT_SUFFIXES = ("txt", "text", "md")
_READ_SUFFIXES = (*_TEXT_SUFFIXES, "json")
_NO_TEXT_SUFFIXES = ("png", "cls", "npy")
_FOLDERS = ("", "", "s/", "./", "a b/ü/", f"{'long' * 24}/", f"{'long' * 60}/", "日本/" * 20)


class Member(NamedTuple):
    name: str
    content: bytes

    @property
    def suffix(self) -> str:
        return self.name.rpartition("/")[2].rpartition(".")[2].lower()

    @property
    def key(self) -> str:
        folder, _, base = self.name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}"


def made_up_members(random: Random, texts: Sequence[str]) -> tuple[list[Member], Content]:
    """A sample for each text, as a file or in its JSON, between members that hold no text."""
    folder, ending = random.choice(_FOLDERS), random.choice(_TEXT_SUFFIXES)
    members, values = [], []
    for number, given in enumerate(texts):
        stem = f"{folder}{number:04d}{random.choice(('', '', '.5'))}"
        if random.random() < 0.3:
            noise = random.randbytes(random.choice((0, 1, 511, 512, 900)))
            members.append(Member(f"{stem}.{random.choice(_NO_TEXT_SUFFIXES)}", noise))
        if random.random() < 0.5:
            members.append(Member(f"{stem}.json", json_line(random, given).encode()))
            values.append(given)
            continue
        text = as_file_text(given)
        members.append(Member(f"{stem}.{ending}", encoded(random, text)))
        values.append(with_plain_line_ends(text))
        if random.random() < 0.3:
            fields = made_up_fields(random)
            fields = {name: value for name, value in fields.items() if not isinstance(value, int)}
            members.append(Member(f"{stem}.json", json.dumps(fields).encode()))
    return members, content_of(values)


def content_of_members(members: Iterable[Member]) -> Content:
    """The texts of each sample: its text files, and the texts in its JSON that are others.

    Names that say nothing are left out by name.
    """
    listed = list(members)
    num_left_out = sum(
        member.suffix not in (*_TEXT_SUFFIXES, *_NO_TEXT_SUFFIXES, "json") for member in listed
    )
    read = [member for member in listed if member.suffix in _READ_SUFFIXES]
    texts: list[str | None] = []
    for _, group in itertools.groupby(read, key=lambda member: member.key):
        texts += _texts_of_sample(list(group))
    return content_of(texts, num_left_out=num_left_out)


def _texts_of_sample(parts: Sequence[Member]) -> Iterator[str | None]:
    plain = [text_of_file(member.content) for member in parts if member.suffix in _TEXT_SUFFIXES]
    said = {"", *(text.strip() for text in plain)}
    for member in parts:
        if member.suffix in _TEXT_SUFFIXES:
            yield text_of_file(member.content)
            continue
        try:
            text = text_of_record(parsed_json(decoded(member.content).lstrip("\ufeff")))
        except Damaged:
            if not plain:
                raise
            continue
        if not plain or (text or "").strip() not in said:
            yield text
