"""Files other than Python that are part of the project: in an installed package, else next to it."""

from __future__ import annotations

from pathlib import Path

import mlpmem_ds


def ds_configs() -> Path:
    """The directory of DeepSpeed configurations."""
    package = Path(mlpmem_ds.__file__).parent
    return next(root / "ds_configs" for root in (package, package.parent) if (root / "ds_configs").is_dir())
