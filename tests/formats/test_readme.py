"""The specification names every format, its version, and every key of its manifest."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.formats.answers import AnswersManifest
from mlpmem_ds.formats.arrow_tables import ArrowManifest
from mlpmem_ds.formats.checkpoint import CheckpointManifest
from mlpmem_ds.formats.corpus import CorpusManifest
from mlpmem_ds.formats.evaluation import ReportManifest
from mlpmem_ds.formats.fetched_base import FetchedBaseManifest
from mlpmem_ds.formats.gates import GateManifest
from mlpmem_ds.formats.index_directory import IndexManifest
from mlpmem_ds.formats.keys import KeysManifest
from mlpmem_ds.formats.lists_directory import ListsManifest
from mlpmem_ds.formats.suites import SuitesManifest
from mlpmem_ds.formats.targets import TargetAuditManifest, TargetsManifest
from mlpmem_ds.formats.trained_models import BaselineManifest, BaseManifest, MemoryManifest

README = Path(__file__).resolve().parents[2] / "mlpmem_ds" / "formats" / "README.md"
MANIFESTS = [
    AnswersManifest,
    ArrowManifest,
    BaseManifest,
    BaselineManifest,
    CheckpointManifest,
    CorpusManifest,
    FetchedBaseManifest,
    GateManifest,
    IndexManifest,
    KeysManifest,
    ListsManifest,
    MemoryManifest,
    ReportManifest,
    SuitesManifest,
    TargetAuditManifest,
    TargetsManifest,
]


def test_every_manifest_is_among_these() -> None:
    assert set(Manifest.__subclasses__()) >= set(MANIFESTS)
    ours = {kind for kind in Manifest.__subclasses__() if kind.__module__.startswith("mlpmem_ds")}
    assert ours == set(MANIFESTS)


def keys_of(kind: type) -> set[str]:
    """The keys of a record and of the records in it."""
    keys, hints = set(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        keys.add(field.metadata.get("json_key", field.name))
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(part):
                keys |= keys_of(part)
    return keys


@pytest.mark.parametrize("kind", MANIFESTS, ids=lambda kind: kind.__name__)
def test_the_specification_names_its_keys(kind: type[Manifest]) -> None:
    text = README.read_text(encoding="utf-8")
    assert re.search(rf"`mlpmem-{kind.FORMAT}`[,)]? \(?version {kind.VERSION}\b", " ".join(text.split()))
    named = set(re.findall(r"`([^`\s]+)`", text))
    assert keys_of(kind) <= named
