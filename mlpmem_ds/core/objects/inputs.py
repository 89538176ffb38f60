"""The URLs among a command's flags, replaced by directories of the cache, before the command opens them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import ConfigType, flag_of
from mlpmem_ds.core.objects.cache import Cache
from mlpmem_ds.core.objects.urls import named_url_of


@contextlib.contextmanager
def opened_inputs(config: ConfigType, environment: Mapping[str, str]) -> Iterator[ConfigType]:
    """The Config with local directories for its URLs; they are in use until the block ends.

    Args:
        config: of any command; flags that do not take URLs are left as they are.
        environment: says where the cache is and how much it may hold.

    Raises:
        UserError: as `Cache.open`.
    """
    with contextlib.ExitStack() as held:
        cache = Cache.from_environment(environment)
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            if field.metadata["by_url"]:
                value = getattr(config, field.name)
                local = _local(value, cache, held, flag_of(field))
                if local != value:
                    changed[field.name] = local
        yield dataclasses.replace(config, **changed)


def _local(value: Any, cache: Cache, held: contextlib.ExitStack, flag: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_local(item, cache, held, flag) for item in value)
    if not isinstance(value, str | Path) or (named := named_url_of(value)) is None:
        return value
    name, url = named
    root = cache.open(url, held, flag=flag)
    return root if isinstance(value, Path) else f"{name}{root}"
