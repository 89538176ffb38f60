"""One file to a store, hashed as it is read; a large one to S3 in parts.

S3 keeps the parts of an upload that was interrupted, and says what they hold: the next push of the same file
takes them, and sends the others. A part is compared by the MD5 that S3 gives for it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects.store import Store

PART_BYTES = 16 << 20
_MAX_PARTS = 9000  # S3 takes 10,000
_PARTS_AHEAD = 3
_MIB = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def part_bytes_of(num_bytes: int) -> int:
    """Size of the parts of an object: the same at every push of the same file."""
    return max(PART_BYTES, -(-num_bytes // _MAX_PARTS // _MIB) * _MIB)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """`function` of each item, in their order, of `ahead` items more than are asked for at once."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def send_file(store: Store, name: str, path: Path, expected: FileRecord | None) -> FileRecord:
    """Send a local file as the object `name`, which appears whole or not at all; its record.

    Raises:
        DamagedDataError: it is not what `expected` says; then no object appears.
        UserError: the store refuses it.
    """
    num_bytes = path.stat().st_size
    if expected is not None and num_bytes != expected.bytes:
        raise _changed(path, f"has {num_bytes} bytes where its record says {expected.bytes}")
    with open(path, "rb") as stream:
        if num_bytes <= PART_BYTES:
            content = stream.read()
            record = _checked(name, path, len(content), hashlib.sha256(content), expected)
            store.write(name, content)
            return record
        if store.is_s3:
            return _send_in_parts(store, name, path, stream, expected)
        return _send_stream(store, name, path, stream, expected)


def _checked(name: str, path: Path, num_bytes: int, digest: Any, expected: FileRecord | None) -> FileRecord:
    record = FileRecord(name=name, bytes=num_bytes, sha256=digest.hexdigest())
    if expected is not None and (record.bytes, record.sha256) != (expected.bytes, expected.sha256):
        raise _changed(path, "does not have the checksum of its record")
    return record


def _changed(path: Path, fault: str) -> DamagedDataError:
    return DamagedDataError(
        f"{path} {fault}, and was not sent: run the stage that wrote it again, it remakes only what is"
        " damaged"
    )


def _send_stream(
    store: Store, name: str, path: Path, stream: BinaryIO, expected: FileRecord | None
) -> FileRecord:
    """To a file system, or a store that has streams of its own."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256()

    def copy(target: Any) -> FileRecord:
        while part := stream.read(PART_BYTES):
            digest.update(part)
            target.write(part)
        return _checked(name, path, stream.tell(), digest, expected)

    if store.is_local:
        with store.publishing(name) as temporary, open(temporary, "wb") as written:
            return copy(written)
    with store.writing(name, num_bytes, part_bytes_of(num_bytes)) as written:
        return copy(written)


def _send_in_parts(
    store: Store, name: str, path: Path, stream: BinaryIO, expected: FileRecord | None
) -> FileRecord:
    num_bytes = path.stat().st_size
    size = part_bytes_of(num_bytes)
    upload, sent = _former_upload(store, name)
    digest = hashlib.sha256()

    def parts() -> Iterator[tuple[int, bytes]]:
        number = 1
        while part := stream.read(size):
            digest.update(part)
            yield number, part
            number += 1

    def send(item: tuple[int, bytes]) -> dict[str, Any]:
        number, part = item
        if number in sent and sent[number] == hashlib.md5(part, usedforsecurity=False).hexdigest():
            return {"PartNumber": number, "ETag": f'"{sent[number]}"'}
        answer = store.s3("upload_part", name, UploadId=upload, PartNumber=number, Body=part)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with ThreadPoolExecutor(_PARTS_AHEAD + 1) as pool:
            done = list(in_order(pool, send, parts(), ahead=_PARTS_AHEAD))
        try:
            record = _checked(name, path, stream.tell(), digest, expected)
        except DamagedDataError:
            store.s3("abort_multipart_upload", name, UploadId=upload)
            raise
        store.s3("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": done})
    except UserError as error:
        # Another writer of the same file may have completed this very upload.
        is_complete = isinstance(error.__cause__, FileNotFoundError) and not isinstance(
            error, DamagedDataError
        )
        if not is_complete or store.sizes(name).get(name) != num_bytes:
            raise
        while part := stream.read(size):
            digest.update(part)
        record = _checked(name, path, stream.tell(), digest, expected)
    return record


def _former_upload(store: Store, name: str) -> tuple[str, dict[int, str]]:
    """The newest unfinished upload of this object, or a new one; and part number → MD5 of what it has."""
    key = store.key_of(name)
    uploads = store.s3("list_multipart_uploads", name).get("Uploads", ())
    own = [upload for upload in uploads if upload["Key"] == key]
    if not own:
        return str(store.s3("create_multipart_upload", name)["UploadId"]), {}
    newest = str(max(own, key=lambda upload: str(upload["Initiated"]))["UploadId"])
    sent: dict[int, str] = {}
    marker = 0
    while True:
        page = store.s3("list_parts", name, UploadId=newest, PartNumberMarker=marker)
        sent |= {part["PartNumber"]: part["ETag"].strip('"') for part in page.get("Parts", ())}
        if not page.get("IsTruncated"):
            return newest, sent
        marker = page["NextPartNumberMarker"]
