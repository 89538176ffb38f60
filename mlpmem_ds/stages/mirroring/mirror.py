"""Bring directories of a run to an object store and back. core/objects/ is what does it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import size_in_words
from mlpmem_ds.core.names import is_name_inside
from mlpmem_ds.core.objects.cache import Cache
from mlpmem_ds.core.objects.contents import (
    CHECKPOINTS,
    MANIFEST,
    LocalDirectory,
    directories_in,
    is_passing_name,
)
from mlpmem_ds.core.objects.fetch import pull
from mlpmem_ds.core.objects.listing import BEGUN, FILES, withdraw
from mlpmem_ds.core.objects.push import Push, Pushed
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.urls import join_url
from mlpmem_ds.core.objects.verify import verify
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.mirroring.config import Config

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> str | None:
    """See `Config`; the text for the terminal. Of several ranks one works.

    Raises:
        UserError: with the URL and the remedy.
        DamagedDataError: an object or a file is not what its record says; its name is in the message.
    """
    if not world.is_first:
        return None
    if config.source is None:
        return _cache_in_words(Cache.from_environment(os.environ))
    if config.from_url is None:
        assert config.to_url is not None
        return _send(config, Path(config.source), config.to_url)
    if config.target is None:
        return _verify(config.from_url, config.threads)
    return _fetch(config.from_url, Path(config.target), config)


def _send(config: Config, source: Path, url: str) -> str:
    if config.watch:
        lines = _watch(config, source, url)
    else:
        directories = directories_in(source, checkpoints=config.checkpoints)
        if directories[0].kind == "plain" and not directories[0].names():
            raise UserError(f"{source} holds no file: give a directory that does; is its disk mounted?")
        _name_left_out(source, directories)
        lines = _send_all(config, directories, url)
        if config.checkpoints:
            _withdraw_halves(url, _removed_checkpoints(source, url, directories))
    return "\n".join([*lines, *([_verify(url, config.threads)] if config.verify else [])])


def _send_all(config: Config, directories: Sequence[LocalDirectory], url: str) -> list[str]:
    lines = []
    for directory in directories:
        place = join_url(url, directory.name)
        try:
            push = Push(directory, Store(place), threads=config.threads, replace=config.replace)
            lines.append(_in_words(place, push.send()))
        except FileNotFoundError:
            if not _is_removed_checkpoint(directory.root, directory.name):
                raise
            _logger.info("%s: its training has removed it meanwhile", directory.root)
    return lines


def _in_words(url: str, pushed: Pushed) -> str:
    rate = pushed.num_bytes / max(pushed.seconds, 1e-9) / 1e6
    sent = (
        f"sent {pushed.num_files:,} files, {size_in_words(pushed.num_bytes)} in {pushed.seconds:.1f} s"
        f" ({rate:,.0f} MB/s)"
        if pushed.num_files
        else "nothing to send"
    )
    return f"{url}: {sent}; {'whole' if pushed.is_whole else 'not whole yet: its stage is not complete'}"


def _watch(config: Config, source: Path, url: str) -> list[str]:
    """Send what is finished again and again; the lines for the terminal, once all is there.

    A store that cannot be reached, and a file that is not what its record says (it may just be made anew),
    are errors at the first look, and warnings later on.
    """
    pushes: dict[str, Push] = {}
    cleared: dict[str, bool] = {}  # `was_sent` when the store was last asked for halves of what is gone
    is_first = True
    if not source.is_dir():
        _logger.info("%s does not exist yet: waiting until a stage makes it", source)
    while True:
        states: dict[str, Pushed] = {}
        failures: list[Exception] = []
        directories = directories_in(source, checkpoints=config.checkpoints) if source.is_dir() else []
        for directory in directories:
            if directory.kind == "plain":
                if is_first:
                    _refuse_a_model(source)
                    _logger.info("%s holds no stage yet: waiting until there is one", source)
                continue
            place = join_url(url, directory.name)
            with _warned_of(failures, is_first=is_first):
                try:
                    pushed = _push_of(directory, place, config, pushes).send()
                except FileNotFoundError as error:  # a checkpoint that its training has removed meanwhile
                    _logger.info("%s is gone: %s", error.filename, directory.root)
                    failures.append(error)
                    continue
                states[place] = pushed
                if pushed.num_files:
                    _logger.info("%s", _in_words(place, pushed))
        with _warned_of(failures, is_first=is_first):
            gone = {
                name
                for name in pushes
                if not (source / name).is_dir() or _is_removed_checkpoint(source / name, name)
            }
            was_sent = {each.name: join_url(url, each.name) in states for each in directories}
            if config.checkpoints and was_sent != cleared:
                sent = [each for each in directories if was_sent[each.name]]
                gone |= _removed_checkpoints(source, url, sent)
            _withdraw_halves(url, gone)
            cleared, pushes = was_sent, {name: push for name, push in pushes.items() if name not in gone}
        is_first = False
        if url in states and not failures and all(pushed.is_whole for pushed in states.values()):
            return [_in_words(place, pushed) for place, pushed in states.items()]
        time.sleep(config.watch_seconds)


@contextlib.contextmanager
def _warned_of(failures: list[Exception], *, is_first: bool) -> Iterator[None]:
    """A refusal within a look is an error at the first one; later on a warning, and added to `failures`."""
    try:
        yield
    except UserError as error:
        if is_first:
            raise
        _logger.warning("%s", error)
        failures.append(error)


def _removed_checkpoints(source: Path, url: str, directories: Iterable[LocalDirectory]) -> set[str]:
    """The names of checkpoints that the store has half of, and that the trainings among `directories` have
    removed."""
    halves = set()
    for directory in directories:
        if directory.kind == "stage":
            names = Store(join_url(url, directory.name)).sizes(CHECKPOINTS)
            begun = _folders_of(names, BEGUN) - _folders_of(names, FILES)
            halves |= {f"{directory.name}/{name}".lstrip("/") for name in begun if _training_of(name) == ""}
    return {name for name in halves if is_name_inside(name) and _is_removed_checkpoint(source / name, name)}


def _is_removed_checkpoint(root: Path, name: str) -> bool:
    """Whether a directory is, by its name below the URL, a checkpoint that its training has removed or is
    removing: the manifest goes first."""
    return _training_of(name) is not None and not (root / MANIFEST).is_file()


def _withdraw_halves(url: str, names: Iterable[str]) -> None:
    """Of directories that are gone: no push can end what one has begun, and no run with it would be whole."""
    for name in names:
        store = Store(join_url(url, name))
        if store.read(FILES) is None:
            _logger.info("%s: its directory was removed before all of it was sent", store.url)
            withdraw(store)


def _refuse_a_model(source: Path) -> None:
    if (source / "config.json").is_file():
        raise UserError(
            f"--watch waits for what stages write, and {source} is a model: leave --watch out to send it as"
            " it is, or give the directory of a stage or a run"
        )


def _push_of(directory: LocalDirectory, url: str, config: Config, pushes: dict[str, Push]) -> Push:
    """The one of an earlier look, unless another directory has taken the name since: a stage that was removed
    and made anew with other flags."""
    push = pushes.get(directory.name)
    if push is None or push.of != directory.of():
        pushes[directory.name] = Push(directory, Store(url), threads=config.threads, replace=config.replace)
    return pushes[directory.name]


def _name_left_out(source: Path, directories: list[LocalDirectory]) -> None:
    """Directories of a run that hold nothing of ours are not sent with it."""
    if directories[0].name == "":
        return
    sent = {directory.name.partition("/")[0] for directory in directories}
    others = [path.name for path in sorted(source.iterdir()) if path.is_dir() and path.name not in sent]
    if others := [name for name in others if not name.startswith(".")]:
        _logger.warning("left out, because they are no stages: %s; send each by itself", ", ".join(others))


def _mirrors_at(url: str) -> tuple[list[tuple[str, Store]], list[str]]:
    """(name below the URL, store) of each whole mirror there: one at the URL itself with the checkpoints that
    were sent with it, or those of a run. Then the URLs of those that are not whole.

    Raises:
        DamagedDataError: one has a name that leads out of the directory into which it would be fetched.
    """
    store = Store(url)
    is_whole = store.read(FILES) is not None
    names = [FILES, *store.sizes(CHECKPOINTS)] if is_whole else list(store.sizes())
    found, begun = _folders_of(names, FILES), _folders_of(names, BEGUN)
    if elsewhere := sorted(name for name in found if name and not is_name_inside(name)):
        raise DamagedDataError(
            f"{join_url(url, elsewhere[0])} names a directory outside {url}: remove its objects, or give the"
            " URL of one stage"
        )
    if not found:
        return [("", store)], []
    halves = [join_url(url, name) for name in sorted(begun - found)]
    return [(name, Store(join_url(url, name))) for name in sorted(found)], halves


def _training_of(name: str) -> str | None:
    """Of a checkpoint by its name below the URL; None of another directory."""
    training, found, step = f"/{name}".rpartition(f"/{CHECKPOINTS}/")
    return training[1:] if found and "/" not in step else None


def _folders_of(names: Iterable[str], end: str) -> set[str]:
    """The folders in which objects of this name lie; "" is that of the URL itself."""
    return {name[: -len(end)].rstrip("/") for name in names if f"/{name}".endswith(f"/{end}")}


def _fetch(url: str, target: Path, config: Config) -> str:
    lines = []
    mirrors, halves = _mirrors_at(url)
    for half in halves:
        _logger.warning("%s is not whole: its push has not ended", half)
    names = {name for name, _ in mirrors}
    finished = {name for name in names if not config.checkpoints and _training_of(name) in names}
    if finished:
        _logger.info("%d checkpoints of finished trainings are left out: --checkpoints", len(finished))
    for name, store in mirrors:
        if name in finished or is_passing_name(name, names):
            continue
        start = time.monotonic()
        place = target / name if name else target
        listing = pull(store, place, flag="SOURCE", threads=config.threads, replace=config.replace)
        seconds = time.monotonic() - start
        lines.append(
            f"{store.url}: {len(listing.files):,} files, {size_in_words(listing.num_bytes)} in"
            f" {seconds:.1f} s ({listing.num_bytes / max(seconds, 1e-9) / 1e6:,.0f} MB/s); whole"
        )
    return "\n".join([*lines, *([_verify(url, config.threads)] if config.verify else [])])


def _verify(url: str, threads: int) -> str:
    lines: list[str] = []
    faults: list[str] = []
    mirrors, halves = _mirrors_at(url)
    for _, store in mirrors:
        verified = verify(store, flag="SOURCE", threads=threads)
        faults += verified.faults
        lines.append(
            f"{store.url}: {verified.num_files:,} files, {size_in_words(verified.num_bytes)},"
            f" {len(verified.faults)} faults"
        )
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise DamagedDataError(
            f"{faults[0]}{more}: send the directory again with --replace, or fetch what is right from"
            " elsewhere"
        )
    if halves:
        more = f", and {len(halves) - 1} more" if len(halves) > 1 else ""
        flag = " with --checkpoints" if any(map(_training_of, halves)) else ""
        raise DamagedDataError(f"{halves[0]} is not whole: its push has not ended{more}: run it again{flag}")
    return "\n".join(lines)


def _cache_in_words(cache: Cache) -> str:
    held = cache.contents()
    total = sum(each.num_bytes for each in held)
    lines = [
        f"{cache.root}: {size_in_words(total)} of {size_in_words(cache.max_bytes)}"
        " (MLPMEM_CACHE, MLPMEM_CACHE_BYTES)"
    ]
    for each in held:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        state = "in use" if each.is_in_use else "not in use"
        lines.append(
            f"{size_in_words(each.num_bytes):>10} of {size_in_words(each.source.num_bytes):<10} {used} "
            f" {state:10}  {each.source.url}"
        )
    return "\n".join(lines)
