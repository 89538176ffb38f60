"""Manifests for tests that need a directory and not the stage that writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.core.files import publish_json, read_sealed_json, record_file
from mlpmem_ds.formats.checkpoint import CheckpointManifest
from mlpmem_ds.formats.keys import CodecManifest, KeysManifest
from mlpmem_ds.formats.targets import ExcludedNeighbours, TargetsManifest
from mlpmem_ds.formats.trained_models import Provenance
from mlpmem_ds.maths.weighting import Weighting


def record_again(root: Path) -> None:
    """Let a directory's manifest say what its files are now: the test has changed them."""
    values = read_sealed_json(root / "manifest.json")
    values["files"] = [record_file(root, entry["name"]).to_json() for entry in values["files"]]
    publish_json(root / "manifest.json", values, seal=True)


def codec_manifest(**changes: Any) -> CodecManifest:
    """An int8 codec of four numbers a key, with these fields changed."""
    fields = {
        "name": "int8",
        "dim": 4,
        "scale": 1.0,
        "raw_dtype": None,
        "energy_kept": 1.0,
        "clipped_share": 0.0,
        "massive_dimensions": (),
    }
    return CodecManifest(**fields | changes)


def keys_manifest(**changes: Any) -> KeysManifest:
    """Keys of no model in particular, without memory inputs, with these fields changed."""
    fields = {
        "codec": codec_manifest(),
        "num_positions": 403,
        "unit_positions": 96,
        "split": "train",
        "block_size": 8,
        "vocab_size": 50,
        "vocabulary_sha256": "v" * 64,
        "key_size": 4,
        "key_layer": 1,
        "key_point": "ffn_input",
        "num_layers": 2,
        "layers_path": None,
        "input_codec": "none",
        "input_size": 0,
        "input_width": 4,
        "input_layer": 1,
        "input_point": "ffn_input",
        "input_num_layers": 2,
        "input_layers_path": None,
        "head_size": 50,
        "dtype": None,
        "attention": None,
    }
    return KeysManifest(**fields | changes)


def targets_manifest(**changes: Any) -> TargetsManifest:
    """Exact targets without a shard, with these fields changed."""
    fields = {
        "num_positions": 0,
        "block_size": 8,
        "shard_positions": 96,
        "vocab_size": 50,
        "k": 16,
        "weighting": Weighting(temperature=4.0),
        "neighbour_perplexity": 3.0,
        "temperature_rule": "fixed",
        "mass": 1.0,
        "search": "exact",
        "nprobe": None,
        "exclude": ExcludedNeighbours(rule="none", window=0),
        "encoding": "exact",
        "container": "tar.zst",
        "entries": 0,
        "rows_short_of_k": 0,
        "rows_without_neighbours": 0,
        "shards": (),
    }
    return TargetsManifest(**fields | changes)


def make_provenance(**changes: Any) -> Provenance:
    """Of a memory whose making is not known, with these fields changed."""
    fields = {
        "base": "b" * 64,
        "vocabulary_sha256": "v" * 64,
        "input_layer": 1,
        "input_point": "ffn_input",
        "input_layers_path": None,
        "key_layer": 1,
        "key_point": "ffn_input",
        "parameters": 1,
    }
    return Provenance(**fields | changes)


def checkpoint_manifest(**changes: Any) -> CheckpointManifest:
    """A checkpoint of one rank without files, with these fields changed."""
    fields = {
        "step": 0,
        "world": 1,
        "zero_stage": 2,
        "skipped_steps": 0,
        "subject": {},
        "values": {},
        "files": (),
    }
    return CheckpointManifest(**fields | changes)
