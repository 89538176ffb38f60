"""pyarrow, which is optional: its import, and its errors in our words."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError


def import_arrow(name: str, *, path: Path) -> Any:
    """A module of pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{name}")
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow, which is not installed: pip install 'mlpmem-ds[arrow]'"
        ) from error


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these families
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is cut short or damaged ({error}): restore it or leave it out") from error
