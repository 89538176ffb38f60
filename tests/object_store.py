"""A real S3 server in this process, for tests: moto's. Skips where it or s3fs is not installed."""

from __future__ import annotations

import logging
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
