"""Part of `train`: what a memory takes over from its base before the first step.

`--head base` takes the output head, with its bias, scale and soft cap where the base has them. With `--head
frozen` that is not copied but used (`lent_head`), and the memory keeps its identity alone. `--start base`
takes more: residual blocks that add nothing yet (`down` at zero), and the base's final norm, or none where
the inputs stand behind it. Then p_mem = p_base before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.backbone import configured_transform
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.final_norm import final_norm, kind_of_norm
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.shared_head import FINGERPRINT_ROWS, head_fingerprint
from mlpmem_ds.models.structure import UnknownStructureError, output_head
from mlpmem_ds.stages.training.base_files import BaseFiles, Read, open_base_files
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.inputs import TrainingInputs

_REMEDY = "extract the keys with --input-layer -1 --input-point layer_output"


@dataclass(frozen=True, kw_only=True)
class BaseStart:
    """What of the base a memory starts with."""

    fields: Mapping[str, Any]
    """of its MemoryConfig"""
    head_shape: tuple[int, ...]
    """(vocabulary, width)"""
    is_whole: bool
    """whether the memory starts as the base, not with its head alone"""
    readers: Mapping[str, Read] = field(repr=False)
    """name of a parameter of the memory → what reads it"""

    def check_fits(self, *, vocab_size: int, hidden_size: int, input_size: int) -> None:
        """Make sure that a memory of these sizes can take it.

        Raises:
            UserError: it is not as wide as the base's head.
        """
        expected = (vocab_size, hidden_size)
        if self.head_shape != expected:
            raise UserError(
                f"--{'start' if self.is_whole else 'head'} base: the base's head is {self.head_shape}"
                f" (vocabulary, width), the memory's {expected}: leave out --hidden-size and --preset, or use"
                f" --{'start' if self.is_whole else 'head'} random"
            )
        if self.is_whole and input_size < hidden_size:
            raise UserError(
                f"--start base: the inputs have {input_size:,} numbers and the base's head reads"
                f" {hidden_size:,}: {_REMEDY}, or use --start random"
            )

    def parameters(self, memory: MemoryConfig) -> dict[str, Read]:
        """`readers`, and zeros for what writes to the residual stream where the memory starts as the base."""
        readers = dict(self.readers)
        if memory.shared_head is not None:
            readers = {name: read for name, read in readers.items() if not name.startswith("head.")}
        if self.is_whole:
            shape = (memory.hidden_size, memory.intermediate_size)
            for block in range(memory.num_blocks):
                readers[f"blocks.{block}.mlp.down.weight"] = partial(torch.zeros, shape)
        return readers


def open_base_start(config: Config, inputs: TrainingInputs) -> BaseStart | None:
    """What the flags take from the base; None: nothing. For one rank; no weight is read.

    Raises:
        UserError: the base or the point of the inputs cannot be started from.
    """
    if config.start_of_head == "random":
        return None
    assert config.model is not None
    base = open_base_files(config.model)
    try:
        if config.start == "random":
            start = head_start(base)
        else:
            manifest = inputs.keys.manifest
            start = whole_start(
                base,
                inputs.point,
                num_layers=manifest.input_num_layers,
                layers_path=manifest.input_layers_path,
            )
        if config.head == "frozen":
            start = replace(start, fields={**start.fields, "shared_head": fingerprint_of_head(base)})
        return start
    except UnknownStructureError as error:
        if config.start == "random":
            raise UserError(f"--head base, --model {config.model}: {error}: use --head random") from error
        raise UserError(
            f"--start base, --model {config.model}: {error}: extract the keys with --input-layer -1"
            " --input-point final_norm, which stands behind it, or use --start random"
        ) from error


def fingerprint_of_head(base: BaseFiles) -> str:
    """Identity of the base's output head; a few of its rows are read. Raises UnknownStructureError."""
    weight_VD, _ = output_head(base.model)
    return head_fingerprint(base.reader(weight_VD, rows=FINGERPRINT_ROWS)())


def head_start(base: BaseFiles) -> BaseStart:
    """The base's output head."""
    weight_VD, bias_V = output_head(base.model)
    transform = configured_transform(base.model)
    readers = {"head.weight": base.reader(weight_VD)}
    if bias_V is not None:
        readers["head.bias"] = base.reader(bias_V)
    return BaseStart(
        fields={
            "head_bias": bias_V is not None,
            "logit_scale": transform.scale,
            "logit_softcap": transform.softcap,
        },
        head_shape=tuple(weight_VD.shape),
        is_whole=False,
        readers=readers,
    )


def whole_start(
    base: BaseFiles,
    point: CapturePoint,
    *,
    num_layers: int,
    layers_path: str | None = None,
    flag: str = "--start base",
) -> BaseStart:
    """The base's output head, and what stands between it and the state at `point`; `flag` asks for it.

    Raises:
        UserError: the base's own layers stand between.
        UnknownStructureError: what stands there is not understood.
    """
    start = head_start(base)
    fields, readers = dict(start.fields), dict(start.readers)
    is_last = point.layer % num_layers == num_layers - 1
    if point.point == "ffn_input" or not is_last:
        raise UserError(
            f"{flag}: the keys hold inputs of the point {point.point} of layer {point.layer} of"
            f" {num_layers}, and the base does more after it than a norm: {_REMEDY} (or final_norm), or leave"
            f" out {flag}"
        )
    norm: nn.Module | None = None
    if point.point == "layer_output":
        norm = final_norm(base.model, layers_path)
    if norm is None:
        fields["final_norm"] = False
    else:
        fields["norm"], fields["norm_epsilon"] = kind_of_norm(norm)
        for name, parameter in norm.named_parameters():
            readers[f"final_norm.{name}"] = base.reader(parameter)
    if point.earlier or point.past:
        fields["residual_input"] = True
    return BaseStart(fields=fields, head_shape=start.head_shape, is_whole=True, readers=readers)
