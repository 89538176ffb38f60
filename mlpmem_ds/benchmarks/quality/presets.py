"""Part of `quality`: the presets, what each reads and trains, and what that is expected to cost.

Seconds are of one core: estimates, of tiny half of what its jobs took with as much other work next to them
(docs/results/tiny.json; `bigger`, which had a third of its epochs there, three times that), of real what
extraction and evaluation took, else from operations and the rates of LAB.md. A seed trains all arms. The
sums are of three seeds, of real of one.

| preset | texts: train positions | base | a memory | trainings a seed | core s | 2 cores |
| --- | --- | --- | ---: | --- | ---: | ---: |
| tiny | library 61 k, reference 26 k | .9 M, 20 epochs: 145 s | 30 s | 7 + 7 | 3,300 | 28 min |
| small | library 196 k, docstrings 138 k | 6 M, 8 epochs: 550 s | 380 s | 6 + 7 | 18,700 | 2 h 35 |
| real | reference 27 k, docstrings 105 k | SmolLM2-135M, given | 350 s | 1 + 6 | 10,800 | 1 h 30 |
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass

from mlpmem_ds.core.shipped import ds_configs


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
    max_train_bytes: float | None = None
    """None: all that tuning and test leave"""
    tuning_fraction: float
    test_fraction: float
    arms: tuple[str, ...]
    """that are trained on it, by the names of arms.py"""
    is_known: bool = False
    """whether the base was trained on its train split"""


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
    base_epochs: int | None
    """None: --base"""
    base_title: str | None
    """for the page; None: --base"""
    block_size: int
    stride: int
    k: int
    neighbour_perplexity: float
    memory: tuple[str, ...]
    """flags of all memories: shape, batches"""
    epochs: int
    """of all memories"""
    start: tuple[str, ...]
    """flags of memories that start as the base: rate and head"""
    fresh: tuple[str, ...]
    """flags of memories that start at random: the rate"""
    models: tuple[str, ...] = ()
    """flags of all models of `train_baseline`, before those of the arm"""
    model_epochs: int
    """of all models that start as the base"""
    rates: Mapping[str, str]
    """kind of model → its learning rate, where the default of `train_baseline` is not right here"""
    ds_config: str
    """of all trainings: a name in ds_configs, or a path"""
    dtype: str
    """of forward passes that do not train"""
    seconds: Mapping[str, float]
    """command → of one core, for the time that is printed"""

    @property
    def trainer_flags(self) -> tuple[str, str]:
        """Of all trainings."""
        return ("--ds_config", str(ds_configs() / self.ds_config))

    @property
    def reading_flags(self) -> tuple[str, str]:
        """Of what reads a base without training: `extract_keys`, `fit_gate`, `evaluate`."""
        return ("--dtype", self.dtype)

    @property
    def target_flags(self) -> tuple[object, ...]:
        """Of `write_targets`."""
        return (
            *("--k", self.k, "--neighbour-perplexity", self.neighbour_perplexity),
            *("--exclude", "same-document", "--shard-positions", 32768),
        )

    @property
    def base_flags(self) -> tuple[object, ...]:
        """Of `train_base`; there is no --base."""
        assert self.base is not None
        return ("--epochs", self.base_epochs, *self.base)

    def model_flags(self, *, starts_as_base: bool) -> tuple[object, ...]:
        """Of `train_baseline`, before those of the arm. What starts at random reads the text as often as base
        and memory together."""
        epochs = self.model_epochs
        if not starts_as_base:
            assert self.base_epochs is not None  # it is of the size of a base that is trained here
            epochs = self.base_epochs + self.epochs
        return ("--epochs", epochs, *self.models)

    def memory_flags(self, *, starts_as_base: bool) -> tuple[object, ...]:
        """Of `train`, before those of the arm."""
        start = ("--start", "base", *self.start) if starts_as_base else self.fresh
        return (*self.memory, "--epochs", self.epochs, *start)


_LIBRARY = sysconfig.get_path("stdlib")
_LIBRARY_FLAGS = (
    *("--include", "*.py", "--exclude", "site-packages", "dist-packages", "test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo"),
)
# As launch/pretrained.sh: the documentation of one model of transformers is nearly that of another, and what
# is learned of one document would stand in the next.
_PACKAGES = ("torch", "deepspeed", "matplotlib", "pyarrow", "huggingface_hub", "transformers")
_REPETITIVE = (
    *("tests", "test", "testing", "transformers/models"),
    *("torch/_dynamo", "torch/_inductor", "torch/_vendor"),
)
_CONTROLS = ("continued", "continued_equal_time", "lora")
_RECIPES = ("memory", "memory_ce", "paper", "paper_ce")

TINY = Preset(
    name="tiny",
    general=Text(
        title="source of Python's own library",
        inputs=(_LIBRARY,),
        flags=(*_LIBRARY_FLAGS, "--shorten-documents", "3000"),
        max_bytes=3e5,
        tuning_fraction=0.12,
        test_fraction=0.25,
        arms=(*_RECIPES, "paper_permuted", "paper_random", "bigger"),
        is_known=True,
    ),
    domain=Text(
        title="the reference of the Python language",
        inputs=("docs:python",),
        flags=("--shorten-documents", "3000"),
        max_bytes=2.4e5,
        tuning_fraction=0.15,
        test_fraction=0.3,
        arms=("memory", "memory_ce", "paper", "paper_ce", *_CONTROLS),
    ),
    vocab_size=2048,
    base=("--num-layers", "3", "--hidden-size", "128", "--learning-rate", "2e-3"),
    base_epochs=20,
    base_title="a GPT-2-like model of .9 M parameters, trained on the spot",
    block_size=256,
    stride=256,
    k=256,
    neighbour_perplexity=100,
    memory=(
        *("--num-blocks", "3", "--batch-positions", "2048"),
        *("--validation-positions", "8192"),
    ),
    epochs=10,
    start=("--head", "base", "--learning-rate", "2e-3"),
    fresh=("--learning-rate", "2e-3"),
    model_epochs=10,
    # The base's own rate. At the default, which is for pretrained bases, it ends at twice the perplexity.
    rates={"continued": "2e-3", "lora": "5e-3"},
    ds_config="cpu.json",
    dtype="float32",
    seconds={
        "prepare-corpus": 3,
        "train-base": 145,
        "extract-keys": 8,
        "build-index": 5,
        "write-targets": 25,
        "train": 30,
        "train-baseline": 136,
        "fit-gate": 10,
        "evaluate": 15,
    },
)
SMALL = Preset(
    name="small",
    general=Text(
        title="source of Python's own library",
        inputs=(_LIBRARY,),
        flags=(*_LIBRARY_FLAGS, "--shorten-documents", "6000"),
        max_bytes=1e6,
        tuning_fraction=0.06,
        test_fraction=0.16,
        arms=(*_RECIPES, "paper_permuted", "paper_random"),
        is_known=True,
    ),
    domain=Text(
        title="docstrings of PyTorch",
        inputs=("docs:torch",),
        flags=("--shorten-documents", "6000"),
        max_bytes=6e5,
        tuning_fraction=0.08,
        test_fraction=0.2,
        arms=("memory", "memory_ce", "paper", "paper_ce", *_CONTROLS),
    ),
    vocab_size=8192,
    base=(
        *("--num-layers", "5", "--hidden-size", "256", "--learning-rate", "1e-3"),
        *("--dropout", "0.1"),
    ),
    base_epochs=8,
    base_title="a GPT-2-like model of 6 M parameters, trained on the spot",
    block_size=512,
    stride=512,
    k=1024,
    neighbour_perplexity=250,
    memory=(
        *("--num-blocks", "4", "--batch-positions", "2048"),
        *("--validation-positions", "16384"),
    ),
    # On the tuning split of the general text the memory passes the search by then, 149.1 to 150.0; with 3
    # blocks and 5 epochs 152.9 (docs/LAB.md#quality-small-recipe).
    epochs=10,
    start=("--head", "base", "--learning-rate", "2e-3"),
    fresh=("--learning-rate", "2e-3"),
    models=("--validate-every", "28", "--early-stopping-patience", "3"),  # twice an epoch
    model_epochs=10,
    rates={"continued": "1e-3", "lora": "5e-3"},
    # As of real; twice the speed of cpu.json here too.
    ds_config="zero1.json",
    dtype="bfloat16",
    seconds={
        "prepare-corpus": 10,
        "train-base": 550,
        "extract-keys": 70,
        "build-index": 15,
        "write-targets": 450,
        "train": 380,
        "train-baseline": 350,
        "fit-gate": 25,
        "evaluate": 120,
    },
)
REAL = Preset(
    name="real",
    general=Text(
        title="the reference of the Python language",
        inputs=("docs:python",),
        flags=("--shorten-documents", "4000"),
        max_bytes=2.6e5,
        tuning_fraction=0.15,
        test_fraction=0.25,
        arms=("memory",),
    ),
    domain=Text(
        title="docstrings of six Python packages, without internals and model files",
        inputs=tuple(f"docs:{name}" for name in _PACKAGES),
        flags=("--shorten-documents", "4000", "--exclude", *_REPETITIVE),
        max_bytes=5.2e5,
        tuning_fraction=0.1,
        test_fraction=0.15,
        arms=(*_RECIPES, "continued", "lora"),
    ),
    vocab_size=None,
    base=None,
    base_epochs=None,
    base_title=None,
    block_size=512,
    stride=512,
    k=1024,
    neighbour_perplexity=30,
    memory=(
        *("--num-blocks", "4", "--batch-positions", "1024"),
        *("--validation-positions", "4096"),
    ),
    epochs=6,
    start=("--head", "base", "--learning-rate", "1e-3"),
    fresh=("--learning-rate", "2e-3"),
    # Validated twice an epoch, because each reads the tuning split.
    models=("--validate-every", "26", "--early-stopping-patience", "2"),
    model_epochs=2,
    rates={},
    # bfloat16 products, float32 weights and moments: 2.1 times the speed of cpu.json, the same loss.
    ds_config="zero1.json",
    # 2.3 times the speed of float32 where the processor has it (AMX).
    dtype="bfloat16",
    seconds={
        "prepare-corpus": 10,
        "extract-keys": 700,
        "build-index": 10,
        "write-targets": 60,
        "train": 350,
        "train-baseline": 1500,
        "fit-gate": 80,
        "evaluate": 380,
    },
)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (TINY, SMALL, REAL)}
