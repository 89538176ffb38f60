"""The sizes of the GPU check's steps: those of one H100, and tiny ones for a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """A Llama of random weights."""

    width: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What each step works on; tuples of several are taken one after another."""

    is_rehearsal: bool
    loss_rows: int = 4096
    loss_width: int = 4096
    loss_vocab_sizes: tuple[int, ...] = (128_256, 50_257, 50_304)
    loss_entries: int = 64
    runs: int = 5
    dim: int = 256
    k: int = 1024
    exact_keys: int = 1_000_000
    exact_queries: int = 65_536
    list_keys: int = 10_000_000
    num_lists: int = 16_384
    list_queries: int = 16_384
    num_probes: int = 32
    assign_keys: int = 1_000_000
    assign_lists: tuple[int, ...] = (65_536, 262_144)
    extraction_base: BaseShape = BaseShape(
        width=1536,
        num_layers=28,
        num_heads=12,
        intermediate_size=8960,
        vocab_size=128_256,
        context=1024,
    )
    extraction_positions: int = 786_432
    training_base: BaseShape = BaseShape(
        width=2048, num_layers=1, num_heads=16, intermediate_size=2048, vocab_size=128_256, context=1024
    )
    training_positions: int = 131_072
    training_rows: int = 16_384
    training_steps: int = 60
    training_memory: tuple[str, ...] = ("--preset", "1b")
    text_bytes: float = 4e6
    text_vocab_size: int = 4096
    text_base: BaseShape = BaseShape(
        width=512, num_layers=4, num_heads=8, intermediate_size=2048, vocab_size=4096, context=256
    )
    text_rows: int = 4096
    new_tokens: int = 64
    ranks_base: BaseShape = BaseShape(
        width=1024, num_layers=4, num_heads=16, intermediate_size=4096, vocab_size=32_000, context=512
    )
    ranks_positions: int = 262_144
    ranks_steps: int = 16


def rehearsal_sizes() -> Sizes:
    """Seconds on one core."""
    tiny = BaseShape(width=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=512, context=64)
    return Sizes(
        is_rehearsal=True,
        loss_rows=32,
        loss_width=32,
        loss_vocab_sizes=(512, 257, 264),
        loss_entries=8,
        runs=2,
        dim=32,
        k=32,
        exact_keys=2000,
        exact_queries=300,
        list_keys=4000,
        num_lists=16,
        list_queries=64,
        num_probes=4,
        assign_keys=500,
        assign_lists=(32, 64),
        extraction_base=tiny,
        extraction_positions=4096,
        training_base=tiny,
        training_positions=4096,
        training_rows=512,
        training_steps=12,
        training_memory=("--num-blocks", "2"),
        text_bytes=6e4,
        text_vocab_size=512,
        text_base=tiny,
        text_rows=512,
        new_tokens=8,
        ranks_base=tiny,
        ranks_positions=8192,
        ranks_steps=4,
    )


def full_sizes() -> Sizes:
    """Those of one H100 and a quarter of an hour."""
    return Sizes(is_rehearsal=False)
