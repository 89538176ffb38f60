"""How faithful are the targets? Sampled positions against exact search over all keys, and every stored row
for validity.

The truth is exact search over the keys that the targets come from, or over raw keys of the same positions:
then the loss of the int8 codes counts too. What is compared is what was written: the search that the stage
does and the rows that the shards hold, after truncation and encoding. A stage directory of its own,
`TARGETS/audit/<settings>/`, so that many ranks share the work and a killed audit goes on;
`TARGETS/audit.json` and `audit.png` are made from it. The targets do not depend on it.

n positions of a batch, K neighbours, V token ids.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.dealing import Dealer
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash, publish, publish_json
from mlpmem_ds.core.hashing import draw_positions
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.plotting import new_figure, save_png
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.target_shards import TargetShard
from mlpmem_ds.formats.targets import TargetAuditManifest, Targets, open_targets
from mlpmem_ds.maths.target_distance import compare_rows, count_faulty_rows, probability_of, recall
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.retrieval.verification import verify_index, verify_keys
from mlpmem_ds.stages.targets.config import AuditConfig
from mlpmem_ds.stages.targets.teacher import Teacher

_logger = logging.getLogger(__name__)
_SEED = 3
_UNIT_POSITIONS = 1024
_ROWS_AT_ONCE = 8192
_RECALLS = (1, 64)  # and k
_FAULTS = ("unsorted", "outside", "not_finite", "wrong_sum")
_SEARCH_FAULTS = ("has_self", "neighbours_unsorted", "gap_in_neighbours")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure a sampled position: recalls at 1, 64 and k, distances of the rows, p(gold), and the size of
    its list."""

    recall_1: np.ndarray
    recall_64: np.ndarray
    recall_k: np.ndarray
    total_variation: np.ndarray
    divergence: np.ndarray
    gold_truth: np.ndarray
    gold_found: np.ndarray
    self_found: np.ndarray
    has_self: np.ndarray
    neighbours_unsorted: np.ndarray
    gap_in_neighbours: np.ndarray
    list_size: np.ndarray


def open_truth(raw_keys: Path | None, keys: Keys) -> Keys:
    """The keys that exact search goes through: those of --raw-keys, or the targets' own.

    Raises:
        UserError: raw keys of other positions.
    """
    if raw_keys is None:
        return keys
    raw = open_keys(raw_keys, flag="--raw-keys")
    if raw.codec != "raw":
        raise UserError(f"--raw-keys {raw_keys} holds codec {raw.codec}: extract them with --codec raw")
    facts = _where_read(keys)
    differences = sorted(name for name, value in _where_read(raw).items() if value != facts[name])
    if differences:
        names = ", ".join(differences)
        raise UserError(
            f"--raw-keys {raw_keys} were extracted otherwise than --keys {keys.root} ({names}): "
            "use the same corpus, model and layer"
        )
    return raw


def _where_read(keys: Keys) -> dict[str, object]:
    """What two key directories share where a row of both is the same state."""
    manifest = keys.manifest
    return {
        "num_positions": keys.num_positions,
        "split": manifest.split,
        "key_layer": manifest.key_layer,
        "key_point": manifest.key_point,
        "layers_path": manifest.layers_path,
        "corpus": keys.inputs.get("corpus"),
        "model": keys.inputs.get("model"),
    }


def run(
    config: AuditConfig,
    world: World,
    *,
    teacher: Teacher,
    truth: Keys,
    index: IndexDirectory | None = None,
    dealer: Dealer | None = None,
) -> None:
    """Audit a complete target directory; `teacher` is the one that searched for it, in the lists of `index`
    where they were not brought in order (and so neither keys nor index compared) in this start."""
    targets = open_targets(config.targets)
    inputs = {"targets": targets.sha256, "truth": truth.sha256}
    name = content_hash(
        {"version": TargetAuditManifest.VERSION, "positions": config.positions, "inputs": inputs}
    )[:12]
    stage = open_stage(
        config.targets / "audit" / name,
        stage=TargetAuditManifest.FORMAT,
        version=TargetAuditManifest.VERSION,
        config=config,
        inputs=inputs,
        world=world,
        dealer=dealer,
    )
    search = open_search(truth, how="exact", device=device_of_rank("auto", world), is_verified=True)
    audit = _Audit(
        targets=targets,
        num_positions=config.positions,
        teacher=teacher,
        true_teacher=replace(teacher, keys=truth, search=search),
        world=world,
    )
    if index is not None:
        verify_keys(stage, teacher.keys)
        verify_index(stage, index)
    if truth.sha256 != teacher.keys.sha256:  # the targets' own were compared when the targets were written
        verify_keys(stage, truth, label="truth")
    units = [*audit.shards, *audit.parts]
    stage.run_phase(units, audit.compute)
    audit.progress.close()
    if world.is_first:  # made anew each time, so that a kill between them leaves nothing undone
        record = _summarize(stage, audit)
        publish_json(config.targets / "audit.json", record)
        with publish(config.targets / "audit.png") as path:
            _plot(record, path)
        _log(record)
    stage.complete(units, TargetAuditManifest)


@dataclass(frozen=True, kw_only=True)
class _Audit:
    """The units of an audit: every shard, and the sampled positions part by part."""

    targets: Targets
    num_positions: int
    teacher: Teacher
    true_teacher: Teacher
    world: World

    @cached_property
    def shards(self) -> dict[str, TargetShard]:
        return {f"rows-{shard.first:012d}": shard for shard in self.targets.manifest.shards}

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        drawn_n = draw_positions(self.targets.num_positions, self.num_positions, seed=_SEED)
        sample_n = drawn_n if len(drawn_n) else np.zeros(1, np.int64)
        return {
            f"sample-{block.start:08d}": sample_n[slice(*block)]
            for block in split_blocks(len(sample_n), _UNIT_POSITIONS)
        }

    @cached_property
    def progress(self) -> Progress:
        total = sum(len(positions_n) for positions_n in self.parts.values())
        return Progress(total, label="audit", unit="positions", world=self.world)

    def compute(self, unit: str, writer: UnitWriter) -> Mapping[str, Any] | None:
        """A unit of either kind: a shard to validate, or positions to compare."""
        if unit in self.shards:
            return _validate(self.targets, self.shards[unit])
        self._compare(unit, writer)
        return None

    def _compare(self, unit: str, writer: UnitWriter) -> None:
        progress = self.progress
        compared = _compare(self.teacher, self.true_teacher, self.targets, self.parts[unit])
        for column, values in asdict(compared).items():
            writer.array(f"{column}-{unit}.npy", values)
        progress.advance(len(self.parts[unit]))


def _compare(teacher: Teacher, true_teacher: Teacher, targets: Targets, positions_n: np.ndarray) -> Compared:
    """The search and the stored rows of some positions, next to exact ones."""
    found = teacher.find(positions_n).unpack()
    loose = teacher.find(positions_n, exclude=False).unpack()
    exact = true_teacher.find(positions_n).unpack()
    true_rows = true_teacher.whole_rows(exact, targets.weighting)
    rows = targets.gather(positions_n).astype(np.int64, np.float64)
    far = compare_rows(true_rows, rows, targets.manifest.vocab_size)
    gold_n = teacher.values_of(positions_n).astype(np.int64)
    ids_nK, distances_nK = found.ids_QK, found.distances_QK
    both_nK = (ids_nK[:, 1:] >= 0) & (ids_nK[:, :-1] >= 0)
    closer_nK = distances_nK[:, 1:] < distances_nK[:, :-1]
    tied_nK = (distances_nK[:, 1:] == distances_nK[:, :-1]) & (ids_nK[:, 1:] <= ids_nK[:, :-1])
    return Compared(
        recall_1=recall(ids_nK, exact.ids_QK, _RECALLS[0]),
        recall_64=recall(ids_nK, exact.ids_QK, _RECALLS[1]),
        recall_k=recall(ids_nK, exact.ids_QK, teacher.k),
        total_variation=far.total_variation_Q,
        divergence=far.divergence_Q,
        gold_truth=probability_of(true_rows, gold_n),
        gold_found=probability_of(rows, gold_n),
        self_found=(loose.ids_QK == positions_n[:, None]).any(axis=1),
        has_self=(ids_nK == positions_n[:, None]).any(axis=1),
        neighbours_unsorted=(both_nK & (closer_nK | tied_nK)).any(axis=1),
        gap_in_neighbours=np.any((ids_nK[:, 1:] >= 0) & (ids_nK[:, :-1] < 0), axis=1),
        list_size=teacher.list_sizes(positions_n),
    )


def _validate(targets: Targets, shard: TargetShard) -> dict[str, int]:
    """Faults of every row of a shard; its checksum is compared first."""
    targets.check(shard.name)
    totals = dict.fromkeys(_FAULTS, 0)
    for block in split_blocks(shard.count, _ROWS_AT_ONCE):
        rows = targets.read(shard.first + block.start, shard.first + block.stop)
        for name, count in count_faulty_rows(rows, targets.manifest.vocab_size).items():
            totals[name] += count
    return totals


def _summarize(stage: StageDirectory, audit: _Audit) -> dict[str, Any]:
    targets, parts = audit.targets, audit.parts
    validities = stage.summaries(list(audit.shards))

    def column(name: str) -> np.ndarray:
        return np.concatenate(
            [np.load(stage.root / f"{name}-{part}.npy", allow_pickle=False) for part in parts]
        )

    compared = Compared(**{name: column(name) for name in Compared.__dataclass_fields__})
    sizes_n, edges = compared.list_size, np.linspace(0, len(compared.list_size), 11).astype(int)
    order_n = np.argsort(sizes_n, kind="stable")
    deciles = [order_n[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True) if stop > start]
    return {
        "settings": {
            "positions": len(sizes_n),
            "truth": audit.true_teacher.keys.codec,
            "k": audit.teacher.k,
            "weighting": to_json(targets.weighting),
            "search": targets.manifest.search,
            "encoding": targets.encoding,
            "inputs": stage.identity["inputs"],
        },
        "recall": {
            "1": _mean(compared.recall_1),
            "64": _mean(compared.recall_64),
            "k": _mean(compared.recall_k),
        },
        "total_variation": _mean(compared.total_variation),
        "total_variation_percentiles": {
            str(share): float(np.percentile(compared.total_variation, share)) for share in (50, 90, 99, 100)
        },
        "divergence_nats": _mean(compared.divergence),
        "gold_probability": {"truth": _mean(compared.gold_truth), "found": _mean(compared.gold_found)},
        "self_found": _mean(compared.self_found),
        "bytes_per_position": targets.num_bytes / targets.num_positions,
        "faulty_rows": (
            {name: sum(validity[name] for validity in validities) for name in _FAULTS}
            | {name: int(getattr(compared, name).sum()) for name in _SEARCH_FAULTS}
        ),
        "rows_validated": targets.num_positions,
        "by_list_size": [
            {
                "least": int(sizes_n[rows].min()),
                "most": int(sizes_n[rows].max()),
                "positions": len(rows),
                "recall_k": _mean(compared.recall_k[rows]),
                "total_variation": _mean(compared.total_variation[rows]),
            }
            for rows in deciles
        ],
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _log(record: dict[str, Any]) -> None:
    recalls, faults = record["recall"], record["faulty_rows"]
    _logger.info(
        "audit of %s positions against exact search of %s keys: total variation %.4f, KL %.4f nats, p(gold)"
        " %.4f for %.4f",
        f"{record['settings']['positions']:,}",
        record["settings"]["truth"],
        record["total_variation"],
        record["divergence_nats"],
        record["gold_probability"]["found"],
        record["gold_probability"]["truth"],
    )
    _logger.info(
        "recall at 1, 64, k = %d: %.4f, %.4f, %.4f; a position finds itself at a rate of %.4f when it may",
        record["settings"]["k"],
        recalls["1"],
        recalls["64"],
        recalls["k"],
        record["self_found"],
    )
    with_lists = record["settings"]["search"] == "ivf"  # else all are in one list
    for decile in record["by_list_size"] if with_lists else ():
        _logger.info(
            "  lists of %7d to %7d keys: recall %.4f, total variation %.4f",
            decile["least"],
            decile["most"],
            decile["recall_k"],
            decile["total_variation"],
        )
    log = _logger.warning if any(faults.values()) else _logger.info
    shown = (
        ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in faults.items() if count) or "none"
    )
    log("faulty rows of %s: %s", f"{record['rows_validated']:,}", shown)


def _plot(record: dict[str, Any], path: Path) -> None:
    figure = new_figure(8, 3.2)
    labels = [f"{decile['most']:,}" for decile in record["by_list_size"]]
    places = range(len(labels))
    panels = (
        ("total_variation", "total variation from exact"),
        ("recall_k", f"recall at {record['settings']['k']}"),
    )
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.bar(places, [decile[name] for decile in record["by_list_size"]])
        overall = record["recall"]["k"] if name == "recall_k" else record["total_variation"]
        axes.axhline(overall, color="black", linewidth=0.8, linestyle="--")
        axes.set_xticks(list(places), labels, rotation=60, fontsize=7)
        axes.set_xlabel("keys in the position's list, up to (deciles)")
        axes.set_title(f"{title}: {overall:.4f}")
    save_png(figure, path)
