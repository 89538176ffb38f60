"""The flags of `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mlpmem_ds.core.config import Flags, default_of, field_of, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.memory_config import PRESETS
from mlpmem_ds.stages.corpus.config import Config as CorpusConfig
from mlpmem_ds.stages.index.config import Config as IndexConfig
from mlpmem_ds.stages.keys.config import Config as KeysConfig
from mlpmem_ds.stages.shared_flags import MAX_THREADS
from mlpmem_ds.stages.targets.config import Config as TargetsConfig
from mlpmem_ds.stages.training.config import Config as TrainingConfig

_MAX_SIZE = 10**6  # beyond any machine and model, and far from where sums of bytes overflow
_STAGES: dict[str, type[Flags]] = {
    name: config_class
    for config_class, names in (
        (CorpusConfig, ("block_size", "stride")),
        (KeysConfig, ("codec", "input_codec")),
        (IndexConfig, ("num_shards",)),
        (TargetsConfig, ("nprobe", "k", "encoding")),
        (TrainingConfig, ("epochs", "keep_checkpoints", "batch_positions", "shuffle_window_blocks")),
    )
    for name in names
}
"""flag → the Config of its stage"""
DEFAULTS: dict[str, Any] = {name: default_of(owner, name) for name, owner in _STAGES.items()} | {
    "input_layers": 1
}
"""flag → the default that its stage gives it"""


def _of_stage(name: str, help: str) -> Any:
    """A flag of another stage, with its bounds; left out, it is the calibrated run's, or its default."""
    bounds = field_of(_STAGES[name], name).metadata["bounds"]
    limits: dict[str, Any] = {words.replace(" ", "_"): limit for words, limit in bounds.items()}
    return option(f"{help} (default: {DEFAULTS[name]})", None, **limits)


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Say what a run will need before it starts: bytes, time, memory and GPU hours of every stage.

    What is left out is taken from --calibrate, or is the stage's own default.
    """

    example: ClassVar[str] = (
        "python tools/plan.py --positions 1000000000 --model Qwen/Qwen2.5-1.5B --gpus 8 --ranks 8"
    )

    positions: int = option("tokens of the training text", at_least=1, at_most=10**13)
    model: str | None = option(
        "base: a directory or Hub name, whose configuration gives the next three", None
    )
    parameters: float | None = option("parameters of the base, such as 1.5e9", None, at_least=1, at_most=1e15)
    width: int | None = option("size of its hidden states", None, at_least=1, at_most=_MAX_SIZE)
    vocab_size: int | None = option("entries of its vocabulary", None, at_least=1, at_most=10**9)
    block_size: int | None = _of_stage("block_size", "tokens that the base reads at once")
    stride: int | None = _of_stage(
        "stride", "tokens between the starts of two blocks: each is read block / stride times"
    )
    dim: int | None = option("numbers in a key (default: the width, at most 256)", None, at_least=1)
    codec: Literal["int8", "raw"] | None = _of_stage("codec", "of keys")
    input_codec: Literal["bf16", "int8", "none"] | None = _of_stage("input_codec", "of memory inputs")
    input_layers: int | None = option(
        "layers whose states make a memory input, as many as extract_keys --input-layer names (default: 1)",
        None,
        at_least=1,
    )
    factory: str = option("faiss factory of the index, or auto", "auto")
    num_shards: int | None = option("files of the index (default: as build_index chooses)", None, at_least=1)
    search: Literal["auto", "exact", "ivf"] = option("of the targets", "auto")
    nprobe: int | None = _of_stage("nprobe", "lists that a query probes")
    k: int | None = _of_stage("k", "neighbours of a position")
    neighbour_perplexity: float | None = option(
        "how many neighbours count (default: as write_targets chooses it for --k)", None, above=1
    )
    encoding: Literal["exact", "compact"] | None = _of_stage("encoding", "of the targets")
    preset: str | None = option(
        "size of the memory (default: 4 blocks of the width)", None, choices=tuple(PRESETS)
    )
    head: Literal["own", "frozen"] | None = option(
        "the memory's output head: its own, or the base's, as train --head frozen has it (default: own, or as"
        " in the calibrated run)",
        None,
    )
    batch_positions: int | None = _of_stage("batch_positions", "positions of a training step, over all ranks")
    epochs: float | None = _of_stage("epochs", "passes of the training over all positions")
    ranks: int | None = option(
        "processes of each stage (default: one a GPU, without GPUs one)", None, at_least=1, at_most=_MAX_SIZE
    )
    nodes: int = option("machines that the ranks are spread over", 1, at_least=1, at_most=_MAX_SIZE)
    threads: int | None = option(
        "CPU threads of a rank (default: the cores of this machine over the ranks of a node)",
        None,
        at_least=1,
        at_most=MAX_THREADS,
    )
    gpus: int = option("GPUs of the run", 0, at_least=0, at_most=_MAX_SIZE)
    gpu_tflops: float = option("dense 16-bit peak of one GPU, in 10^12 operations a second", 990.0, above=0)
    gpu_memory_gb: float = option("memory of one GPU in 10^9 bytes", 80.0, above=0)
    memory_gb: float | None = option(
        "memory of a node in 10^9 bytes (default: this machine's)", None, above=0, at_most=1e12
    )
    disk_gb: float | None = option(
        "free disk in 10^9 bytes (default: what is free on this one)", None, above=0, at_most=1e12
    )
    disk_gb_per_second: float = option(
        "10^9 bytes that the disk reads or writes in a second, for all ranks together", 1.0, above=0
    )
    network_gb_per_second: float = option(
        "10^9 bytes that a rank sends to others in a second, in list search (1: TCP, as under torchrun; MPI"
        " over InfiniBand: 10)",
        1.0,
        above=0,
    )
    gpu_network_gb_per_second: float = option(
        "10^9 bytes that a GPU sends to those of other machines in a second, in training (25: half of a"
        " 400-gigabit connection of its own)",
        25.0,
        above=0,
    )
    price_per_gpu_hour: float | None = option(
        "price of a GPU for an hour, in any currency: adds the price of each stage", None, above=0
    )
    calibrate: Path | None = option(
        "directory of a finished run, for its speed, and for the sizes that no flag gives; shards are its own"
        " at its positions alone, and of another --width or --vocab-size nothing of its base and memory",
        None,
    )
    output: Path | None = option("JSON file to write in addition to the table", None)

    @property
    def num_ranks(self) -> int:
        """Processes of each stage."""
        return self.ranks or max(1, self.gpus)

    def check(self) -> None:
        if self.nodes > self.num_ranks:
            raise UserError(
                f"--nodes {self.nodes} are more than the --ranks {self.num_ranks} that are spread over them:"
                " give a rank for each, or fewer nodes"
            )
