"""The members of an archive as documents. Those that follow one another, with one name up to the first dot,
are a sample, as webdataset has it.

A text member is one whose name ends in `.txt`, `.text` or `.md`. Of the sample KEY, the member `KEY.txt`
(else `KEY.text`, `KEY.md`) is the document KEY; every other text member, such as `22.05.txt`, `KEY.seg.txt`
or a second text, is a document of its own, named by the whole member. `NAME.json` has the fields of
`NAME.txt`, `KEY.json` of all that have none. A JSON member with a text of its own is a document too, unless
it repeats that of a text member. Members of other names are counted by their suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.file_marks import RESOURCE_FORK, is_no_text_by_name, is_system_file
from mlpmem_ds.formats.json_lines import NotJsonError, parse_json
from mlpmem_ds.formats.omissions import MergedOmissions, Omission, ReasonName
from mlpmem_ds.formats.records import ReadRules, Record, RepeatedFieldError, field_of, record_of
from mlpmem_ds.formats.text_encoding import NotTextError

_TEXTS = ("txt", "text", "md")  # the first of a sample is its main text
_READ = (*_TEXTS, "json")
# What webdataset's writers store of a sample that is no text: labels, tensors, pickled objects.
_NO_TEXT = (".cls", ".cls2", ".class", ".count", ".index", ".inx", ".id", ".pyd", ".pickle", ".pkl", ".pth",
            ".pt", ".npy", ".npz", ".ten", ".tb", ".mp", ".msg", ".cbor", ".safetensors")  # fmt: skip
# Of one sample that are held at once: a tar of `wiki.0001.txt` to `wiki.9999.txt` is a single one.
_MAX_MEMBERS, _MAX_BYTES = 1000, 256 << 20
_SUFFIX = re.compile(r"\.\w{1,12}$")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file of an archive whose name says text or JSON, whole."""

    name: str
    content: bytes

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the last dot, in small letters."""
        return self.name.rpartition(".")[2].lower()

    @property
    def key(self) -> str:
        """The name up to the first dot, with its folder."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]


def is_read(name: str) -> bool:
    """Whether a member's name says text or JSON."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() in _READ and "." in name.rpartition("/")[2]


def omission_of(name: str, *, kind: str = "") -> Omission:
    """What is said of a member that is not read for its name, or for its kind (such as `a device`)."""
    base = name.rpartition("/")[2]
    found = _SUFFIX.search(base.lower())
    suffix = found[0] if found else ""
    reason: ReasonName = "other member"
    if not kind and (is_system_file(base) or base.startswith("._")):
        reason, suffix = "system file", ""
    elif not kind and (suffix in _NO_TEXT or is_no_text_by_name(base)):
        reason = "not text"
    return Omission(name=name, reason=reason, detail=kind or suffix)


def sample_records(
    path: Path, members: Iterator[Member | Omission], rules: ReadRules
) -> Iterator[Record | Omission]:
    """The documents of an archive, in the order of its members; what is not read comes last.

    Raises:
        UserError: a member is not text or JSON, or a sample has no text; names the member.
    """
    omissions = MergedOmissions()
    sample = _Sample("")
    for member in members:
        if isinstance(member, Omission):
            omissions.add(member)
        elif _is_of_the_system(member):
            omissions.add(Omission(name=member.name, reason="system file"))
        else:
            if member.key != sample.key:
                yield from _records(path, sample.key, sample.members, rules)
                sample = _Sample(member.key)
            elif sample.is_large and member.stem != sample.members[-1].stem:
                yield from _records(path, sample.key, sample.members, rules)
                sample.pass_on()
            if member.extension == "json" and member.stem in sample.passed:
                raise UserError(
                    f"{path} member {member.name!r} may belong to texts more than {_MAX_MEMBERS:,} members or"
                    f" {_MAX_BYTES >> 20} MB before it: put it next to them, or unpack the archive"
                )
            sample.add(member)
    yield from _records(path, sample.key, sample.members, rules)
    yield from omissions.all()


class _Sample:
    """The members of a sample, or of the part of it that is held.

    `passed`: names of members whose documents were given already, without their extension, and the key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[Member] = []
        self.passed: set[str] = set()
        self._num_bytes = 0

    def add(self, member: Member) -> None:
        self.members.append(member)
        self._num_bytes += len(member.content)

    @property
    def is_large(self) -> bool:
        return len(self.members) >= _MAX_MEMBERS or self._num_bytes >= _MAX_BYTES

    def pass_on(self) -> None:
        """Forget the members that are held: their documents were given."""
        self.passed.update((self.key, *(member.stem for member in self.members)))
        self.members, self._num_bytes = [], 0


def _is_of_the_system(member: Member) -> bool:
    *folders, base = member.name.split("/")
    return (base.startswith("._") and member.content.startswith(RESOURCE_FORK)) or any(
        folder == "__MACOSX" or folder.startswith("PaxHeader") for folder in folders
    )


def _records(path: Path, key: str, sample: list[Member], rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of one sample."""
    texts = {at: _decoded(path, each, rules) for at, each in enumerate(sample) if each.extension in _TEXTS}
    objects = {at: _parsed(path, each, rules) for at, each in enumerate(sample) if at not in texts}
    fields = {sample[at].stem: values for at, values in objects.items() if isinstance(values, Mapping)}
    own = [at for at in texts if sample[at].stem == key]
    main = min(own, key=lambda at: _TEXTS.index(sample[at].extension), default=None)
    said = {text.strip() for text in texts.values()} | {""}
    has_text = bool(texts) or any(_has_text(values, rules) for values in objects.values())
    for at, member in enumerate(sample):
        place, name = f"member {member.name!r}", member.name
        if at in texts:
            values = {**fields.get(member.stem, fields.get(key, {})), rules.text_field: texts[at]}
            name = key if at == main else name
        else:
            values = objects[at]
            if texts and _text_in(values, rules) in said:
                continue  # it describes the text members, or repeats them
            if not has_text:
                place += ", with no text member next to it,"
            elif not _has_text(values, rules):
                continue
            name = key if member.stem == key and main is None else name
        yield record_of(path, place, name, values, rules.text_field, rules.group_field)


def _has_text(values: Any, rules: ReadRules) -> bool:
    try:
        if isinstance(values, Mapping):
            field_of(values, rules.text_field)
            return True
    except KeyError:
        pass
    except RepeatedFieldError:  # said by `record_of`
        return True
    return False


def _text_in(values: Any, rules: ReadRules) -> str:
    """The text of a JSON member, without space at its ends; empty where it has none."""
    try:
        text = field_of(values, rules.text_field) if isinstance(values, Mapping) else None
    except KeyError:
        return ""
    except RepeatedFieldError:  # said by `record_of`
        return "\ufffe"
    return text.strip() if isinstance(text, str) else ""


def _decoded(path: Path, member: Member, rules: ReadRules) -> str:
    try:
        return rules.decode(member.content)
    except NotTextError as error:
        raise UserError(
            f"{path} member {member.name!r} is not UTF-8 text ({error}): name its encoding with --encoding,"
            " mend it or leave the file out"
        ) from error


def _parsed(path: Path, member: Member, rules: ReadRules) -> Any:
    try:
        return parse_json(_decoded(path, member, rules))
    except NotJsonError as error:
        raise UserError(
            f"{path} member {member.name!r} is not JSON ({error}): mend it or leave the file out"
        ) from error
