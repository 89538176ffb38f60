"""Servers of object stores in this process, for tests: moto's of S3, and an emulator of Google's. Each skips
where it, or the package that speaks to it, is not installed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def s3_server() -> Iterator[str]:
    """The address of a server with the bucket `bucket`, while the generator is open."""
    reason = "no S3 server: pip install 'moto[server]' s3fs"
    server_module: Any = pytest.importorskip("moto.server", reason=reason)
    s3fs: Any = pytest.importorskip("s3fs", reason=reason)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    store = s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=address, skip_instance_cache=True)
    store.makedirs(BUCKET, exist_ok=True)  # servers of one process share what they hold
    yield address
    server.stop()


def gs_server() -> Iterator[str]:
    """The same of Google's store. It knows no uploads on a condition and cannot cancel one."""
    reason = "no server of Google's kind: pip install -r tests/cluster/requirements-gs.txt"
    server_module: Any = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    pytest.importorskip("gcsfs", reason=reason)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    with server:
        yield f"http://127.0.0.1:{port}"


def gs_environment(address: str) -> dict[str, str]:
    """So that `gs://` is there, and Google is not asked who calls."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
