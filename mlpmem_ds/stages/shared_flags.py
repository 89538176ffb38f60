"""Flags that several commands have: one spelling, default and help each."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from mlpmem_ds.core.config import Identity, option

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def threads() -> Any:
    """`threads: int | None`, of torch and faiss."""
    return option(
        "CPU threads of each rank (default: as the environment says)", None, at_least=1, identity="none"
    )


def device() -> Any:
    """`device: str`"""
    return option("auto, cpu, cuda or cuda:N", "auto", identity="none")


def dtype(identity: Identity) -> Any:
    """`dtype: Dtype`"""
    return option(
        "of the forward passes; auto = bfloat16 on a GPU, float32 on a CPU", "auto", identity=identity
    )


def attention() -> Any:
    """`attention: str`"""
    return option("attention implementation: sdpa, eager or flash_attention_2", "sdpa")


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


def layer_number(text: str) -> Layer:
    """`-1` is an index, `0.7` a fraction of the depth."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        remedy = "give an index such as -1, or a fraction of the depth such as 0.7"
        raise argparse.ArgumentTypeError(f"{text!r} is no layer: {remedy}") from error
