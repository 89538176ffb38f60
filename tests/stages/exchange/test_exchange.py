"""Arrow files written as the authors' code writes them come in, can be trained on, and go out again number
for number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_sealed_json
from mlpmem_ds.core.host import process_of
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import bfloat16_bits, bfloat16_values, open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages.exchange import export_datastore, import_datastore
from mlpmem_ds.stages.exchange.config import ExportConfig, ImportConfig
from mlpmem_ds.stages.training import inputs as training_inputs
from mlpmem_ds.stages.training import train
from mlpmem_ds.stages.training.automatic import settle

pa = pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[3]
WIDTH, ROWS, VOCAB, BLOCK = 16, 150, 300, 32


def stored_rows(*, seed: int = 0, rows: int = ROWS) -> list[dict[str, Any]]:
    """Distributions by falling probability in float16; every 40th has a single token."""
    generator, found = np.random.default_rng(seed), []
    for row in range(rows):
        count = 1 if row % 40 == 7 else int(generator.integers(2, 20))
        weights = np.sort(generator.dirichlet(np.ones(count)))[::-1].astype(np.float16)
        label = int(generator.integers(VOCAB - 5))
        ids = generator.choice(VOCAB - 5, count, replace=False).tolist()
        found.append({"id_cnt": count, "token_id": ids, "prob": weights, "label": label})
    return found


def write_arrow(
    root: Path, rows: list[dict[str, Any]], keys_ND: np.ndarray, *, batch: int = 37
) -> tuple[Path, Path]:
    """As the public code does: streams of record batches, one list a row."""
    root.mkdir(parents=True, exist_ok=True)
    store = pa.schema([("keys", pa.list_(pa.float16(), WIDTH)), ("vals", pa.int32())])
    distributions = pa.schema(
        [
            ("id_cnt", pa.int32()),
            ("token_id", pa.list_(pa.int32())),
            ("prob", pa.list_(pa.float16())),
            ("label", pa.int32()),
        ]
    )
    with (
        pa.ipc.new_stream(root / "dstore.arrow", store) as stream,
        pa.ipc.new_stream(root / "knn.arrow", distributions) as other,
    ):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            stream.write_batch(
                pa.RecordBatch.from_arrays(
                    [
                        pa.array(list(keys_ND[start : start + batch]), type=pa.list_(pa.float16(), WIDTH)),
                        pa.array([row["label"] for row in part], type=pa.int32()),
                    ],
                    schema=store,
                )
            )
            columns = [
                pa.array([row[name] for row in part], type=distributions.field(name).type)
                for name in distributions.names
            ]
            other.write_batch(pa.RecordBatch.from_arrays(columns, schema=distributions))
    return root / "dstore.arrow", root / "knn.arrow"


@pytest.fixture(scope="module")
def keys_ND() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float16)


@pytest.fixture(scope="module")
def arrow(tmp_path_factory: pytest.TempPathFactory, keys_ND: np.ndarray) -> tuple[Path, Path]:
    return write_arrow(tmp_path_factory.mktemp("arrow"), stored_rows(), keys_ND)


DATASTORE_ALONE = {"targets": (), "shard_positions": default_of(ImportConfig, "shard_positions")}
TARGETS_ALONE = {
    "datastore": (),
    "model": None,
    "tokenizer": None,
    **{name: default_of(ImportConfig, name) for name in ("block_size", "unit_positions")},
}


def config_of(
    arrow: tuple[Path, Path], base_dir: Path, corpus_dir: Path, output: Path, **changes: Any
) -> Any:
    values: dict[str, Any] = {
        "output": output,
        "datastore": (arrow[0],),
        "targets": (arrow[1],),
        "model": str(base_dir),
        "tokenizer": str(corpus_dir / "tokenizer"),
        "block_size": BLOCK,
        "unit_positions": 64,
        "shard_positions": 64,
    }
    return ImportConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, arrow: Any, base_dir: Path, corpus_dir: Path) -> Path:
    output = tmp_path_factory.mktemp("imported") / "run"
    import_datastore.run(config_of(arrow, base_dir, corpus_dir, output), World())
    return output


def test_every_number_is_there(imported: Path, keys_ND: np.ndarray) -> None:
    rows = stored_rows()
    corpus, keys, targets = (
        open_corpus(imported / "corpus"),
        open_keys(imported / "keys"),
        open_targets(imported / "targets"),
    )
    labels_N = np.array([row["label"] for row in rows])
    assert corpus.num_positions == keys.num_positions == targets.num_positions == ROWS
    assert np.array_equal(corpus.values(0, ROWS), labels_N) and np.array_equal(keys.read("values"), labels_N)
    assert np.array_equal(keys.read("keys"), keys_ND)
    assert np.array_equal(keys.read_inputs(), bfloat16_bits(keys_ND.astype(np.float32)))
    found = targets.read_all()
    for number, row in enumerate(rows):
        entries = slice(*found.offsets[number : number + 2])
        order = np.argsort(row["token_id"])
        assert found.ids[entries].tolist() == np.array(row["token_id"])[order].tolist()
        assert np.array_equal(found.probabilities[entries], row["prob"][order].astype(np.float32))
    lacking = 1 - np.array([row["prob"].astype(np.float64).sum() for row in rows])
    np.testing.assert_allclose(found.dropped, np.maximum(lacking, 0), atol=1e-3)


def training_of(imported: Path, output: Path, **changes: Any) -> train.Config:
    return train.Config(
        ds_config=ROOT / "ds_configs" / "cpu.json",
        corpus=imported / "corpus",
        targets=imported / "targets",
        keys=imported / "keys",
        output=output,
        batch_positions=16,
        **changes,
    )


def test_the_trainer_takes_them(imported: Path, tmp_path: Path) -> None:
    inputs = training_inputs.open_inputs(training_of(imported, tmp_path / "memory"), World())
    assert inputs.keys.num_positions == ROWS and inputs.keys.input_size == WIDTH
    assert inputs.keys.manifest.key_layer == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"ce_through": "mixture"},
        {"objective": "helpful"},
        {"objective": "auto", "alpha": None, "ce_through": "mixture"},
    ],
    ids=["mixture", "helpful", "auto"],
)
def test_what_reads_the_bases_log_probabilities_is_refused(
    imported: Path, tmp_path: Path, changes: Any
) -> None:
    said = "keys hold no log-probabilities of the base.*: give --ce-through plain with --objective imitation"
    with pytest.raises(UserError, match=said):
        train.run(training_of(imported, tmp_path / "memory", **changes), World())
    assert not (tmp_path / "memory").exists()


def test_an_objective_that_is_chosen_does_without_them(imported: Path, tmp_path: Path) -> None:
    auto = training_of(imported, tmp_path / "memory", objective="auto", alpha=None, ce_through=None)
    config, inputs = settle(auto, training_inputs.open_inputs(auto, World()), World())
    assert (config.objective, config.alpha, config.ce_through) == ("imitation", 0.5, "plain")
    assert "hold no log-probabilities" in str(inputs.objective_reason)


def test_out_again_they_are_what_came_in(imported: Path, keys_ND: np.ndarray, tmp_path: Path) -> None:
    config = ExportConfig(keys=imported / "keys", targets=imported / "targets", output=tmp_path / "arrow")
    export_datastore.run(config, World())
    store = pa.ipc.open_stream(tmp_path / "arrow" / "datastore.arrow").read_all()
    assert (
        str(store.schema.field("keys").type).startswith("fixed_size_list")
        and store.schema.field("vals").type == pa.int32()
    )
    found_ND = np.array(store.column("keys").to_pylist(), dtype=np.float16)
    assert np.array_equal(
        found_ND, bfloat16_values(bfloat16_bits(keys_ND.astype(np.float32))).astype(np.float16)
    )
    table = pa.ipc.open_stream(tmp_path / "arrow" / "targets.arrow").read_all()
    assert [str(kind) for kind in table.schema.types] == [
        "int32",
        "list<item: int32>",
        "list<item: halffloat>",
        "int32",
    ]
    for row, wanted in zip(table.to_pylist(), stored_rows(), strict=True):
        assert (row["id_cnt"], row["label"]) == (wanted["id_cnt"], wanted["label"])
        assert np.array_equal(np.array(row["prob"], np.float16), wanted["prob"])
        by_id = dict(
            zip(wanted["token_id"], wanted["prob"].tolist(), strict=True)
        )  # equal probabilities may change places
        assert dict(zip(row["token_id"], row["prob"], strict=True)) == by_id
    before = (tmp_path / "arrow" / "targets.arrow").stat().st_mtime_ns
    export_datastore.run(config, World())
    assert (tmp_path / "arrow" / "targets.arrow").stat().st_mtime_ns == before


def test_reruns_give_the_same_bytes_and_targets_alone_fit_keys(
    imported: Path,
    arrow: Any,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, calls = import_datastore.read_keys, []

    def fail_at_the_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return write(*arguments)

    config = config_of(arrow, base_dir, corpus_dir, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(import_datastore, "read_keys", fail_at_the_second)
        import_datastore.run(config, World())
    import_datastore.run(config, World())
    alone = config_of(
        arrow, base_dir, corpus_dir, tmp_path / "alone", **TARGETS_ALONE, keys=imported / "keys"
    )
    import_datastore.run(alone, World())
    names = [*(f"{part}/manifest.json" for part in ("corpus", "keys")), "targets/manifest.json"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (imported / name).read_bytes()
    assert (
        open_targets(tmp_path / "alone" / "targets").read_all().ids.tolist()
        == open_targets(imported / "targets").read_all().ids.tolist()
    )


def test_the_blocks_of_targets_alone_are_those_of_their_keys(
    imported: Path, arrow: Any, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """Whatever the default is. A datastore alone is bound to no size of shards."""
    alone = config_of(
        arrow,
        base_dir,
        corpus_dir,
        tmp_path / "alone",
        **TARGETS_ALONE,
        keys=imported / "keys",
        shard_positions=96,
    )
    import_datastore.run(alone, World())
    assert open_targets(tmp_path / "alone" / "targets").manifest.block_size == BLOCK
    identity = read_sealed_json(tmp_path / "alone" / "targets" / "identity.json")
    assert identity["config"] == {"block_size": BLOCK, "shard_positions": 96}
    config_of(arrow, base_dir, corpus_dir, tmp_path / "keys_alone", **DATASTORE_ALONE, block_size=1000)


def test_a_disk_needs_room_for_what_is_not_written_yet(
    imported: Path,
    arrow: Any,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    set_free_bytes: Callable[[int], None],
) -> None:
    """None for what is complete; a rerun removes what a killed run left half-written."""
    targets = open_targets(imported / "targets")
    out, run = tmp_path / "arrow", tmp_path / "run"
    export = ExportConfig(keys=imported / "keys", targets=targets.root, output=out)
    keys_alone = replace(export, targets=None, output=tmp_path / "alone")
    half = out / f".datastore.arrow.{process_of(2**22 + 1).name}.tmp"
    for command, config, needed, made in (
        (export_datastore, export, ROWS * (2 * WIDTH + 4 + 16) + 6 * targets.manifest.entries, out),
        (export_datastore, keys_alone, ROWS * (2 * WIDTH + 4), keys_alone.output),
        (import_datastore, config_of(arrow, base_dir, corpus_dir, run), ROWS * (4 * WIDTH + 4), run),
    ):
        set_free_bytes(needed - 1)
        with pytest.raises(UserError, match="need .* free"):
            command.run(config, World())
        assert not made.exists()
        set_free_bytes(needed)
        command.run(config, World())
        set_free_bytes(0)
        command.run(config, World())
    for name in ("manifest.json", "done/datastore.json", "datastore.arrow"):
        (out / name).unlink()
    half.write_bytes(bytes(1000))
    set_free_bytes(ROWS * (2 * WIDTH + 4) - 1000)
    export_datastore.run(export, World())
    assert not half.exists()


def change(rows: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if index == number else row for index, row in enumerate(rows)]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "count": ({"id_cnt": 99}, "row 70: id_cnt is not the length"),
    "token": (
        {"token_id": [5, VOCAB], "prob": np.float16([0.5, 0.5]), "id_cnt": 2},
        "row 70: a token is not in the vocabulary",
    ),
    "twice": (
        {"token_id": [5, 5], "prob": np.float16([0.5, 0.5]), "id_cnt": 2},
        "row 70: a token occurs twice",
    ),
    "range": (
        {"token_id": [5], "prob": np.float16([np.nan]), "id_cnt": 1},
        r"row 70: a probability does not lie in \[0, 1\]",
    ),
    "sum": (
        {"token_id": [5, 6], "prob": np.float16([0.9, 0.9]), "id_cnt": 2},
        "row 70: its probabilities sum to more",
    ),
    "label": ({"label": 1}, "row 70: its label is not the value"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_row_that_is_no_distribution_is_named(
    fault: str,
    imported: Path,
    arrow: Any,
    keys_ND: np.ndarray,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
) -> None:
    values, message = BAD_ROWS[fault]
    _, bad = write_arrow(tmp_path / "bad", change(stored_rows(), 70, **values), keys_ND)
    config = config_of(
        (arrow[0], bad),
        base_dir,
        corpus_dir,
        tmp_path / "run",
        **TARGETS_ALONE,
        keys=imported / "keys",
    )
    with pytest.raises(UserError, match=message):
        import_datastore.run(config, World())
    assert not (tmp_path / "run" / "targets" / "manifest.json").exists()


def test_wrong_files_are_refused_and_nothing_is_written(
    arrow: Any,
    keys_ND: np.ndarray,
    base_dir: Path,
    corpus_dir: Path,
    imported: Path,
    keys_dir: Path,
    tmp_path: Path,
) -> None:
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(arrow[0].read_bytes()[:-900])
    short = write_arrow(tmp_path / "short", stored_rows(rows=99), keys_ND[:99])
    unfinished = tmp_path / "unfinished.arrow"  # whole batches, but whoever wrote them was killed
    unfinished.write_bytes(arrow[1].read_bytes()[:-8])
    assert pa.ipc.open_stream(unfinished).read_all().num_rows == ROWS
    before = sorted(path.name for path in tmp_path.iterdir())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"datastore": (tmp_path / "none.arrow",)}, "does not exist"),
        ({"datastore": (cut,)}, "cut.arrow is cut short or damaged"),
        ({"targets": (unfinished,)}, "no end-of-stream mark"),
        ({"datastore": (arrow[1],)}, "has no column 'keys'"),
        ({"targets": (arrow[0],)}, "has no column 'id_cnt'"),
        ({"targets": (short[1],)}, "hold 99 rows, the keys 150"),
        ({"model": None}, "needs --model"),
        ({"datastore": (), "targets": ()}, "nothing to import"),
        ({"datastore": ()}, "needs --datastore or --keys"),
        ({"keys": imported / "keys"}, "not both"),
        ({"key_layer": 7}, "layer 7 does not exist"),
        ({"shard_positions": 33}, "--shard-positions 33 is not a multiple of --block-size, 32: choose 32"),
        (
            {**TARGETS_ALONE, "keys": imported / "keys", "shard_positions": 1000},
            f"--shard-positions 1000 is not a multiple of the block size of --keys, {BLOCK}: choose 992",
        ),
        (
            {**TARGETS_ALONE, "keys": keys_dir, "block_size": 1000},
            "--block-size is of --datastore: add that, or leave it out",
        ),
        ({"targets": ()}, "--shard-positions is of --targets: add that, or leave it out"),
        ({"targets": (arrow[1], arrow[1])}, "--targets names .* twice"),
        ({"datastore": (arrow[0], arrow[0])}, "--datastore names .* twice"),
        (
            {**TARGETS_ALONE, "keys": keys_dir, "key_layer": 0},
            "--key-layer is of --datastore: add that, or leave it out",
        ),
        (
            {"datastore": (), "keys": keys_dir},
            "--unit-positions, --block-size, --model, --tokenizer are of --datastore: add that, or leave",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            import_datastore.run(config_of(arrow, base_dir, corpus_dir, tmp_path / "run", **changes), World())
        assert sorted(path.name for path in tmp_path.iterdir()) == before, changes
    with pytest.raises(UserError, match="not of --keys"):
        export_datastore.run(
            ExportConfig(keys=keys_dir, targets=imported / "targets", output=tmp_path / "out"),
            World(),
        )
    with pytest.raises(UserError, match="nothing to write"):
        ExportConfig(keys=keys_dir, output=tmp_path / "out", datastore=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_value_without_a_row_in_the_base_is_named(
    arrow: Any, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """The tokenizer has a token more than the base has rows for, as an added padding token is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    largest = max(row["label"] for row in stored_rows())
    shape = GPT2Config(vocab_size=largest, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=1)
    shape.bos_token_id = shape.eos_token_id = 0
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "small")
    config = config_of(arrow, tmp_path / "small", corpus_dir, tmp_path / "run", **DATASTORE_ALONE)
    with pytest.raises(UserError, match=rf"a token that the base has no row for .of {largest}"):
        import_datastore.run(config, World())
