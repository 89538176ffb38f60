"""Part of `train_baseline`: low-rank matrices (LoRA) of a memory's number of parameters, and their files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.adapters import LowRankModel, parameters_of_rank_one
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.stages.base.model import MODULE_PREFIX, save_model

_ADAPTER = "adapter"


def rank_for(model: PreTrainedModel, num_parameters: int) -> int:
    """The rank whose matrices have nearly so many parameters, at least 1.

    Raises:
        UserError: one rank alone has twice as many.
    """
    each = parameters_of_rank_one(model)
    if num_parameters * 2 < each:
        raise UserError(
            f"--kind lora: matrices of rank 1 next to all linear layers have {each:,} parameters, and"
            f" {num_parameters:,} are asked for: give --rank 1, or compare with a larger memory"
        )
    return max(1, round(num_parameters / each))


def write_low_rank(
    writer: UnitWriter,
    files: WeightFiles,
    *,
    reload: Callable[[], PreTrainedModel],
    rank: int,
    alpha: float,
    name: str,
    corpus: CorpusSplit,
) -> dict[str, Any]:
    """Write the base with the matrices merged into it, a plain model directory, and the matrices in
    `adapter/`.

    Args:
        writer: of the directory's one unit.
        files: of the trained matrices, by their names inside a `NextTokenModule`.
        reload: reads the base again, in float32: the one that was trained next to may be rounded.
        rank: of the matrices.
        alpha: of the matrices.
        name: of the base.
        corpus: whose tokenizer goes along.
    """
    low_rank = LowRankModel(reload(), rank=rank, alpha=alpha, name=name)
    low_rank.take({name.removeprefix(MODULE_PREFIX): tensor for name, tensor in files.read().items()})
    trained = low_rank.num_trained
    with tempfile.TemporaryDirectory() as scratch:
        low_rank.save_adapter(Path(scratch))
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            with writer.file(f"{_ADAPTER}/{file}") as path:
                shutil.copyfile(Path(scratch) / file, path)
    merged = low_rank.merged()
    save_model(writer, merged, corpus)
    return {"parameters": merged.num_parameters(), "parameters_trained": trained}
