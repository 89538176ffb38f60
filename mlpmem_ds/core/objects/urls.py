"""Which words of a command line are URLs.

A flag's value may be a Path, in which `s3://bucket/run` has become `s3:/bucket/run`: both are read.
"""

from __future__ import annotations

import re
from pathlib import Path

# One letter is a drive of Windows.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
_NAMED = re.compile(r"([\w+]+=)?(.*)", re.DOTALL)


def url_of(value: str | Path) -> str | None:
    """The URL that a word or path is, without slashes at its end; None where it is none."""
    found = _URL.fullmatch(str(value))
    if found is None:
        return None
    scheme, rest = found[1], found[2].rstrip("/")
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def named_url_of(value: str | Path) -> tuple[str, str] | None:
    """(`NAME=` or nothing, URL) of a word such as `base+ce=s3://bucket/run/ce`; None where it has none."""
    if isinstance(value, Path):
        url = url_of(value)
        return None if url is None else ("", url)
    found = _NAMED.fullmatch(value)
    url = None if found is None else url_of(found[2])
    return None if found is None or url is None else (found[1] or "", url)


def join_url(url: str, name: str) -> str:
    """`name` below `url`; the URL itself where it is empty."""
    return f"{url.rstrip('/')}/{name}" if name else url


def name_of_url(url: str) -> str:
    """The last part: `targets` of `s3://bucket/run/targets`."""
    return url.rstrip("/").rpartition("/")[2]
