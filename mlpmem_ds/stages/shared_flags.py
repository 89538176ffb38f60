"""Flags that several commands have: one spelling, default and help each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlpmem_ds.core.config import Identity, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.ranks import RANK_TIMEOUT_SECONDS

if TYPE_CHECKING:  # it loads torch, and no flag needs it before its value is looked at
    from mlpmem_ds.models.mixture import Grid

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


MAX_THREADS = 1024
"""or processes, of a rank: beyond the cores of a machine, and below where libraries end without a word"""


def threads() -> Any:
    """`threads: int | None`, of torch and faiss."""
    return option(
        "CPU threads of each rank (default: as the environment sets it)",
        None,
        at_least=1,
        at_most=MAX_THREADS,
        identity="none",
    )


def exchange() -> Any:
    """`exchange: Exchange`, of `engines.collectives.opening`."""
    return option(
        "how ranks that were launched together exchange what they compute: mpi (mpi4py), torch"
        " (torch.distributed), files (through the output folder), none (each works by itself);"
        " auto = mpi under mpirun or srun, torch where MASTER_ADDR is set (torchrun, deepspeed), else none",
        "auto",
        identity="none",
    )


def rank_timeout_seconds() -> Any:
    """`rank_timeout_seconds: float`"""
    return option(
        "seconds without a sign of life after which a rank counts as lost and the others stop; a thread of"
        " each rank sends one every two seconds, however long a step takes",
        RANK_TIMEOUT_SECONDS,
        at_least=1,
        identity="none",
    )


def device() -> Any:
    """`device: str`"""
    return option("auto, cpu, cuda or cuda:N", "auto", identity="none")


DeviceMap = Literal["none", "auto", "balanced", "balanced_low_0", "sequential"]


def device_map() -> Any:
    """`device_map: DeviceMap`"""
    return option(
        "spread a base that does not fit one GPU over all that this process sees (then start one rank a"
        " machine)",
        "none",
        identity="none",
        one_rank_a_host="spreads a base over all GPUs that a process sees",
    )


def device_map_of(value: DeviceMap) -> str | None:
    """As `load_base` takes it."""
    return None if value == "none" else value


def dtype(identity: Identity) -> Any:
    """`dtype: Dtype`"""
    return option(
        "of the forward passes; auto = bfloat16 on a GPU, float32 on a CPU", "auto", identity=identity
    )


MemoryWeights = Literal["float", "int8"]


def memory_weights() -> Any:
    """`memory_weights: MemoryWeights`, of memories that are scored"""
    return option(
        "the memories' matrices: as trained, or rounded to int8 as generate can read them",
        "float",
        identity="resolved",
    )


def special_tokens() -> Any:
    """`special_tokens: SpecialTokens`, of `formats.corpus`"""
    return option(
        "how a special token that is spelled in a text, such as <|endoftext|>, is read: text = as ordinary"
        " text; parse = as the token itself, for chats that were rendered with such tokens",
        "text",
    )


def attention() -> Any:
    """`attention: str`"""
    return option(
        "attention implementation: sdpa, eager or flash_attention_2; auto = sdpa, and eager for a base"
        " without it",
        "auto",
        identity="resolved",
    )


def lmbda(default: str) -> Any:
    """`lmbda: float | None`, the flag `--lambda`; `default` says in words what it is without the flag."""
    return option(f"weight of the memory (default: {default})", None, at_least=0, at_most=1, flag="lambda")


def lambdas(help: str, default: tuple[str, ...], *, identity: Identity = "own") -> Any:
    """`lambdas: tuple[str, ...]`, several weights of the memory; `grid_of` reads and checks the words."""
    return option(
        f"numbers, or ranges first:last:step: weights of the memory {help}", default, identity=identity
    )


def grid_of(words: Sequence[str], *, flag: str = "--lambdas") -> Grid:
    """`--lambdas 0 0.5` → 0, 0.5; `--lambdas 0:1:0.05` → 0, 0.05, …, 1.

    Raises:
        UserError: a word is neither a number nor a range, or lies outside [0, 1].
    """
    from mlpmem_ds.models.mixture import Grid

    try:
        return Grid.parse(words)
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error


def bootstrap_samples(*, condition: str = "") -> Any:
    """`bootstrap_samples: int`; `condition` says in words where there are any."""
    return option(
        f"{condition}resamples for the 95 % intervals", 2000, at_least=100, at_most=10**6, identity="none"
    )


def passage_tokens() -> Any:
    """`passage_tokens: int`, of `--passages`"""
    return option("tokens of a passage, at most", 128, at_least=8)


def num_passages() -> Any:
    """`num_passages: int`, of `--passages`"""
    return option("passages before a question", 5, at_least=1)


def refuse_repeated(places: Sequence[str | Path], *, flag: str) -> None:
    """Raises UserError where a list of files or directories has one of them twice."""
    seen: dict[str, str | Path] = {}
    for place in places:
        where = os.path.realpath(place)
        if where in seen:
            raise UserError(f"{flag} names {seen[where]} twice (as {place}): give each once")
        seen[where] = place


Layer = int | float  # an index, from the end where negative, or a fraction of the depth


def layer(help: str, *, identity: Identity) -> Any:
    """A layer, of type `Layer`: the last one where it is left out."""
    return option(
        f"{help}: an index, or a fraction of the depth such as 0.7",
        -1,
        parse=layer_number,
        metavar="LAYER",
        identity=identity,
    )


def layers(help: str, *, identity: Identity) -> Any:
    """Some layers, of type `tuple[Layer, ...]`: the last one where it is left out."""
    return option(
        f"{help}: indices, or fractions of the depth such as 0.7",
        (-1,),
        parse=layer_number,
        metavar="LAYER",
        identity=identity,
    )


def layer_number(text: str) -> Layer:
    """`-1` is an index, `0.7` a fraction of the depth. Raises argparse's error for another word."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        remedy = "give an index such as -1, or a fraction of the depth such as 0.7"
        raise argparse.ArgumentTypeError(f"{text!r} is no layer: {remedy}") from error
