"""The flags of `evaluate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.stages import shared_flags

if TYPE_CHECKING:
    from mlpmem_ds.models.mixture import Grid

DEFAULT_EXTRA_SPLITS = ("heldout",)
BANK = "bank"
_RESERVED_NAMES = ("base", "memory", "knn_exact", "knn_ivfpq")


def lambda_grid(words: Sequence[str]) -> Grid:
    """The values of `--lambdas` in rising order, so that its ends are those of the range.

    Raises:
        UserError: as `shared_flags.grid_of`.
    """
    grid = shared_flags.grid_of(words)
    return replace(grid, lambdas=tuple(sorted(grid.lambdas)))


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Base, retriever, memory and controls on unseen text, in one table.

    Scores the base, kNN, memories and controls on unseen text; λ is chosen on the tuning split, the test
    split is reported.
    """

    example: ClassVar[str] = (
        "python launch/evaluate.py --model run/base --corpus run/corpus --output run/report"
        " --memory run/memory --keys run/keys --index run/index --targets run/targets"
        " --control base+memory_ce_only=run/ce_only base_trained_on=run/base_trained_on"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-windows",)

    model: str = option("base language model: a directory or Hub name", identity="none", by_url=True)
    corpus: Path = option("corpus directory with the text to predict", by_url=True)
    output: Path = option("report directory to write")
    memory: tuple[str, ...] = option(
        "trained memory: an output of launch/train.py, or an exported model or its Hub name; several, by"
        " names of their own or of their directories, add an arm each and the bank of all",
        (),
        identity="none",
        metavar="[NAME=]DIR",
        by_url=True,
    )
    gate: tuple[str, ...] = option(
        "fitted gate, an output of launch/fit_gate.py: adds the arm base+memory+gate (of several memories"
        " base+bank+gate, of a second model base+NAME+gate); several are told apart by names",
        (),
        identity="none",
        metavar="[NAME=]DIR",
        by_url=True,
    )
    keys: Path | None = option("key directory: adds the arm base+knn_exact", None, by_url=True)
    index: Path | None = option("index of those keys: adds the arm base+knn_ivfpq", None, by_url=True)
    targets: Path | None = option(
        "targets of those keys: their weighting and k are taken", None, identity="resolved", by_url=True
    )
    control: tuple[str, ...] = option(
        "further arms: base+NAME=a memory, NAME=a language model of its own",
        (),
        identity="none",
        metavar="NAME=DIR",
        by_url=True,
    )
    ensemble: tuple[str, ...] = option(
        "further arms base+NAME: the base mixed with a second language model of its vocabulary",
        (),
        identity="none",
        metavar="NAME=DIR",
        by_url=True,
    )
    exact: bool | None = option(
        "search all the keys as well; its cost grows with positions times keys (default: where it is no more"
        " than what --search auto of write_targets searches exactly)",
        None,
        identity="resolved",
    )
    tuning_split: str = option(
        "split on which λ, and for kNN temperature and neighbours, are chosen", "tuning"
    )
    test_split: str = option("split that is reported", "test")
    extra_splits: tuple[str, ...] = option(
        "further test sets, where the corpus has them", DEFAULT_EXTRA_SPLITS
    )
    k: int | None = option(
        "neighbours (default: the targets', else 256); a quarter and a sixteenth of them are tried too",
        None,
        at_least=1,
        identity="resolved",
    )
    temperature: float | None = option(
        "kNN temperature in squared key units (default: the targets'); 1/32 to 4 times this are tried",
        None,
        above=0,
        identity="resolved",
    )
    nprobe: int = option("lists that base+knn_ivfpq probes", 32, at_least=1, identity="resolved")
    lambdas: tuple[str, ...] = shared_flags.lambdas("to choose from", ("0:1:0.05",), identity="none")
    choices_from: Path | None = option(
        "report whose λ, neighbours and temperature are taken, by arm, instead of the best on the tuning"
        " split: measures what arms that were tuned on one text do to another",
        None,
        identity="none",
        by_url=True,
    )
    bootstrap_samples: int = shared_flags.bootstrap_samples()
    bootstrap_block: int = option("positions in a block of the bootstrap", 256, at_least=1, identity="none")
    speed_positions: int | None = option(
        "test positions on which speed is measured at a quarter, half and all of the keys; none = not",
        512,
        at_least=1,
        identity="none",
    )
    samples: int = option(
        "passages continued without and with the memory in report.md", 3, at_least=0, identity="none"
    )
    unit_positions: int = option("positions in a unit of work", 8192, at_least=1)
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()
    batch_windows: int = option(
        "windows that a GPU reads at once; on a CPU always as many as make 2,048 tokens, so that scores do"
        " not depend on it",
        16,
        at_least=1,
        identity="none",
    )
    dtype: shared_flags.Dtype = shared_flags.dtype("resolved")
    memory_weights: shared_flags.MemoryWeights = shared_flags.memory_weights()
    device: str = shared_flags.device()
    device_map: shared_flags.DeviceMap = shared_flags.device_map()
    attention: str = shared_flags.attention()

    @property
    def grid(self) -> Grid:
        """The values of `--lambdas`."""
        return lambda_grid(self.lambdas)

    def check(self) -> None:
        if self.grid.lambdas[0] == 1 and self.keys is not None:
            raise UserError(
                f"--lambdas {' '.join(self.lambdas)}: kNN gives most tokens no probability at all, so that"
                " its arms need a λ below 1"
            )
        splits = (self.tuning_split, self.test_split, *self.extra_splits)
        if len(set(splits)) != len(splits):
            raise UserError(
                f"the splits {', '.join(splits)} must differ: nothing is tested on the text that λ is"
                " chosen on"
            )
        if self.index is not None and self.keys is None:
            raise UserError(
                "--index needs --keys, the directory that it was built from: found distances are rescored"
                " from it"
            )
        if self.keys is None:
            self.refuse_unused("targets", "exact", "k", "temperature", of="--keys, which adds the kNN arms")
        control_directories(self.control)
        memory_directories(self.memory)
        named_directories(self.ensemble, flag="--ensemble")
        gate_directories(self.gate)
        if self.gate and not (self.memory or self.ensemble):
            raise UserError("--gate needs --memory (or --ensemble), what it was fitted with")


def memory_directories(words: Sequence[str]) -> dict[str, str]:
    """[NAME=]DIR words of --memory → name of the arm and directory (or Hub name); a single one without a name
    is base+memory.

    Raises:
        UserError: a name that is none, or taken, or a directory twice.
    """
    directories: dict[str, str] = {}
    for word in words:
        name, sign, directory = word.partition("=")
        if not sign:
            name, directory = ("memory" if len(words) == 1 else Path(word).name), word
        if not directory or not re.fullmatch(r"\w+", name):
            raise UserError(f"--memory {word}: give NAME=DIR with a name of letters, digits and underscores")
        if f"base+{name}" in directories or name in (*_RESERVED_NAMES, BANK) and name != "memory":
            raise UserError(f"--memory {word}: the name {name} is taken; give another, as NAME={directory}")
        directories[f"base+{name}"] = directory
    shared_flags.refuse_repeated(list(directories.values()), flag="--memory")
    return directories


def gate_directories(words: Sequence[str]) -> dict[str, str]:
    """[NAME=]DIR words of --gate → name and directory; one without a name is called gate.

    Raises:
        UserError: a name that is none, or given twice.
    """
    directories: dict[str, str] = {}
    for word in words:
        name, sign, directory = word.partition("=")
        name, directory = (name, directory) if sign else ("gate", word)
        if not directory or not re.fullmatch(r"\w+", name) or name in directories:
            raise UserError(
                f"--gate {word}: give each gate as NAME=DIR with a name of its own, of letters, digits and"
                " underscores"
            )
        directories[name] = directory
    return directories


def control_directories(controls: Sequence[str]) -> dict[str, Path]:
    """The words of `--control` → name of the arm and directory. Raises UserError as `named_directories`."""
    return named_directories(controls, flag="--control", may_be_mixed=True)


def named_directories(words: Sequence[str], *, flag: str, may_be_mixed: bool = False) -> dict[str, Path]:
    """NAME=DIR words → name and directory; NAME may begin with base+ where it `may_be_mixed`.

    Raises:
        UserError: not of that form, or a name that is taken.
    """
    directories: dict[str, Path] = {}
    form = r"(base\+)?\w+" if may_be_mixed else r"\w+"
    for word in words:
        name, sign, directory = word.partition("=")
        if not sign or not directory or not re.fullmatch(form, name):
            raise UserError(f"{flag} {word}: give NAME=DIR with a name of letters, digits and underscores")
        if name in directories or name.removeprefix("base+") in _RESERVED_NAMES:
            raise UserError(f"{flag} {word}: the name {name} is taken; choose another")
        directories[name] = Path(directory)
    return directories
