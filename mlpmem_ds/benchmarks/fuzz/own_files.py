"""Samples of our own files: stage directories of every format, checkpoints, evaluations.

Their identities, records and manifests carry checksums, and name those of the other files: any damage is
refused. A manifest with other values and a right checksum, as another release or an editor leaves it, must be
read or refused.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from mlpmem_ds.benchmarks.fuzz.target import Content, Sample, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_text
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import record_file, sealed_json
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.typed_json import from_json, to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.arrow_tables import ArrowManifest
from mlpmem_ds.formats.checkpoint import CheckpointManifest, fault_of_checkpoint, read_checkpoint
from mlpmem_ds.formats.corpus import CorpusManifest
from mlpmem_ds.formats.evaluation import Evaluation, ReportManifest, read_evaluation, write_evaluation
from mlpmem_ds.formats.gates import GateManifest
from mlpmem_ds.formats.index_directory import IndexManifest
from mlpmem_ds.formats.keys import KeysManifest
from mlpmem_ds.formats.lists_directory import ListsManifest
from mlpmem_ds.formats.targets import TargetsManifest
from mlpmem_ds.formats.trained_models import BaselineManifest, BaseManifest, MemoryManifest
from mlpmem_ds.stages.inspection.contents import read_run

_MANIFESTS: tuple[type[Manifest], ...] = (
    ArrowManifest,
    BaseManifest,
    BaselineManifest,
    CorpusManifest,
    GateManifest,
    IndexManifest,
    KeysManifest,
    ListsManifest,
    MemoryManifest,
    ReportManifest,
    TargetsManifest,
)


_NUMBER = 4  # a flag that is not at its default


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(Flags):
    """The flags of a stage that does nothing."""

    example: ClassVar[str] = ""

    number: int = option("any", 3)


def made_up(hint: Any, random: Random) -> Any:
    """A value of a type that may stand in a manifest (core/typed_json.py)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = dataclasses.fields(hint)
        return hint(**{field.name: made_up(hints[field.name], random) for field in fields})  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        return made_up(random.choice(arguments), random)
    if origin is typing.Literal:
        return random.choice(arguments)
    if origin is tuple:
        each_hint = arguments[:1] * random.randint(0, 3) if arguments[-1] is Ellipsis else arguments
        return tuple(made_up(each, random) for each in each_hint)
    if origin is not None:  # a mapping
        return {f"k{number}": made_up(arguments[1], random) for number in range(random.randint(0, 3))}
    simple: Mapping[Any, Any] = {
        str: "a" * random.randint(1, 9),
        int: random.randint(1, 99),
        float: random.random() + 0.1,
        bool: random.random() < 0.5,
        types.NoneType: None,
    }
    return simple.get(hint, made_up_text(random))


def write_stage(random: Random, folder: Path) -> Sample:
    """A complete stage directory with two units."""
    kind = random.choice(_MANIFESTS)
    manifest = made_up(kind, random)
    root = folder / kind.FORMAT
    units = ["a", "b"]

    def compute(name: str, writer: UnitWriter) -> dict[str, Any]:
        with writer.file(f"{name}.bin") as path:
            path.write_bytes(random.randbytes(random.randint(1, 200)))
        return {"size": 3}

    directory = open_stage(
        root,
        stage=kind.FORMAT,
        version=kind.VERSION,
        config=_Config(number=_NUMBER),
        inputs={"x": "0" * 64},
        world=World(),
    )
    directory.run_units(units, compute)
    directory.complete(units, lambda: manifest)
    names = ("manifest.json", "manifest.json", "identity.json", "done/a.json", "a.bin")
    return Sample(
        inputs=(root,),
        files=tuple(root / name for name in names),
        content=Content(values=[to_json(manifest), {"number": _NUMBER}, {"x": "0" * 64}]),
        settings={"kind": kind},
    )


def read_stage_and_files(sample: Sample) -> Content:
    """As a later stage reads it, and `inspect_run`."""
    (root,) = sample.inputs
    stage = _open(root, sample.settings["kind"])
    stage.check_files()
    faults = [fault for state in read_run(root, checksums=True) for fault in state.faults]
    if faults:
        raise DamagedDataError(f"{root}: {faults[0]}")
    return Content(values=[to_json(stage.manifest), dict(stage.config), dict(stage.inputs)])


def _open(root: Path, kind: type[Manifest]) -> CompleteStage[Any]:
    stage: CompleteStage[Any] = read_stage(CompleteStage, kind, root, flag="--input")
    return stage


def as_written(sample: Sample) -> Content:
    """The files have checksums: no other content may be read from them."""
    return sample.content


def write_edited(random: Random, folder: Path) -> Sample:
    """The manifest's values, without its checksum, next to the manifest."""
    sample = write_stage(random, folder)
    (root,) = sample.inputs
    values = json.loads((root / "manifest.json").read_bytes())
    values.pop("content_sha256")
    edited = folder / "edited.json"
    edited.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return dataclasses.replace(sample, files=(edited,))


def read_edited(sample: Sample) -> Content:
    """Seal the edited values into the manifest, and open the stage."""
    (root,), (edited,) = sample.inputs, sample.files
    try:
        values = json.loads(edited.read_bytes())
        content = sealed_json(values)
    except (ValueError, TypeError, RecursionError) as error:  # no values that have a checksum
        raise DamagedDataError(f"{edited} is not an object of JSON ({error})") from error
    (root / "manifest.json").write_bytes(content)
    stage = _open(root, sample.settings["kind"])
    return Content(values=[to_json(stage.manifest), dict(stage.config), dict(stage.inputs)])


def write_checkpoint(random: Random, folder: Path) -> Sample:
    root = folder / "step-00000001"
    root.mkdir()
    (root / "weights.bin").write_bytes(random.randbytes(50))
    manifest = made_up(CheckpointManifest, random)
    manifest = dataclasses.replace(manifest, files=(record_file(root, "weights.bin"),))
    header = {"format": f"mlpmem-{CheckpointManifest.FORMAT}", "version": CheckpointManifest.VERSION}
    (root / "manifest.json").write_bytes(sealed_json({**header, **manifest.to_json()}))
    return Sample(
        inputs=(root,),
        files=(root / "manifest.json", root / "weights.bin"),
        content=Content(values=[to_json(manifest)]),
    )


def read_whole_checkpoint(sample: Sample) -> Content:
    (root,) = sample.inputs
    if fault := fault_of_checkpoint(root):
        raise DamagedDataError(fault)
    return Content(values=[to_json(read_checkpoint(root).manifest)])


def write_eval(random: Random, folder: Path) -> Sample:
    """eval.json, which carries its checksum; one without it is read too, as of a report that was edited."""
    evaluation = made_up(Evaluation, random)
    write_evaluation(folder, evaluation)
    plain = from_json(Evaluation, to_json(evaluation), where="eval.json", version=1)
    return Sample(inputs=(folder,), files=(folder / "eval.json",), content=Content(values=[to_json(plain)]))


def read_eval(sample: Sample) -> Content:
    return Content(values=[to_json(read_evaluation(sample.inputs[0]))])


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="stage", write=write_stage, read=read_stage_and_files, expect=as_written),
        Target(name="edited-manifest", write=write_edited, read=read_edited, expect=None),
        Target(name="checkpoint", write=write_checkpoint, read=read_whole_checkpoint, expect=as_written),
        Target(name="evaluation", write=write_eval, read=read_eval, expect=None),
    )
}
