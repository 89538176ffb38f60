"""Part of `quality`: the presets, what each reads and trains, and what that is expected to cost.

Seconds are of one core: estimates from operations and the rates of LAB.md until a run says better (its JSON
has the seconds of each job). Trainings are epochs of train positions; a seed trains all arms.

| preset | texts: train positions | base | one memory | trained arms x 3 seeds | core s | 2 cores |
| --- | --- | --- | ---: | --- | ---: | ---: |
| tiny | library 110 k, reference 80 k | .9 M, 8 epochs: 160 s | 25 s | 6 + 6 | 1,500 | 13 min |
| small | library or books 500 k, docstrings 250 k | 6 M, 6 epochs: 1,400 s | 350 s | 5 + 6 | 14,400 | 2 h |
| real | reference 42 k, docstrings 68 k | SmolLM2-135M, given | 700 s | 1 + 6 | 21,500 | 3 h |
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """One of the two texts, and how it is split by documents."""

    title: str
    """for the page"""
    inputs: tuple[str, ...]
    """of prepare_corpus"""
    flags: tuple[str, ...] = ()
    """further ones: which files count"""
    max_bytes: float
    tuning_fraction: float
    test_fraction: float
    arms: tuple[str, ...]
    """that are trained on it, by the names of arms.py"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size of the benchmark. `general` is what the base knows, or text of that kind; `domain` is new to
    it."""

    name: str
    general: Text
    domain: Text
    vocab_size: int | None
    """of the tokenizer that is trained on the general text; None: --base brings one"""
    base: tuple[str, ...] | None
    """flags of train_base; None: --base names a model"""
    base_title: str | None
    """for the page; None: --base"""
    block_size: int
    stride: int
    k: int
    neighbour_perplexity: float
    memory: tuple[str, ...]
    """flags of all memories: shape, epochs, batches"""
    rates: Mapping[str, str]
    """arm → learning rate, of memories that do not have that of their recipe"""
    models: tuple[str, ...]
    """flags of all models of `train_baseline`, after those of the arm"""
    seconds: Mapping[str, float]
    """command → of one core, for the time that is printed"""


_LIBRARY = sysconfig.get_path("stdlib")
_LIBRARY_FLAGS = (
    *("--include", "*.py", "--exclude", "site-packages", "dist-packages", "test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo"),
)
_CONTROLS = ("continued", "continued_equal_time", "lora")
_RECIPES = ("memory", "memory_ce", "paper", "paper_ce")

TINY = Preset(
    name="tiny",
    general=Text(
        title="source of Python's own library",
        inputs=(_LIBRARY,),
        flags=_LIBRARY_FLAGS,
        max_bytes=5e5,
        tuning_fraction=0.12,
        test_fraction=0.22,
        arms=(*_RECIPES, "paper_permuted", "paper_random", "bigger"),
    ),
    domain=Text(
        title="the reference of the Python language",
        inputs=("docs:python",),
        max_bytes=1e6,
        tuning_fraction=0.15,
        test_fraction=0.3,
        arms=("memory", "memory_ce", "paper", *_CONTROLS),
    ),
    vocab_size=2048,
    base=("--num-layers", "3", "--hidden-size", "128", "--epochs", "8", "--learning-rate", "2e-3"),
    base_title="a GPT-2-like model of .9 M parameters, trained on the spot",
    block_size=256,
    stride=256,
    k=256,
    neighbour_perplexity=100,
    memory=(
        *("--num-blocks", "3", "--epochs", "3", "--batch-positions", "2048"),
        *("--validation-positions", "8192"),
    ),
    rates={"memory": "1e-3", "memory_ce": "1e-3"},
    models=("--epochs", "6"),
    seconds={
        "prepare-corpus": 6,
        "train-base": 120,
        "extract-keys": 8,
        "build-index": 5,
        "write-targets": 12,
        "train": 22,
        "train-baseline": 35,
        "fit-gate": 20,
        "evaluate": 30,
    },
)
SMALL = Preset(
    name="small",
    general=Text(
        title="source of Python's own library",
        inputs=(_LIBRARY,),
        flags=_LIBRARY_FLAGS,
        max_bytes=2.1e6,
        tuning_fraction=0.06,
        test_fraction=0.14,
        arms=(*_RECIPES, "paper_permuted", "paper_random"),
    ),
    domain=Text(
        title="docstrings of PyTorch",
        inputs=("docs:torch",),
        max_bytes=1.2e6,
        tuning_fraction=0.08,
        test_fraction=0.16,
        arms=("memory", "memory_ce", "paper", *_CONTROLS),
    ),
    vocab_size=8192,
    base=(
        *("--num-layers", "5", "--hidden-size", "256", "--epochs", "6", "--learning-rate", "1e-3"),
        *("--dropout", "0.1"),
    ),
    base_title="a GPT-2-like model of 6 M parameters, trained on the spot",
    block_size=512,
    stride=512,
    k=1024,
    neighbour_perplexity=250,
    memory=(
        *("--num-blocks", "3", "--epochs", "4", "--batch-positions", "2048"),
        *("--validation-positions", "16384"),
    ),
    rates={"memory": "1e-3", "memory_ce": "1e-3"},
    models=("--epochs", "4"),
    seconds={
        "prepare-corpus": 20,
        "train-base": 1400,
        "extract-keys": 60,
        "build-index": 40,
        "write-targets": 150,
        "train": 280,
        "train-baseline": 450,
        "fit-gate": 90,
        "evaluate": 180,
    },
)
REAL = Preset(
    name="real",
    general=Text(
        title="the reference of the Python language",
        inputs=("docs:python",),
        max_bytes=3e5,
        tuning_fraction=0.15,
        test_fraction=0.25,
        arms=("memory",),
    ),
    domain=Text(
        title="docstrings of PyTorch, Transformers and DeepSpeed",
        inputs=("docs:torch", "docs:transformers", "docs:deepspeed"),
        max_bytes=4.2e5,
        tuning_fraction=0.12,
        test_fraction=0.2,
        arms=(*_RECIPES, "continued", "lora"),
    ),
    vocab_size=None,
    base=None,
    base_title=None,
    block_size=512,
    stride=512,
    k=1024,
    neighbour_perplexity=250,
    memory=(
        *("--num-blocks", "2", "--epochs", "3", "--batch-positions", "1024"),
        *("--validation-positions", "4096"),
    ),
    rates={"memory": "1e-3", "memory_ce": "3e-4"},  # each one's best of the trials
    models=("--epochs", "2", "--validate-every", "16"),  # twice an epoch: each reads the tuning split
    seconds={
        "prepare-corpus": 10,
        "extract-keys": 240,
        "build-index": 30,
        "write-targets": 60,
        "train": 700,
        "train-baseline": 1000,
        "fit-gate": 150,
        "evaluate": 400,
    },
)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (TINY, SMALL, REAL)}
