"""`import_datastore`: the authors' Arrow datastores and targets → a corpus, keys and targets, ready to train.

    OUTPUT/corpus    the values as one stream of tokens (their text is not in the files)
    OUTPUT/keys      codec `raw`; the memory's inputs are the keys, as in the authors' training
    OUTPUT/targets   encoding `exact`: the same probabilities

Row i of a datastore and of its targets is position i. The files hold no log-probabilities of the base, so
`train` refuses `--ce-through mixture` and `--objective helpful` on them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash, require_free_bytes, sha256_of_file
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.temporaries import written_bytes
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.engines.tokenizer import definition_sha256, open_encoder, require_end, vocab_size
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.arrow_tables import (
    DATASTORE,
    TARGETS,
    ArrowTable,
    key_width,
    open_arrow,
    read_keys,
    read_rows,
)
from mlpmem_ds.formats.corpus import (
    SPLITS,
    CorpusManifest,
    CorpusUnit,
    SplitManifest,
    TokenizerFacts,
    token_dtype,
    vocabulary_sha256,
)
from mlpmem_ds.formats.keys import (
    CodecManifest,
    Keys,
    KeysManifest,
    bfloat16_bits,
    file_name,
    open_keys,
    unit_name,
)
from mlpmem_ds.formats.target_encoding import pack_block
from mlpmem_ds.formats.target_shards import TargetShard, index_name, shard_name, write_shard
from mlpmem_ds.formats.targets import ExcludedNeighbours, TargetsManifest
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.structure import resolve_layer
from mlpmem_ds.stages.corpus.corpus_tokenizer import write_tokenizer
from mlpmem_ds.stages.exchange.config import ImportConfig

_TOKENIZER_UNIT = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A datastore and the base of its keys, checked."""

    table: ArrowTable
    width: int
    tokenizer: Any
    end_id: int
    model_sha256: str
    head_size: int
    num_layers: int
    layer: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(vocab_size(self.tokenizer))


def run(config: ImportConfig, world: World) -> None:
    """Import what is given; every input is checked before anything is written.

    Raises:
        UserError: inputs that do not belong together, or are not what they should be.
    """
    source = _open_source(config) if config.datastore else None
    targets = open_arrow(config.targets, TARGETS, flag="--targets") if config.targets else None
    keys = open_keys(config.keys) if config.keys is not None else None
    if keys is not None:
        config.check_shards(keys.manifest.block_size, of="the block size of --keys")
    num_rows = source.table.num_rows if source is not None else keys.num_positions if keys is not None else 0
    if targets is not None and targets.num_rows != num_rows:
        raise UserError(
            f"--targets hold {targets.num_rows:,} rows, the keys {num_rows:,}: give those of the same"
            " datastore"
        )
    if num_rows == 0:
        raise UserError("--datastore is empty: give files with rows")
    if source is not None:
        needed = num_rows * (4 * source.width + 2 * source.dtype.itemsize)
        needed -= written_bytes(config.output / CorpusManifest.FORMAT, ".bin")
        needed -= written_bytes(config.output / KeysManifest.FORMAT, ".npy")
        require_free_bytes(config.output, needed, what="the imported keys")
        corpus_sha256 = _write_corpus(config, source, world)
        _write_keys(config, source, corpus_sha256, world)
        keys = open_keys(config.output / "keys")
    if targets is not None:
        assert keys is not None
        _write_targets(config, targets, keys, world)


def _open_source(config: ImportConfig) -> _Source:
    assert config.model is not None
    table = open_arrow(config.datastore, DATASTORE, flag="--datastore")
    model_sha256 = fingerprint_model(config.model)
    try:
        base: Any = AutoConfig.from_pretrained(config.model, trust_remote_code=False).get_text_config(
            decoder=True
        )
        layer = resolve_layer(config.key_layer, base.num_hidden_layers)
    except Exception as error:  # a family of errors for each kind of model
        raise UserError(f"--model {config.model} or --key-layer cannot be used ({error})") from error
    name, flag = (config.model, "--model") if config.tokenizer is None else (config.tokenizer, "--tokenizer")
    tokenizer = load_tokenizer(name, flag=flag)
    width = key_width(table)
    if width != base.hidden_size:
        raise UserError(
            f"--datastore has keys of {width:,} numbers, --model {config.model} states of"
            f" {base.hidden_size:,}: give the base of the keys"
        )
    return _Source(
        table=table,
        width=width,
        tokenizer=tokenizer,
        end_id=require_end(open_encoder(tokenizer, label=f"{flag} {name}")),
        model_sha256=model_sha256,
        head_size=base.vocab_size,
        num_layers=base.num_hidden_layers,
        layer=layer,
    )


def _values(source: _Source, block: Block) -> np.ndarray:
    values_n = source.table.numbers("vals", *block)
    bad_n = (values_n < 0) | (values_n >= vocab_size(source.tokenizer))
    if bad_n.any():
        raise source.table.fault(
            block.start + int(np.argmax(bad_n)), "its value is not in the tokenizer's vocabulary"
        )
    if (values_n >= source.head_size).any():  # a tokenizer may have more tokens than the base has rows
        raise source.table.fault(
            block.start + int(np.argmax(values_n >= source.head_size)),
            f"its value is a token that the base has no row for (of {source.head_size:,})",
        )
    return values_n.astype(source.dtype)


def _units(config: ImportConfig, num_rows: int) -> dict[str, Block]:
    return {unit_name(block.start): block for block in split_blocks(num_rows, config.unit_positions)}


def _hash_of(paths: tuple[Path, ...]) -> str:
    return content_hash([[path.name, path.stat().st_size, sha256_of_file(path)] for path in paths])


def _open(
    config: ImportConfig,
    manifest: type[Manifest],
    inputs: dict[str, str],
    flags: tuple[str, ...],
    block_size: int,
    world: World,
) -> StageDirectory:
    """OUTPUT/<format> as a stage directory whose bytes these flags decide, among them `block_size`."""
    return open_stage(
        config.output / manifest.FORMAT,
        stage=manifest.FORMAT,
        version=manifest.VERSION,
        config=config,
        inputs=inputs,
        world=world,
        resolved={"block_size": block_size},
        flags=flags,
    )


def _write_corpus(config: ImportConfig, source: _Source, world: World) -> str:
    units = _units(config, source.table.num_rows)
    vocabulary = vocabulary_sha256(source.tokenizer)
    inputs = {"datastore": _hash_of(config.datastore), "vocabulary": vocabulary}
    stage = _open(config, CorpusManifest, inputs, ("block_size", "unit_positions"), config.block_size, world)

    def write_files(_: str, writer: UnitWriter) -> None:
        write_tokenizer(source.tokenizer, writer)

    def write(unit: str, writer: UnitWriter) -> dict[str, Any]:
        block = units[unit]
        tokens_n = _values(source, block)
        if block.start == 0:  # the stream's first token is the value of no position
            tokens_n = np.concatenate([np.array([source.end_id], source.dtype), tokens_n])
        with writer.file(f"train/tokens-{unit}.bin") as path:
            path.write_bytes(tokens_n.tobytes())
        entry = {
            "name": f"rows {block.start}-{block.stop}",
            "group": "datastore",
            "bytes": 0,
            "tokens": len(tokens_n),
        }
        with writer.file(f"train/documents-{unit}.jsonl") as path:
            path.write_text(json.dumps(entry) + "\n", encoding="utf-8")
        return {"tokens": len(tokens_n), "documents": 1, "bytes": 0}

    def describe() -> CorpusManifest:
        train = [
            CorpusUnit(unit=unit, **summary)
            for unit, summary in zip(units, stage.summaries(list(units)), strict=True)
        ]
        size = vocab_size(source.tokenizer)
        return CorpusManifest(
            tokenizer=TokenizerFacts(
                vocabulary_sha256=vocabulary,
                vocab_size=size,
                end_of_document_id=source.end_id,
                definition_sha256=definition_sha256(source.tokenizer),
            ),
            token_dtype=token_dtype(size).str,
            block_size=config.block_size,
            stride=config.block_size,
            splits={split: SplitManifest.from_units(train if split == "train" else []) for split in SPLITS},
        )

    stage.run_units([_TOKENIZER_UNIT], write_files)
    stage.run_units(list(units), write)
    return _finish(stage, [_TOKENIZER_UNIT, *units], describe)


def _finish(stage: StageDirectory, units: list[str], describe: Any) -> str:
    """Complete the directory and return the SHA-256 of its manifest; a rank waits for the others' units."""
    stage.complete(units, describe, wait=True)
    return sha256_of_file(stage.manifest_path)


def _write_keys(config: ImportConfig, source: _Source, corpus_sha256: str, world: World) -> None:
    units, num_rows = _units(config, source.table.num_rows), source.table.num_rows
    inputs = {"corpus": corpus_sha256, "model": source.model_sha256}
    flags = ("key_layer", "block_size", "unit_positions")
    stage = _open(config, KeysManifest, inputs, flags, config.block_size, world)
    progress = Progress(num_rows, label="keys", unit="positions", world=world)

    name_of = partial(file_name, unit_positions=config.unit_positions, total=num_rows)

    def write(unit: str, writer: UnitWriter) -> None:
        first = units[unit].start
        keys_nD = read_keys(source.table, *units[unit])
        writer.array(name_of("keys", first), keys_nD)
        writer.array(name_of("values", first), _values(source, units[unit]))
        writer.array(name_of("inputs", first), bfloat16_bits(keys_nD))
        progress.advance(len(keys_nD))

    def describe() -> KeysManifest:
        codec = CodecManifest(
            name="raw",
            dim=source.width,
            scale=1.0,
            raw_dtype="float16",
            energy_kept=1.0,
            clipped_share=0.0,
            massive_dimensions=(),
        )
        return KeysManifest(
            codec=codec,
            num_positions=num_rows,
            unit_positions=config.unit_positions,
            split="train",
            block_size=config.block_size,
            vocab_size=vocab_size(source.tokenizer),
            vocabulary_sha256=vocabulary_sha256(source.tokenizer),
            key_size=source.width,
            key_layer=source.layer,
            key_point="ffn_input",
            num_layers=source.num_layers,
            layers_path=None,
            input_codec="bf16",
            input_size=source.width,
            input_width=source.width,
            input_layer=source.layer,
            input_point="ffn_input",
            input_num_layers=source.num_layers,
            input_layers_path=None,
            head_size=source.head_size,
            dtype=None,
            attention=None,
            begin_of_window_ids=None,
        )

    stage.run_units(list(units), write)
    progress.close()
    _finish(stage, list(units), describe)


def _write_targets(config: ImportConfig, table: ArrowTable, keys: Keys, world: World) -> None:
    size, block_size = keys.manifest.vocab_size, keys.manifest.block_size
    shards = {f"{block.start:012d}": block for block in split_blocks(table.num_rows, config.shard_positions)}
    inputs = {"keys": keys.sha256, "targets": _hash_of(config.targets)}
    flags = ("k", "temperature", "block_size", "shard_positions")
    stage = _open(config, TargetsManifest, inputs, flags, block_size, world)
    progress = Progress(table.num_rows, label="targets", unit="positions", world=world)

    verify_inputs(stage, keys, keys.array_files("values"), label="keys")

    def write(unit: str, writer: UnitWriter) -> dict[str, Any]:
        shard, empty = shards[unit], 0

        def blocks() -> Any:
            nonlocal empty
            for start in range(shard.start, shard.stop, block_size):
                stop = min(start + block_size, shard.stop)
                rows, labels_n = read_rows(table, start, stop, size)
                wrong_n = labels_n != keys.read("values", start, stop)
                if wrong_n.any():
                    raise table.fault(
                        start + int(np.argmax(wrong_n)), "its label is not the value of the key in this row"
                    )
                empty += int((rows.counts_n == 0).sum())
                yield pack_block(start, rows, dtype=token_dtype(size))
                progress.advance(stop - start)

        name = shard_name(shard.start, shard.size)
        with writer.file(name) as shard_path, writer.file(index_name(name)) as index_path:
            totals = write_shard(shard_path, index_path, blocks())
        return {**totals, "rows_short_of_k": 0, "rows_without_neighbours": empty}

    def describe() -> TargetsManifest:
        summaries = stage.summaries(list(shards))
        return TargetsManifest(
            num_positions=table.num_rows,
            block_size=block_size,
            shard_positions=config.shard_positions,
            vocab_size=size,
            k=config.k,
            weighting=Weighting(temperature=config.temperature),
            neighbour_perplexity=None,
            temperature_rule="imported",
            mass=1.0,
            search="imported",
            nprobe=None,
            exclude=ExcludedNeighbours(rule="none", window=0),
            encoding="exact",
            container="tar.zst",
            entries=sum(summary["entries"] for summary in summaries),
            rows_short_of_k=0,
            rows_without_neighbours=sum(summary["rows_without_neighbours"] for summary in summaries),
            shards=tuple(
                TargetShard(
                    name=shard_name(block.start, block.size),
                    first=block.start,
                    count=block.size,
                    entries=summary["entries"],
                    samples=summary["samples"],
                )
                for block, summary in zip(shards.values(), summaries, strict=True)
            ),
        )

    stage.run_units(list(shards), write)
    progress.close()
    _finish(stage, list(shards), describe)
