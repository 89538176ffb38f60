"""Part of `plan`: the sizes of a run, and the machine that it is planned for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlpmem_ds.core.config import check_numbers, field_of
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.corpus import token_dtype
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.corpus.config import check_stride
from mlpmem_ds.stages.index.factory import make_index
from mlpmem_ds.stages.targets.config import Config as TargetsConfig
from mlpmem_ds.stages.targets.config import check_perplexity

Encoding = Literal["exact", "compact"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run.

    Attributes:
        input_layers: layers whose states make a memory input.
        block_size, stride: of the corpus: each window of `block_size` tokens gives `stride` positions.
        unit_positions: positions in a unit of keys.
        shard_positions: positions in a shard of targets.
        shuffle_window_blocks: blocks of positions that a training shuffles together.
        batch_positions: positions in a step of the training, over all ranks.
    """

    positions: int
    vocab_size: int
    parameters: int
    width: int
    input_layers: int
    block_size: int
    stride: int
    dim: int
    codec: str
    input_codec: str
    unit_positions: int
    factory: str
    num_shards: int
    search: str
    nprobe: int
    k: int
    neighbour_perplexity: float
    encoding: Encoding
    shard_positions: int
    memory: MemoryConfig
    epochs: float
    batch_positions: int
    shuffle_window_blocks: int
    keep_checkpoints: int

    @property
    def input_width(self) -> int:
        """Numbers in a memory input."""
        return self.input_layers * self.width

    @property
    def index(self) -> Index:
        """An empty one of the factory."""
        return make_index(self.factory, self.dim, self.positions)

    @property
    def num_lists(self) -> int:
        return self.index.num_lists

    @property
    def key_dtype(self) -> np.dtype[np.int8] | np.dtype[np.float16]:
        return np.dtype(np.int8) if self.codec == "int8" else np.dtype(np.float16)

    @property
    def value_bytes(self) -> int:
        return token_dtype(self.vocab_size).itemsize

    @property
    def stored_key_bytes(self) -> int:
        """Of all keys."""
        return self.positions * self.dim * self.key_dtype.itemsize

    @property
    def tokens_read(self) -> float:
        """Tokens of one pass of the base over all positions; windows overlap."""
        return self.positions * max(1.0, self.block_size / self.stride)

    @property
    def entries_of_row(self) -> float:
        """Of a target: grows as the neighbour-weight perplexity to the power .84 (44 at 30, 303 at 300), up
        to k."""
        return min(self.k, 303 * (self.neighbour_perplexity / 300) ** 0.84)


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """What the stages would refuse is refused before them.

    Args:
        sizes: fields of a Workload.

    Raises:
        UserError: blocks, keys or neighbours that do not fit each other.
    """
    block_size, stride, dim, width = (sizes[name] for name in ("block_size", "stride", "dim", "width"))
    check_stride(block_size, stride)
    if dim > width or (sizes["codec"] == "raw" and dim != width):
        keeps = "; --codec raw keeps all of them" if sizes["codec"] == "raw" else ""
        raise UserError(f"--dim {dim} is not of a base of --width {width}{keeps}: leave it out")
    check_numbers(field_of(TargetsConfig, "k"), sizes["k"])  # of a calibrated run it may be anything
    if sizes["k"] > 1:
        check_perplexity(sizes["neighbour_perplexity"], sizes["k"])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a run; with 0 `gpus` it computes on the CPU.

    Attributes:
        gpu_flops: dense 16-bit peak of one GPU, operations a second.
        gpu_bytes: memory of one GPU.
        disk_rate: bytes a second, of all ranks together.
        network_rate: bytes a second, that one rank sends to others.
        nodes: machines that the ranks are spread over; `memory_bytes` is that of one.
        gpu_network_rate: bytes a second, that one GPU sends to those of other nodes.
    """

    ranks: int
    cores: int
    gpus: int
    gpu_flops: float
    memory_bytes: int
    disk_bytes: int
    gpu_bytes: float = 80e9
    disk_rate: float = 1e9
    network_rate: float = 1e9
    nodes: int = 1
    gpu_network_rate: float = 25e9

    @property
    def ranks_of_node(self) -> int:
        """The most on one node."""
        return -(-self.ranks // self.nodes)

    @property
    def weight_bytes(self) -> int:
        """Of a weight that is computed with: float32 on a CPU, bfloat16 on a GPU."""
        return 2 if self.gpus else 4

    @property
    def gpu_bytes_of_rank(self) -> float:
        """Of the GPUs that a rank has, or of its share of one."""
        return self.gpus / self.ranks * self.gpu_bytes


def cores_of_rank(threads: int | None, *, ranks: int, nodes: int) -> int:
    """CPU threads of a rank: as asked, else this machine's cores over the ranks of a node, where each of the
    nodes is like it."""
    ranks_of_node = -(-ranks // nodes)
    return threads or max(1, (os.cpu_count() or 1) // ranks_of_node)
