"""Keys and indexes, compared with their checksums before a stage searches them: a flipped byte would be a
wrong neighbour in silence.

The searches are then opened with `is_verified`.
"""

from __future__ import annotations

from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys


def verify_keys(stage: StageDirectory, keys: Keys, *, label: str = "keys") -> None:
    """Compare all keys and values with their checksums, each file once over all ranks and starts; `label` and
    errors as in `verify_inputs`. All ranks call it."""
    names = [keys.file_name(array, block.start) for block in keys.blocks for array in ("keys", "values")]
    verify_inputs(stage, keys, names, label=label)


def verify_index(stage: StageDirectory, index: IndexDirectory) -> None:
    """The same of an index's shards."""
    verify_inputs(stage, index, [path.name for path in index.shard_paths], label="index")
