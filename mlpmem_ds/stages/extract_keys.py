"""Second stage: corpus → keys. Run the frozen base once; keep each position's key, value, log-probability and memory input.

Phase 1 fits the int8 codec on a sample of windows (one unit); phase 2 is one unit for each block of positions.

D width of the base, E size of a stored key, n positions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, Window, split_blocks
from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import canonical_json
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import UnitWriter, open_stage, require_free_bytes
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import (
    PositionStates,
    StateSource,
    TransformersSource,
    check_source_reads,
    fingerprint_model,
    resolve_point,
    scan_positions,
)
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.keys import FORMAT, VERSION, bfloat16_bits, encode, unit_name
from mlpmem_ds.models.backbone import CapturePoint

_logger = logging.getLogger(__name__)
_CODEC_UNIT = "codec"
_MAX_EXACT_DIM = 1040  # above it a product of int8 codes may pass 2^24 and is no longer exact in float32
_CLIP_QUANTILE = 0.9999


def layer_number(text: str) -> int | float:
    """`-1` is an index, `0.7` a fraction of the depth."""
    return float(text) if "." in text else int(text)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which states are kept, and how."""

    model: str = option("base language model: a directory or Hub name", identity=False)
    corpus: Path = option("corpus directory")
    output: Path = option("key directory to write")
    split: str = option("split of the corpus", "train")
    key_layer: int | float = option(
        "layer of the keys: an index, or a fraction of the depth such as 0.7",
        -1,
        parse=layer_number,
        metavar="LAYER",
        identity=False,
    )
    input_layer: int | float = option(
        "layer of the memory's inputs", -1, parse=layer_number, metavar="LAYER", identity=False
    )
    key_point: Literal["ffn_input", "layer_output", "final_norm"] = option(
        "where in the layer both are read", "ffn_input"
    )
    codec: Literal["int8", "raw"] = option("int8 codes of the rotated key, or the raw key in float16", "int8")
    dim: int = option("numbers in an int8 key; 0 = the width of the base, at most 256", 0, identity=False)
    store_inputs: bool = option("store the memory's inputs (2 bytes a number) for training", True)
    fit_positions: int = option("positions of the sample that fits the codec", 16384)
    unit_positions: int = option("positions in a unit of work", 65536)
    batch_windows: int = option("windows that the base reads at once", 16, identity=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the base's forward pass; auto = bfloat16 on a GPU, float32 on a CPU", "auto", identity=False
    )
    device: str = option("auto, cpu, cuda or cuda:N", "auto", identity=False)
    attention: str = option("attention implementation: sdpa, eager or flash_attention_2", "sdpa")
    seed: int = option("seed of the sample and of the rotation", 0)

    def __post_init__(self) -> None:
        for name in ("fit_positions", "unit_positions", "batch_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dim <= _MAX_EXACT_DIM:
            raise UserError(f"--dim {self.dim}: int8 keys have 1 to {_MAX_EXACT_DIM} numbers (more would not be exact)")


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a key is stored. mean [D], rotation [D, E]; both None for the raw codec."""

    mean_D: np.ndarray | None
    rotation_DE: np.ndarray | None
    scale: float


def run(config: Config, world: World) -> None:
    """Write the key directory; see formats/README.md."""
    corpus = open_corpus(config.corpus, config.split)
    if config.unit_positions % corpus.block_size:
        raise UserError(
            f"--unit-positions {config.unit_positions} must be a multiple of the corpus's block size "
            f"{corpus.block_size}"
        )
    fingerprint = fingerprint_model(config.model)
    source = TransformersSource(
        config.model, dtype=config.dtype, device=config.device, attention=config.attention, local_rank=world.local_rank
    )
    check_source_reads(source, corpus, config.model)
    points = {
        "key": resolve_point(source, config.key_layer, config.key_point, flag="--key-layer"),
        "input": resolve_point(source, config.input_layer, config.key_point, flag="--input-layer"),
    }
    dim = _resolve_dim(config, source)
    _require_disk(config, corpus, source, dim)
    directory = open_stage(
        config.output,
        stage=FORMAT,
        version=VERSION,
        config=config,
        world=world,
        inputs={"corpus": corpus.sha256, "model": fingerprint},
        extra={
            "dim": dim,
            "dtype": source.dtype_name,
            "key_layer": points["key"].layer,
            "input_layer": points["input"].layer,
        },
    )

    phase_1 = [_CODEC_UNIT] if config.codec == "int8" else []
    directory.run_units(phase_1, lambda _, writer: _fit_codec(config, corpus, source, points["key"], dim, writer))
    directory.wait_for(phase_1)
    codec = read_codec(config.output) if phase_1 else Codec(mean_D=None, rotation_DE=None, scale=1.0)

    blocks = {unit_name(block.start): block for block in split_blocks(corpus.num_positions, config.unit_positions)}
    progress = Progress(corpus.num_positions, label="keys", unit="positions", world=world)

    def extract(unit: str, writer: UnitWriter) -> dict[str, Any]:
        return _extract_unit(config, corpus, source, points, codec, blocks[unit], writer, progress)

    directory.run_units(list(blocks), extract)
    progress.close()

    def describe() -> dict[str, Any]:
        clipped = sum(summary["clipped"] for summary in directory.summaries(list(blocks)))
        fit = directory.summaries(phase_1)[0] if phase_1 else {"energy_kept": 1.0}
        return {
            "codec": {
                "name": config.codec,
                "dim": dim,
                "scale": codec.scale,
                "energy_kept": fit["energy_kept"],
                "clipped_share": clipped / (corpus.num_positions * dim),
            },
            "num_positions": corpus.num_positions,
            "unit_positions": config.unit_positions,
            "key_size": source.width,
            "input_size": source.width if config.store_inputs else 0,
            "key_layer": points["key"].layer,
            "input_layer": points["input"].layer,
            "key_point": config.key_point,
            "num_layers": source.num_layers,
            "vocab_size": corpus.vocab_size,
            "vocabulary_sha256": corpus.vocabulary_sha256,
            "head_size": source.vocab_size,
            "split": config.split,
            "block_size": corpus.block_size,
        }

    directory.finish([*phase_1, *blocks], describe)


def _resolve_dim(config: Config, source: StateSource) -> int:
    if config.codec == "raw":
        return source.width
    if config.dim > source.width:
        raise UserError(f"--dim {config.dim} is more than the base's width {source.width}")
    return config.dim or min(source.width, 256)


def _require_disk(config: Config, corpus: CorpusSplit, source: StateSource, dim: int) -> None:
    key_bytes = dim * (1 if config.codec == "int8" else 2)
    input_bytes = 2 * source.width if config.store_inputs else 0
    per_position = key_bytes + input_bytes + 4 + corpus.dtype.itemsize
    total = per_position * corpus.num_positions
    _logger.info(
        "%s positions at %d bytes (key %d, input %d, value and log-probability %d): %.3f GB",
        f"{corpus.num_positions:,}",
        per_position,
        key_bytes,
        input_bytes,
        per_position - key_bytes - input_bytes,
        total / 1e9,
    )
    written = sum(path.stat().st_size for path in config.output.glob("*.npy")) if config.output.is_dir() else 0
    require_free_bytes(config.output, total - written, what="the keys")


def _fit_codec(
    config: Config, corpus: CorpusSplit, source: StateSource, point: CapturePoint, dim: int, writer: UnitWriter
) -> dict[str, Any]:
    """Mean, rotation and scale from windows drawn by hash; published as the unit `codec`."""
    states_ND = np.concatenate(
        [
            _checked(
                next(scan_positions(source, corpus, Block(window.start, window.stop), {"key": point}, batch_windows=1)),
                "key",
                point,
            )
            for window in _sample_windows(corpus, config.fit_positions, config.seed)
        ]
    )
    mean_D = states_ND.mean(axis=0, dtype=np.float64)
    centred_ND = states_ND.astype(np.float64) - mean_D
    variances_D, directions_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    leading_DE = directions_DD[:, ::-1][:, :dim]
    mixing_EE, _ = np.linalg.qr(np.random.default_rng(config.seed).standard_normal((dim, dim)))
    rotation_DE = leading_DE @ mixing_EE
    limit = float(np.quantile(np.abs(centred_ND @ rotation_DE), _CLIP_QUANTILE))
    if limit == 0:
        raise UserError("all sampled keys are equal: this layer of the model says nothing about the text")
    writer.array("codec/mean.npy", mean_D.astype(np.float32))
    writer.array("codec/rotation.npy", rotation_DE.astype(np.float32))
    summary = {
        "scale": limit / 127,
        "energy_kept": float(variances_D[::-1][:dim].sum() / variances_D.sum()),
        "positions": len(states_ND),
    }
    with writer.file("codec/codec.json") as path:
        path.write_bytes(canonical_json(summary))
    _logger.info("codec: %d of %d dimensions keep %.4f of the energy", dim, source.width, summary["energy_kept"])
    return summary


def _sample_windows(corpus: CorpusSplit, num_positions: int, seed: int) -> list[Window]:
    """Windows in hash order until they hold the wanted number of positions."""
    taken, total = [], 0
    for window in sorted(corpus.windows(), key=lambda window: hash_fraction(window.start, seed)):
        if total >= num_positions:
            break
        taken.append(window)
        total += window.stop - window.start
    return taken


def read_codec(root: Path) -> Codec:
    """The int8 codec of a key directory."""
    return Codec(
        mean_D=np.load(root / "codec/mean.npy", allow_pickle=False),
        rotation_DE=np.load(root / "codec/rotation.npy", allow_pickle=False),
        scale=json.loads((root / "codec/codec.json").read_bytes())["scale"],
    )


def _extract_unit(
    config: Config,
    corpus: CorpusSplit,
    source: StateSource,
    points: Mapping[str, CapturePoint],
    codec: Codec,
    block: Block,
    writer: UnitWriter,
    progress: Progress,
) -> dict[str, Any]:
    keys, inputs, log_probabilities, clipped = [], [], [], 0
    wanted = points if config.store_inputs else {"key": points["key"]}
    for rows in scan_positions(source, corpus, block, wanted, batch_windows=config.batch_windows):
        states_nD = _checked(rows, "key", points["key"])
        if codec.mean_D is None or codec.rotation_DE is None:
            keys.append(states_nD.astype(np.float16))
        else:
            codes_nE, num_clipped = encode(states_nD, codec.mean_D, codec.rotation_DE, codec.scale)
            keys.append(codes_nE)
            clipped += num_clipped
        if config.store_inputs:
            inputs.append(bfloat16_bits(_checked(rows, "input", points["input"])))
        log_probabilities.append(rows.log_probabilities)
        progress.advance(rows.block.size)
    name = unit_name(block.start)
    writer.array(f"keys-{name}.npy", np.concatenate(keys))
    writer.array(f"values-{name}.npy", corpus.values(*block).astype(corpus.dtype))
    writer.array(f"log_probabilities-{name}.npy", np.concatenate(log_probabilities))
    if config.store_inputs:
        writer.array(f"inputs-{name}.npy", np.concatenate(inputs))
    return {"positions": block.size, "clipped": clipped}


def _checked(rows: PositionStates, name: str, point: CapturePoint) -> np.ndarray:
    """The named states as float32 [n, D], all finite.

    Raises:
        UserError: names the first position and the layer that gave a number which is not finite.
    """
    states_nD = rows.states[name]
    finite_n = torch.isfinite(states_nD).all(dim=1)
    if not bool(finite_n.all()):
        position = rows.block.start + int((~finite_n).nonzero()[0])
        raise UserError(
            f"the {name} at position {position}, layer {point.layer} ({point.point}), is not finite: the model's "
            "weights are damaged, or --dtype float32 is needed"
        )
    return states_nD.numpy()
