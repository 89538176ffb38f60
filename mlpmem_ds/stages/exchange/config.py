"""The flags of `import_datastore` and `export_datastore`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages import shared_flags


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Flags):
    """Published Arrow datastores and targets → a corpus, keys and targets, ready to train.

    Converts the Arrow files of the method's public code: datastores (keys, vals) and targets. Needs pyarrow.
    """

    example: ClassVar[str] = (
        "python tools/import_datastore.py --datastore dstore.arrow --targets knn.arrow --model BASE"
        " --output run"
    )

    output: Path = option("run directory to write: OUTPUT/corpus, OUTPUT/keys, OUTPUT/targets")
    datastore: tuple[Path, ...] = option("Arrow files of keys and values, in their order", (), metavar="FILE")
    targets: tuple[Path, ...] = option("Arrow files of targets, in their order", (), metavar="FILE")
    model: str | None = option("with --datastore: the base of the keys, a directory or Hub name", None)
    tokenizer: str | None = option("its tokenizer (default: that of --model)", None)
    key_layer: shared_flags.Layer = shared_flags.layer(
        "the layer whose MLP input the keys are", identity="own"
    )
    keys: Path | None = option(
        "without --datastore: the key directory whose rows the targets are of", None, by_url=True
    )
    k: int = option("noted in the manifest: neighbours of a target", 1024, at_least=1)
    temperature: float = option(
        "noted in the manifest: T of the targets, in squared key units", 16.0, above=0
    )
    block_size: int = option(
        "with --datastore: positions of a sample and of a window (targets of --keys have those of the keys)",
        1024,
        at_least=1,
        identity="resolved",
    )
    unit_positions: int = option("positions of a unit of keys", 65536, at_least=1)
    shard_positions: int = option("positions of a target shard", 65536, at_least=1)

    def check(self) -> None:
        if not self.datastore and not self.targets:
            raise UserError("give --datastore, --targets, or both: there is nothing to import")
        if self.datastore and self.keys is not None:
            raise UserError("give --datastore or --keys, not both: the targets are of one of them")
        if not self.datastore and self.keys is None:
            raise UserError("--targets needs --datastore or --keys: which rows are these targets of?")
        if self.datastore and self.model is None:
            raise UserError("--datastore needs --model, the base of the keys")
        if not self.datastore:
            self.refuse_unused(
                "key_layer", "unit_positions", "block_size", "model", "tokenizer", of="--datastore"
            )
        if not self.targets:
            self.refuse_unused("k", "temperature", "shard_positions", of="--targets")
        shared_flags.refuse_repeated(self.datastore, flag="--datastore")
        shared_flags.refuse_repeated(self.targets, flag="--targets")
        if self.datastore and self.targets:
            self.check_shards(self.block_size, of="--block-size")

    def check_shards(self, block_size: int, *, of: str) -> None:
        """Refuse target shards that cut blocks.

        Args:
            block_size: positions of a sample.
            of: whose it is, as users write it.

        Raises:
            UserError: with the nearest size that does not.
        """
        if self.shard_positions % block_size:
            nearest = max(block_size, round(self.shard_positions / block_size) * block_size)
            raise UserError(
                f"--shard-positions {self.shard_positions} is not a multiple of {of}, {block_size}:"
                f" choose {nearest}"
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Flags):
    """Keys and targets → the Arrow files of the method's public code.

    Writes datastore.arrow (keys, vals) and targets.arrow (id_cnt, token_id, prob, label). Needs pyarrow.
    """

    example: ClassVar[str] = (
        "python tools/export_datastore.py --keys run/keys --targets run/targets --output run/arrow"
    )

    keys: Path = option("key directory", by_url=True)
    targets: Path | None = option("target directory of these keys", None, by_url=True)
    output: Path = option("directory to write")
    datastore: bool = option("write the datastore too", True)

    def check(self) -> None:
        if self.targets is None and not self.datastore:
            raise UserError("--no-datastore without --targets: there is nothing to write")
