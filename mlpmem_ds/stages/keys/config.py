"""The flags of `extract_keys`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.models.capture_point import Point
from mlpmem_ds.stages import shared_flags

_MAX_EXACT_DIM = 1040  # above it a product of int8 codes may pass 2^24 and is no longer exact in float32


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Run a frozen causal LM over a corpus and store each position's key.

    With it go the position's value, log-probability and memory input. Start it under torchrun, mpirun, srun
    or deepspeed to share the work.
    """

    example: ClassVar[str] = (
        "torchrun --nproc-per-node 2 tools/extract_keys.py --model run/base --corpus run/corpus"
        " --output run/keys"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-windows",)

    model: str = option("language model of the keys: a directory or Hub name", identity="none", by_url=True)
    input_model: str | None = option(
        "base of the memory, with the same tokenizer: gives its inputs and the log-probabilities"
        " (default: --model)",
        None,
        identity="none",
        by_url=True,
    )
    corpus: Path = option("corpus directory", by_url=True)
    output: Path = option("key directory to write")
    split: str = option("split of the corpus", "train")
    key_layer: shared_flags.Layer = shared_flags.layer("layer of the keys", identity="resolved")
    key_point: Point = option("where in the layer the key is read", "ffn_input")
    input_layer: tuple[shared_flags.Layer, ...] = shared_flags.layers(
        "layers of the memory's inputs, one or more: their states are stored side by side, in this order;"
        " launch/train.py --start base starts from the last",
        identity="resolved",
    )
    input_point: Point | None = option(
        "where in the layer the memory's input is read (default: where the last of --input-layer is the"
        " model's last, final_norm, which the output head reads; else as --key-point)",
        None,
        identity="resolved",
    )
    layers_path: str | None = option(
        "dotted path to --model's list of decoder layers, where it is not found by itself", None
    )
    input_layers_path: str | None = option("the same for --input-model", None)
    codec: Literal["int8", "raw"] = option("int8 codes of the rotated key, or the raw key", "int8")
    dim: int | None = option(
        "numbers in an int8 key; distances are exact up to 1040 (default: the model's width, at most 256)",
        None,
        at_least=1,
        at_most=_MAX_EXACT_DIM,
        identity="resolved",
    )
    raw_dtype: Literal["float16", "bfloat16"] = option("of raw keys", "float16", identity="resolved")
    input_codec: Literal["bf16", "int8", "none"] = option(
        "the memory's inputs: 2 bytes a number, 1 byte a number and 4 for 128, or not stored (online"
        " training)",
        "bf16",
    )
    fit_positions: int = option(
        "positions of the sample that fits the int8 codec", 16384, at_least=1, identity="resolved"
    )
    unit_positions: int | None = option(
        "positions in a unit of work (default: 65536; above 65 million positions the power of two that gives"
        " 1,000 units or more, at most 1048576)",
        None,
        at_least=1,
        identity="resolved",
    )
    batch_windows: int = option("windows that the base reads at once", 16, at_least=1, identity="none")
    dtype: shared_flags.Dtype = shared_flags.dtype("resolved")
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()
    attention: str = shared_flags.attention()
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()
    seed: int = option(
        "seed of the int8 codec's sample and rotation, and of the audit's samples",
        0,
        at_least=0,
        identity="resolved",
    )
    audit: int | None = option(
        "number of stored keys whose targets one rank compares at the end with those of raw keys (if killed,"
        " it starts anew); 2000 is enough (default: no audit)",
        None,
        at_least=1,
        identity="none",
    )
    audit_dims: tuple[int, ...] = option(
        "other sizes of int8 keys to measure in the audit",
        (),
        at_least=1,
        at_most=_MAX_EXACT_DIM,
        identity="none",
    )
    audit_candidates: int = option(
        "largest number of positions that the audit searches, which bounds its time; the model reads them"
        " again",
        1 << 20,
        at_least=1,
        identity="none",
    )

    def check(self) -> None:
        if not self.input_layer:
            raise UserError("--input-layer needs one layer or more, such as -1")
        if self.audit is None:
            self.refuse_unused("audit_dims", "audit_candidates", of="--audit")
        if self.audit is not None and self.audit_candidates < 2 * self.audit:
            raise UserError(
                f"--audit-candidates {self.audit_candidates} are too few for --audit {self.audit} queries: "
                f"give at least {2 * self.audit}"
            )
        if self.input_layers_path is not None and self.input_model is None:
            raise UserError("--input-layers-path is for --input-model: give --layers-path for --model")
