"""The objects below a URL, as fsspec gives them, and what goes wrong with them in words.

An object appears whole or not at all: object stores see to it, and on a file system it is written under a
temporary name first (core/files.py). The one file that uses fsspec.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.files import flush, publish
from mlpmem_ds.core.objects.locks import PathLocks
from mlpmem_ds.core.objects.urls import join_url
from mlpmem_ds.core.temporaries import temporary_path

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_AGAIN = "the same command goes on where it was"
_CREDENTIALS = (
    "set the store's credentials (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; Google:"
    " GOOGLE_APPLICATION_CREDENTIALS), and check that they may read and write there"
)
_ENDPOINT = "check the network and the address of the store (AWS_ENDPOINT_URL for an S3 that is not Amazon's)"
# names of libraries' exceptions, in the order in which they are looked for → what to do
_REMEDIES = {
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "PermissionError"): _CREDENTIALS,
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRetrievalError", "RefreshError"): _CREDENTIALS,
    ("DefaultCredentialsError", "Anonymous caller", "Invalid Credentials", "Forbidden"): _CREDENTIALS,
    ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"): _ENDPOINT,
    (
        "ConnectionError",
        "ConnectionRefusedError",
        "ReadTimeoutError",
        "SSLError",
        "gaierror",
        "ProxyError",
    ): _ENDPOINT,
    ("ConnectionClosedError", "TimeoutError", "FSTimeoutError", "ServerDisconnectedError"): _ENDPOINT,
}
_locks = PathLocks()


class Store:
    """What lies below a URL. Names are relative to it, with slashes.

    Raises:
        UserError: of every method: no such kind of URL, its package is missing, no credentials, no
            connection, or what else the store says, with the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition(":")[0]
        self.is_local = self.scheme in ("file", "local")
        with self._in_words("open"):
            self._fs, root = self._open(url)
        self._root = root.rstrip("/")

    def _open(self, url: str) -> tuple[Any, str]:
        import fsspec

        try:
            # Not a file system of the process's memory: a listing that is kept would be of another time.
            options: dict[str, Any] = {"use_listings_cache": False}
            options |= {"auto_mkdir": True} if self.is_local else {"skip_instance_cache": True}
            found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
            return found
        except ImportError as error:
            package = _PACKAGES.get(self.scheme)
            if package is None:
                raise UserError(f"{url} needs a package for {self.scheme}:// ({error})") from error
            extra = ", or pip install '.[s3]'" if package == "s3fs" else ""
            raise UserError(f"{url} needs the package {package}: pip install {package}{extra}") from error
        except ValueError as error:
            raise UserError(
                f"{url} is of no kind that fsspec knows ({first_line(error)}): give s3://, gs:// or another"
                " URL that it opens, or a local path"
            ) from error

    @property
    def is_s3(self) -> bool:
        return self.scheme in ("s3", "s3a")

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name → bytes of every object, or of those below a name; one look at the store."""
        place = f"{self._root}/{below}".rstrip("/")
        with self._in_words("list", below):
            try:
                found = self._fs.find(place, detail=True)
            except FileNotFoundError:
                return {}
        prefix = f"{self._root}/"
        return {
            path[len(prefix) :]: int(info.get("size") or 0)
            for path, info in found.items()
            if path.startswith(prefix) and not path.endswith(".tmp")
        }

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        with self._in_words("read", name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of an object; None where there is none."""
        with self._in_words("read", name):
            try:
                return bytes(self._fs.cat_file(self._path(name), start=start, end=stop))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """An object of these bytes, in the place of one of that name."""
        with self._in_words("write", name):
            if self.is_local:
                with self.publishing(name) as temporary:
                    temporary.write_bytes(content)
            else:
                self._fs.pipe_file(self._path(name), content)

    def write_if_absent(self, name: str, content: bytes) -> bytes:
        """Write an object unless there is one; what it then holds, where the store can tell.

        Of writers at the same moment one wins on stores with exclusive writing (S3, file systems); elsewhere
        the last.
        """
        found = self.read(name)
        if found is not None:
            return found
        if self.is_local:
            return self._link_if_absent(name, content)
        try:
            with self._in_words("write", name):
                self._fs.pipe_file(self._path(name), content, mode="create")
        except UserError:
            if (found := self.read(name)) is None:
                self.write(name, content)  # the store knows no exclusive writing, or says now what is wrong
                return content
            return found
        return self.read(name) or content

    def _link_if_absent(self, name: str, content: bytes) -> bytes:
        """The same on a file system: a whole file gets its name, unless another one has it."""
        path = self.local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        with _locks.of(path):
            try:
                temporary.write_bytes(content)
                flush(temporary)
                with contextlib.suppress(FileExistsError):
                    _give_name(temporary, path)
                flush(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return path.read_bytes()

    @contextlib.contextmanager
    def writing(self, name: str, num_bytes: int, part_bytes: int) -> Iterator[Any]:
        """A stream for an object that is too large for memory; it appears at the end, and not after an
        error."""
        with self._in_words("write", name):
            stream = self._fs.open(self._path(name), "wb", block_size=part_bytes, autocommit=False)
            try:
                yield stream
                stream.close()
                stream.commit()
            except BaseException:
                with contextlib.suppress(Exception):
                    stream.discard()
                    if self.scheme == "memory":  # knows no discarding
                        self._fs.rm_file(self._path(name))
                raise

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[Path]:
        """`core.files.publish` of an object; only where `is_local`."""
        path = self.local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locks.of(path), publish(path) as temporary:
            yield temporary

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._in_words("remove", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of Amazon's interface for the object `name`; only where `is_s3`."""
        bucket, key, _ = self._fs.split_path(self._path(name))
        place = {"Prefix": key} if method == "list_multipart_uploads" else {"Key": key}
        with self._in_words(method, name):
            answer: dict[str, Any] = self._fs.call_s3(method, Bucket=bucket, **place, **arguments)
            return answer

    def local_path(self, name: str) -> Path:
        """The file of an object; only where `is_local`."""
        return Path(self._path(name))

    def key_of(self, name: str) -> str:
        """An object's name in its bucket; only where `is_s3`."""
        return str(self._fs.split_path(self._path(name))[1])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _in_words(self, action: str, name: str = "") -> Iterator[None]:
        """What a store raises, of any kind, as a UserError with the URL and a remedy."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self.is_local and isinstance(error, OSError):
                raise  # a disk that is full, a directory that cannot be written: core/faults.py
            place = join_url(self.url, name)
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"cannot {action} {place} ({said}): {_remedy_of(error)}") from error


def _give_name(temporary: Path, path: Path) -> None:
    """Raises FileExistsError where there is a file of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: of writers at the same moment the last one wins
        os.replace(temporary, path)


def _remedy_of(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"make the bucket or directory first, or check the URL; {_AGAIN}"
    link: BaseException | None = error
    while link is not None:
        text = f"{type(link).__name__} {first_line(link)}"
        for names, remedy in _REMEDIES.items():
            if any(name in text for name in names):
                return f"{remedy}; {_AGAIN}"
        link = link.__cause__ or link.__context__
    return f"check the URL and the store; {_AGAIN}"
