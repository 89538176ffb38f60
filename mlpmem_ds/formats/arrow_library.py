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
    """Errors of pyarrow that are raised inside, as UserErrors that say which kind of fault it is.

    Errors of the operating system (with a number) and UserErrors go through as they are.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{path} needs more memory than there is ({_one_line(error)}): write it again with smaller row"
            " groups or batches"
        ) from error
    except NotImplementedError as error:
        raise UserError(
            f"{path} holds what this version of pyarrow cannot read ({_one_line(error)}): install a newer"
            " pyarrow, or write the file again with plain columns and compression"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:  # pyarrow's own errors are of these kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "crypt" in str(error):
            raise UserError(
                f"{path} is encrypted ({_one_line(error)}): write it again without encryption"
            ) from error
        raise UserError(
            f"{path} is cut short or damaged ({_one_line(error)}): restore it or leave it out"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
