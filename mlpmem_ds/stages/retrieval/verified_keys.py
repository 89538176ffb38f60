"""Key files compared with their checksums once, by one rank each: units of the stage that reads them all.

Exact search reads all keys on every rank; were each to compare them with their checksums, a thousand ranks
would read them a thousand times for that alone. A unit's record says for all ranks, and for later starts,
that its files were whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.stage_directory import UnitWriter
from mlpmem_ds.formats.keys import Keys

_UNIT_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class VerifiedKeys:
    """The units that compare the key and value files of a key directory, about a gigabyte each."""

    keys: Keys

    @cached_property
    def units(self) -> dict[str, list[Block]]:
        """The key units that each of them reads, by name."""
        blocks = self.keys.blocks
        each = max(1, _UNIT_BYTES * len(blocks) // max(1, self.keys.bytes_of("keys", "values")))
        groups = [blocks[start : start + each] for start in range(0, len(blocks), each)]
        return {f"verified-{group[0].start:012d}": group for group in groups}

    def verify(self, unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        """One unit: writes nothing but its record.

        Raises:
            DamagedDataError: a file has another checksum.
        """
        for block in self.units[unit]:
            self.keys.check("keys", block)
            self.keys.check("values", block)
        return {"verified": 2 * len(self.units[unit])}
