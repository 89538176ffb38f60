"""Part of `train`: the base's output head, lent to a memory that has none of its own (`--head frozen`).

It does not change, so that it is no parameter: ZeRO neither cuts nor saves it, and it has no place in
optimizers, checkpoints and results. Where the base runs next to the training its own tensors are used; else a
rank reads them out of the base's files, and holds them whole in the dtype that it computes in. That is no
more than a head under ZeRO-3 takes at its peak, which is whole from the forward to the end of the backward.

V vocabulary, D width of the base.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.hidden_states import DTYPES, TransformersSource
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.objective import Lender
from mlpmem_ds.models.structure import UnknownStructureError
from mlpmem_ds.stages.training.base_files import open_base_files
from mlpmem_ds.stages.training.base_start import fingerprint_of_head, head_start
from mlpmem_ds.stages.training.initial_memory import InitialMemory


def check_initial_head(initial: InitialMemory, model: str | None) -> None:
    """Make sure that the head which the memory of --init-from shares with its base is that of --model.

    Raises:
        UserError: no base was given, or another.
    """
    if initial.memory.shared_head is None:
        return
    named = f"--init-from {initial.root} has no output head of its own and uses its base's"
    if model is None:
        raise UserError(f"{named}: give that base with --model")
    try:
        found = fingerprint_of_head(open_base_files(model))
    except UnknownStructureError as error:
        raise UserError(f"--model {model}: {error}") from error
    if found != initial.memory.shared_head:
        raise UserError(f"{named}, and --model {model} has another head: give the base of that memory")


def lender_of(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    running: TransformersSource | None,
    base_end: BaseEnd | None,
) -> Lender:
    """What gives the head's weight [V, D] and bias, for a training on this device in this dtype.

    Args:
        model: the base.
        running: the base that runs next to the training, if one does; cut over the ranks, its head is
            gathered in each forward.
        base_end: the base's end where the objective has it already, there and in this dtype.
    """
    if base_end is not None:
        return _lender(base_end.weight_VD, base_end.bias_V)
    if running is not None and DTYPES[running.dtype_name] == dtype and running.device == device:
        return running.head
    readers = head_start(open_base_files(model)).readers
    tensors = {name: read().to(device, dtype) for name, read in readers.items()}
    return _lender(tensors["head.weight"], tensors.get("head.bias"))


def _lender(weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> Lender:
    return lambda: nullcontext((weight_VD, bias_V))
