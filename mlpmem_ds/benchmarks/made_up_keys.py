"""Made-up keys for benchmarks: they stand in for real ones in speed, and not in fidelity.

Shape legend: N keys, D numbers in a key, V vocabulary, C clusters, T typical tokens of a cluster.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import CodecManifest, KeysManifest, file_name, unit_name

_SEED = 1
_SCALE = 1 / 16
_BLOCK_SIZE = 1024
_UNIT_POSITIONS = 16 * _BLOCK_SIZE


def write_synthetic_keys(root: Path, config: Any, world: World) -> None:
    """A key directory as extract_keys leaves it, of made-up codes and values."""
    codes_ND, values_N = synthetic_keys(config.positions, config.dim, config.vocab_size)
    write_made_up_keys(root, codes_ND, values_N, config, world, unit_positions=_UNIT_POSITIONS)


def write_made_up_keys(
    root: Path, codes_ND: np.ndarray, values_N: np.ndarray, config: Any, world: World, *, unit_positions: int
) -> None:
    """A key directory of these int8 codes and values, without memory inputs; no model gave them.

    Args:
        root: the directory.
        codes_ND, values_N: the keys and their values.
        config: flags that it is made for; `vocab_size` is one of them.
        world: this rank.
        unit_positions: positions of a unit.
    """
    stage = open_stage(
        root,
        stage=KeysManifest.FORMAT,
        version=KeysManifest.VERSION,
        config=config,
        inputs={"corpus": "made up"},
        world=world,
    )
    units = {unit_name(block.start): slice(*block) for block in split_blocks(len(codes_ND), unit_positions)}

    name_of = partial(file_name, unit_positions=unit_positions, total=len(codes_ND))

    def write(unit: str, writer: UnitWriter) -> None:
        rows = units[unit]
        writer.array(name_of("keys", rows.start), codes_ND[rows])
        writer.array(name_of("values", rows.start), values_N[rows])
        writer.array(name_of("log_probabilities", rows.start), np.zeros(len(values_N[rows]), np.float32))

    def describe() -> KeysManifest:
        dim = codes_ND.shape[1]
        codec = CodecManifest(
            name="int8",
            dim=dim,
            scale=_SCALE,
            raw_dtype=None,
            energy_kept=1.0,
            clipped_share=0.0,
            massive_dimensions=(),
        )
        return KeysManifest(
            codec=codec,
            num_positions=len(codes_ND),
            unit_positions=unit_positions,
            split="train",
            block_size=_BLOCK_SIZE,
            vocab_size=config.vocab_size,
            vocabulary_sha256="made up",
            key_size=dim,
            key_layer=0,
            key_point="ffn_input",
            num_layers=1,
            layers_path=None,
            input_codec="none",
            input_size=0,
            input_width=dim,
            input_layer=0,
            input_point="ffn_input",
            input_num_layers=1,
            input_layers_path=None,
            head_size=config.vocab_size,
            dtype=None,
            attention=None,
        )

    stage.run_units(list(units), write)
    stage.complete(list(units), describe)


def synthetic_keys(num_keys: int, dim: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [N, D] and values [N] (uint16 where they fit), by a fixed seed.

    Centres around centres; cluster sizes and values by Zipf's law; standard deviations of the directions fall
    as 1/sqrt(rank), then a random rotation spreads them. Seven values of ten are one of their cluster's 64
    tokens, so that 1,024 neighbours carry about 290 distinct ones, as on WikiText with a small base.
    """
    generator = np.random.default_rng(_SEED)
    num_clusters = max(1, math.isqrt(num_keys) * 4)
    spread_D = 1 / np.sqrt(1 + np.arange(dim))
    rotation_DD = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    parents_CD = generator.normal(size=(max(1, num_clusters // 16), dim))
    centres_CD = parents_CD[generator.integers(len(parents_CD), size=num_clusters)] + generator.normal(
        size=(num_clusters, dim)
    )
    shares_C = 1 / (10 + np.arange(num_clusters))
    clusters_N = generator.choice(num_clusters, num_keys, p=shares_C / shares_C.sum())
    states_ND = (centres_CD[clusters_N] + generator.normal(size=(num_keys, dim))) * spread_D @ rotation_DD
    codes_ND = np.clip(np.rint(states_ND * (32 / states_ND.std())), -127, 127).astype(np.int8)

    shares_V = (1.0 + np.arange(vocab_size)) ** -1.15
    shares_V /= shares_V.sum()
    tokens_CT = generator.choice(vocab_size, (num_clusters, 64), p=shares_V)
    rank_N = np.minimum(generator.geometric(0.15, num_keys) - 1, 63)
    values_N = np.where(
        generator.random(num_keys) < 0.7,
        tokens_CT[clusters_N, rank_N],
        generator.choice(vocab_size, num_keys, p=shares_V),
    )
    return codes_ND, values_N.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)
