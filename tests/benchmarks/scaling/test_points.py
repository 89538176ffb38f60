"""Reports as points: parameters and compute by hand; what cannot be compared is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scaling import points
from mlpmem_ds.benchmarks.scaling.config import Config
from mlpmem_ds.benchmarks.scaling.fit_scaling import fit_reports
from mlpmem_ds.benchmarks.scaling.points import read_points
from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json, read_json_object, sha256_of_file
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.evaluation import (
    DocumentSums,
    read_evaluation,
    write_document_sums,
    write_evaluation,
)
from mlpmem_ds.formats.target_shards import TargetShard
from mlpmem_ds.formats.trained_models import TrainingResult
from mlpmem_ds.models.memory_config import MemoryConfig

from ...manifests import codec_manifest, keys_manifest, make_provenance, targets_manifest
from ...stages.conftest import make_arm, make_evaluation, publish_memory

POSITIONS_M = np.array([40, 60])


SHAPE = MemoryConfig(input_size=8, hidden_size=8, intermediate_size=8, num_blocks=1, vocab_size=9)
TRAIN_TOKENS = {"evaluated": 200, "larger": 5000}


class Opened:
    """A report whose eval.json alone is there, with the memories that lie next to it."""

    def __init__(self, root: Path, *, flag: str) -> None:
        self.evaluation = read_evaluation(root)
        found = {path.parent.name: sha256_of_file(path) for path in root.glob("*/manifest.json")}
        self.inputs = {f"base+{name}": sha256 for name, sha256 in found.items()}


@pytest.fixture(autouse=True)
def sizes_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each base read 500 tokens; the train splits are as above."""
    monkeypatch.setattr(points, "open_report", Opened)
    training = TrainingResult(
        steps=5, rows_per_step=100, selected_step=4, validations=({"step": 4, "perplexity": 21.0},)
    )
    monkeypatch.setattr(points, "_training_of_base", lambda evaluation, root: training)
    monkeypatch.setattr(points, "num_tokens_of_splits", lambda root, flag: {"train": TRAIN_TOKENS[root.name]})


def _corpus(root: Path) -> str:
    """A corpus of this name, unless it is there; its hash."""
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_text(root.name)
    return sha256_of_file(root / "manifest.json")


def _write_memory(root: Path, corpus: Path, shape: MemoryConfig) -> None:
    """As a training leaves it, which is where the flags of a report name it."""
    publish_memory(root, shape, make_provenance(corpus=_corpus(corpus)), seed=0)
    description = read_json_object(root / "run.json")
    publish_json(root / "run.json", {**description, "config": {"corpus": str(corpus)}})


def _write(
    root: Path,
    parameters: int,
    *,
    subject: str | None = "base+memory",
    last: int = 60,
    tokens: int | None = 1000,
    added: int = 100,
    trained_on: dict[str, str] | None = None,
    members: dict[str, tuple[int, int | None]] | None = None,
    shape: MemoryConfig = SHAPE,
) -> Path:
    """A report on the corpus `evaluated`, and in it its memories, by the text that each was trained on; of a
    bank the `members` with the parameters and tokens of each."""
    root.mkdir()
    evaluated, memories = root.parent / "evaluated", trained_on or {"memory": "evaluated"}
    _corpus(evaluated)
    for name, corpus in memories.items():
        _write_memory(root / name, root.parent / corpus, shape)
    publish_json(root / "run.json", {"config": {"memory": [f"{name}={root / name}" for name in memories]}})
    arms = [
        make_arm("base", 20.0, parameters=parameters),
        make_arm(subject or "base+memory", 17.0, parameters=parameters + added, tokens=tokens),
        *(
            make_arm(f"base+{name}", 18.0, parameters=parameters + own, tokens=read)
            for name, (own, read) in (members or {}).items()
        ),
    ]
    write_evaluation(root, make_evaluation(*arms, subject=subject, corpus=str(evaluated)))
    positions_M = np.array([40, last])
    sums = {arm.name: -np.log(arm.ppl) * positions_M for arm in arms}
    write_document_sums(root, "test", DocumentSums(positions_M=positions_M, sums=sums))
    return root


def test_parameters_compute_and_loss_are_those_by_hand(tmp_path: Path) -> None:
    base, memory = read_points([_write(tmp_path / "r", 1000)])
    assert (base.parameters, memory.parameters) == (1000, 1100)
    assert base.compute == 6 * 1000 * 500
    assert memory.compute == base.compute + 2 * 1000 * 200 + 6 * 100 * 1000
    assert (base.loss, memory.loss) == pytest.approx((np.log(20), np.log(17)))


def _publish(root: Path, manifest: Manifest, **inputs: str) -> str:
    """A stage without files; its hash."""
    directory = open_stage(
        root, stage=manifest.FORMAT, version=manifest.VERSION, config=Flags(), inputs=inputs, world=World()
    )
    directory.complete([], lambda: manifest)
    return sha256_of_file(root / "manifest.json")


def _give_targets(root: Path, *, alpha: float) -> None:
    """Let the memory of a report have learnt from exact targets of 200 keys of 4 numbers."""
    keys = _publish(root / "keys", keys_manifest(num_positions=200, codec=codec_manifest(dim=4)))
    shard = TargetShard(name="shard", first=0, count=200, entries=0, samples=1)
    targets = _publish(root / "targets", targets_manifest(num_positions=200, shards=(shard,)), keys=keys)
    corpus = sha256_of_file(root.parent / "evaluated" / "manifest.json")
    provenance = make_provenance(corpus=corpus, targets=targets, alpha=alpha)
    shutil.rmtree(root / "memory")
    publish_memory(root / "memory", SHAPE, provenance, seed=0)


def test_a_memory_that_learnt_from_the_retriever_costs_its_search(tmp_path: Path) -> None:
    root = _write(tmp_path / "r", 1000)
    _give_targets(root, alpha=0.0)
    alone = read_points([root])[1].compute
    _give_targets(root, alpha=0.4)
    assert read_points([root])[1].compute - alone == 2 * 4 * 200**2
    shutil.rmtree(root / "keys")
    with pytest.raises(UserError, match="what the search cost is not known: put its keys where"):
        read_points([root])
    shutil.rmtree(root / "targets")
    with pytest.raises(UserError, match="base.memory learnt from the retriever is not found"):
        read_points([root])


def test_a_report_without_a_memory_or_of_another_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no memory"):
        read_points([_write(tmp_path / "bare", 1000, subject=None)])
    roots = [_write(tmp_path / "one", 1000), _write(tmp_path / "two", 2000, last=70)]
    with pytest.raises(UserError, match="of another text"):
        read_points(roots)


@pytest.mark.parametrize(
    ("trained_on", "tokens"),
    [
        ({"memory": "larger"}, 5000),
        ({"one": "larger", "two": "evaluated"}, 5200),
        ({"one": "larger", "two": "larger"}, 5000),
    ],
    ids=["one", "bank", "bank of one text"],
)
def test_the_base_read_the_text_that_the_memory_was_trained_on(
    tmp_path: Path, trained_on: dict[str, str], tokens: int
) -> None:
    subject = "base+memory" if len(trained_on) == 1 else "base+bank"
    members = {"one": (70, 1000), "two": (30, 1000)} if len(trained_on) == 2 else {}
    root = _write(tmp_path / "r", 1000, subject=subject, trained_on=trained_on, members=members)
    base, memory = read_points([root])
    assert memory.compute == base.compute + 2 * 1000 * tokens + 6 * 100 * 1000


def _write_bank(root: Path, members: dict[str, tuple[int, int | None]]) -> Path:
    return _write(
        root,
        1000,
        subject="base+bank",
        added=sum(own for own, _ in members.values()),
        tokens=None if None in (counts := [read for _, read in members.values()]) else sum(counts),
        trained_on=dict.fromkeys(members, "evaluated"),
        members=members,
    )


def test_each_memory_of_a_bank_learnt_its_own_tokens(tmp_path: Path) -> None:
    base, bank = read_points([_write_bank(tmp_path / "r", {"one": (100, 1000), "two": (40, 300)})])
    assert bank.parameters == 1140
    assert bank.compute == base.compute + 2 * 1000 * 200 + 6 * (100 * 1000 + 40 * 300)
    with pytest.raises(UserError, match="how many tokens base.two was trained on is not known"):
        read_points([_write_bank(tmp_path / "imported", {"one": (100, 1000), "two": (40, None)})])


def test_a_shared_head_costs_its_products_but_no_gradients_of_its_own(tmp_path: Path) -> None:
    shape = replace(SHAPE, shared_head="a" * 64)
    own = shape.num_parameters()
    base, memory = read_points([_write(tmp_path / "r", 1000, shape=shape, added=own)])
    assert memory.compute == base.compute + 2 * 1000 * 200 + (6 * own + 4 * 9 * 8) * 1000


def test_a_cost_that_is_not_known_is_no_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="how many tokens base.memory was trained on is not known"):
        read_points([_write(tmp_path / "imported", 1000, tokens=None)])
    gone = _write(tmp_path / "gone", 1000)
    (gone / "memory").rename(gone / "moved")
    with pytest.raises(UserError, match="--reports .*gone: base.memory, .*, is not there .* evaluate it"):
        read_points([gone])
    textless = _write(tmp_path / "textless", 1000, trained_on={"memory": "larger"})
    shutil.rmtree(tmp_path / "larger")
    with pytest.raises(UserError, match="--reports .*textless: the text that base.memory was trained on"):
        read_points([textless])


def test_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    """Base and memory together are of two sizes, though the bases are of three."""
    shapes = ((1000, 100), (2000, 100), (1900, 200))
    roots = [_write(tmp_path / str(size), size, added=added) for size, added in shapes]
    with pytest.raises(UserError, match="--reports: 2 sizes; a power law needs 3 or more: give reports of"):
        fit_reports(roots, text="a text", held_equal="all")
    with pytest.raises(UserError, match="--reports names .* twice .as .*: give each once"):
        Config(output=tmp_path / "out", reports=(*roots, roots[0]))


def test_two_sizes_are_refused_and_three_are_fitted(tmp_path: Path) -> None:
    roots = [_write(tmp_path / str(size), size) for size in (1000, 2000, 4000)]
    with pytest.raises(UserError, match="of 2 sizes"):
        fit_reports(roots[:2], text="a text", held_equal="all")
    result = fit_reports(roots, text="a text", held_equal="all")
    assert len(result.points) == 6 and result.documents == 2
    assert all(point.base_is_past_best for point in result.points)
    assert [fit.exponent for fit in result.fits] == pytest.approx([0, 0, 0, 0], abs=1e-9)
