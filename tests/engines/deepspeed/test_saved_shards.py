"""Files of a checkpoint are read without running code: tensors, plain values, DeepSpeed's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import record_file
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part
from mlpmem_ds.engines.deepspeed.saved_shards import SavedShards, load_plain, refuse_foreign_code
from mlpmem_ds.engines.deepspeed.weights import weights_of_checkpoint
from mlpmem_ds.formats.checkpoint import Checkpoint

from ...manifests import checkpoint_manifest


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_deepspeed_writes_is_plain(tmp_path: Path) -> None:
    import_deepspeed()
    scaler = import_part("runtime.fp16.loss_scaler").LossScaler(1.0)
    address = import_part("utils.tensor_fragment").fragment_address(numel=3, start=4)
    stage = import_part("runtime.zero.config").ZeroStageEnum(2)
    content = {"scaler": scaler, "address": address, "stage": stage, "numbers": torch.arange(3.0)}
    torch.save(content, tmp_path / "a.pt")
    found = load_plain(tmp_path / "a.pt")
    assert (found["address"].numel, found["stage"], found["scaler"].cur_scale) == (3, 2, 1.0)
    assert found["numbers"].tolist() == [0, 1, 2] and refuse_foreign_code([tmp_path / "a.pt"]) is None


def checkpoint_of(folder: Path) -> Checkpoint:
    records = tuple(record_file(folder, path.name) for path in folder.glob("*.pt"))
    return Checkpoint(path=folder, manifest=checkpoint_manifest(files=records))


def test_a_file_of_stage_0_has_the_whole_weights_and_those_of_the_manifest_are_read(tmp_path: Path) -> None:
    import_deepspeed()
    torch.save({"module": {"a": torch.arange(3.0)}}, tmp_path / "mp_rank_00_model_states.pt")
    checkpoint = checkpoint_of(tmp_path)
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert weights_of_checkpoint(checkpoint)["a"].read().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_foreign_code_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    import_deepspeed()
    shapes = {"module": {}, "param_shapes": [{"a": torch.Size([3])}]}
    torch.save(shapes, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({**shapes, "x": Touch(tmp_path / "ran")}, tmp_path / name)
    checkpoint = checkpoint_of(tmp_path)
    for read in (weights_of_checkpoint, SavedShards):
        with pytest.raises(DamagedDataError, match="cannot be put together"):
            read(checkpoint)
    assert "cannot be put together" in (refuse_foreign_code([tmp_path / name]) or "")
    assert not (tmp_path / "ran").exists()
