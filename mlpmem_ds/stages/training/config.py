"""The flags of `train`, with the checks that need no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.objects.urls import url_of
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA, PRESETS
from mlpmem_ds.stages.shared_flags import MAX_THREADS
from mlpmem_ds.stages.training.defaults import LEARNING_RATE_HELP, START_LEARNING_RATE
from mlpmem_ds.stages.training.options import TrainingOptions
from mlpmem_ds.stages.training.recipes import RECIPES

SHAPE_FLAGS = ("num_blocks", "hidden_size", "intermediate_size", "family")
_PRESETS_VOCABULARY = 32_000
_PRESETS_HELP = ", ".join(
    f"{name} {make(_PRESETS_VOCABULARY).num_parameters() / 1e6:,.0f} M" for name, make in PRESETS.items()
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Train a memory on a retriever's targets, with DeepSpeed.

    Start it with deepspeed, torchrun, mpirun, srun, or as it is.
    """

    example: ClassVar[str] = (
        "deepspeed --num_accelerators 2 launch/train.py --ds_config ds_configs/zero3.json"
        " --corpus RUN/corpus --targets RUN/targets --output RUN/memory"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--micro-batch-positions", "--reader-threads")

    learning_rate: float | None = option(
        f"peak of the learning rate (default: {LEARNING_RATE_HELP}, and with --start base"
        f" {START_LEARNING_RATE:g} at most)",
        None,
        above=0,
    )
    targets: Path | None = option("target directory; may be left out with --alpha 0", None, by_url=True)
    keys: Path | None = option("key directory (default: `keys` next to --targets)", None, by_url=True)
    model: str | None = option(
        "base, a directory or Hub name: for --start or --head base, for keys that store no inputs, and for"
        " validation on the corpus's tuning split",
        None,
        identity="none",
        by_url=True,
    )
    base_sharding: Literal["none", "zero3"] = option(
        "the base next to the training (keys without inputs, validation): whole on each rank, or cut over the"
        " ranks by ZeRO-3, for one that is larger than a GPU; slower, the same numbers",
        "none",
        identity="none",
    )
    objective: Literal["auto", "imitation", "helpful", "joined"] = option(
        "what is minimized; imitation: alpha KL(kNN || memory) + (1 - alpha) CE; helpful: the same where kNN"
        " gives the label more probability than the base, CE elsewhere; joined: imitation of kNN mixed with"
        " the base; auto: chosen, with --alpha and --ce-through, and the reason is logged",
        "imitation",
    )
    joined_lambda: float = option(
        "with --objective joined: share of kNN, the rest is the base's", DEFAULT_LAMBDA, above=0, at_most=1
    )
    alpha: float | None = option(
        "weight of KL; 1 - alpha is that of the cross entropy; none: --objective auto chooses it",
        0.5,
        at_least=0,
        at_most=1,
    )
    ce_through: Literal["plain", "mixture"] | None = option(
        "cross entropy of the memory alone, or of its mixture with the base", "plain"
    )
    mixture_lambda: float = option("weight of the memory in that mixture", DEFAULT_LAMBDA, above=0, at_most=1)
    recipe: str | None = option(
        "a set of flags by name, for those that are not given: "
        + "; ".join(f"{name} ({recipe.source})" for name, recipe in RECIPES.items()),
        None,
        choices=tuple(RECIPES),
        identity="none",
    )
    control: Literal["random-memory", "permuted-targets"] | None = option(
        "train a control in place of the memory: its initial weights, without a step, or a memory that is"
        " given the targets of other positions",
        None,
    )
    preset: str | None = option(
        "a named size of memory, instead of the four flags below; parameters at a vocabulary of"
        f" {_PRESETS_VOCABULARY:,}: " + _PRESETS_HELP,
        None,
        choices=tuple(PRESETS),
        identity="none",
    )
    num_blocks: int | None = option("residual blocks (default: 4)", None, at_least=1, identity="resolved")
    hidden_size: int | None = option(
        "width (default: that of a state of the base)", None, at_least=1, identity="resolved"
    )
    intermediate_size: int | None = option(
        "width inside a block (default: 4 x the width)", None, at_least=1, identity="resolved"
    )
    family: Literal["gelu", "swiglu"] | None = option(
        "kind of block (default: gelu)", None, identity="resolved"
    )
    start: Literal["random", "base"] = option(
        "what the memory is before the first step: random, or the base itself: blocks that add nothing yet,"
        " the base's final norm and its head (inputs of the point layer_output of the last layer, or"
        " final_norm)",
        "random",
    )
    head: Literal["random", "base", "frozen"] | None = option(
        "the output head before the first step: random, or a copy of the base's own; frozen: the base's own,"
        " shared with it: it is neither trained nor stored, and a step is shorter (default: as --start)",
        None,
    )
    window: int = option(
        "positions whose inputs the memory reads at once: the position's own and those before it",
        1,
        at_least=1,
    )
    init_from: Path | None = option(
        "memory whose weights and shape this training starts from: an output of launch/train.py, its"
        " weights/, or an export or its Hub name (one without a head of its own needs --model)",
        None,
        by_url=True,
    )
    batch_positions: int = option("positions in a step, over all ranks", 2048, at_least=1)
    micro_batch_positions: int = option(
        "positions that a rank takes through the model at once, at most", 8192, at_least=1, identity="none"
    )
    shuffle_window_blocks: int = option(
        "blocks of positions that are shuffled together; W ranks hold a W-th of two such windows each, and"
        " read little twice with 30 blocks a rank or more",
        1024,
        at_least=1,
    )
    order: Literal["positions", "blocks"] | None = option(
        "shuffle positions within windows, or whole blocks (default: positions; blocks where the keys store"
        " no inputs)",
        None,
    )
    loader: Literal["stored", "webdataset"] = option(
        "how batches are read: the stored targets by position, in an order that no number of ranks changes;"
        " or target shards streamed by webdataset, for clusters whose shards are in an object store",
        "stored",
    )
    targets_url: str | None = option(
        "with webdataset: where the target shards are, a directory or URL, or a command; {} stands for a"
        " shard's name (default: --targets, of which only the manifest is needed with this)",
        None,
        metavar="URL",
        identity="none",
    )
    open_shards: int = option("with webdataset: shards that a rank reads at a time", 4, at_least=1)
    shuffle_buffer_positions: int = option(
        "with webdataset: positions that a rank holds to shuffle them", 65_536, at_least=1
    )
    reader_threads: int | None = option(
        "threads of a rank that decode batches ahead (default: its cores, at most 8)",
        None,
        at_least=1,
        at_most=MAX_THREADS,
        identity="none",
    )
    validation_positions: int = option(
        "positions of the tuning split that a validation scores, about, in whole windows", 16_384, at_least=1
    )
    recompute_activations: bool = option(
        "compute activations again in the backward instead of keeping them: less memory, a little more time",
        False,
        identity="none",
    )
    compile: bool = option(
        "let torch.compile make one kernel of what stands between a block's matrices (swiglu gains); needs a"
        " C++ compiler, on a GPU Triton",
        False,
        identity="none",
    )

    @classmethod
    def dependent_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        if values["recipe"] is not None:
            found |= RECIPES[values["recipe"]].flags
        elif values["objective"] == "auto":
            found |= {"alpha": None, "ce_through": None}
        if values["targets"] is not None and url_of(values["targets"]):
            found["keys"] = values["targets"].parent / "keys"  # next to them is in the store
        return found

    def check(self) -> None:
        super().check()
        self._check_objective()
        if self.targets is None and (self.kl_weight > 0 or self.keys is None):
            raise UserError("--targets is needed (without it: --alpha 0 and --keys)")
        self._check_loader()
        self._check_start()
        if self.asks_for_validation and self.model is None:
            raise UserError(
                "--validate-every needs --model, the base that the keys were extracted with, and so do"
                " --early-stopping-patience and --select best, which need validation"
            )
        if self.preset and (shape := self.given(*SHAPE_FLAGS)):
            raise UserError(f"--preset {self.preset} fixes the shape: leave out {shape[0]}")

    def _check_start(self) -> None:
        if self.start == "base" and self.head == "random":
            raise UserError("--start base starts with the base's output head: leave out --head random")
        for flag, value in (("start", self.start), ("head", self.head or "random")):
            if self.init_from is not None and self.given(flag):
                raise UserError(f"--init-from brings its own weights: leave out --{flag} {value}")
            if value in ("base", "frozen") and self.model is None:
                raise UserError(f"--{flag} {value} needs --model, the base whose output head it takes")

    def _check_objective(self) -> None:
        if self.objective == "auto":
            if self.recipe is not None:
                raise UserError(
                    f"--recipe {self.recipe} says what is minimized: leave out --objective auto, or --recipe"
                )
        elif self.alpha is None or self.ce_through is None:
            raise UserError(
                f"--alpha {self.alpha} and --ce-through {self.ce_through} with --objective {self.objective}:"
                " give both, or --objective auto, which chooses them"
            )
        if self.objective != "joined":
            self.refuse_unused("joined_lambda", of="--objective joined")
        if self.ce_through == "plain":
            self.refuse_unused("mixture_lambda", of="--ce-through mixture")
        if self.objective == "joined" and self.model is None:
            raise UserError(
                "--objective joined needs --model, the base whose head and final norm give its distribution"
            )
        if self.control == "random-memory" and (self.init_from is not None or self.start == "base"):
            raise UserError(
                "--control random-memory keeps the initial weights, which --init-from and --start base make"
                " those of a trained model: leave out one of them"
            )
        reads_targets = self.targets is not None and self.alpha != 0 and self.loader == "stored"
        if self.control == "permuted-targets" and not reads_targets:
            raise UserError(
                "--control permuted-targets reads the targets of other positions: give --targets, an --alpha"
                " above 0 and --loader stored"
            )

    def _check_loader(self) -> None:
        if self.loader == "stored":
            names = ("targets_url", "open_shards", "shuffle_buffer_positions")
            self.refuse_unused(*names, of="--loader webdataset")
            return
        self.refuse_unused("shuffle_window_blocks", "order", of="--loader stored")
        if self.targets is None:
            raise UserError(
                "--loader webdataset streams the shards of --targets: give them, or --loader stored"
            )

    @property
    def start_of_head(self) -> Literal["random", "base"]:
        """What the output head is before the first step, where no memory is started from."""
        return "base" if self.head == "frozen" else self.head or self.start

    @property
    def kl_weight(self) -> float:
        """`alpha`; 0 where it is not chosen yet."""
        return self.alpha or 0.0

    @property
    def asks_for_validation(self) -> bool:
        """Whether a flag says that there is to be validation; without one it depends on the inputs."""
        is_given = self.validate_every not in (None, "auto")
        return is_given or self.selects_best or bool(self.early_stopping_patience)
