"""Words that are URLs, and words that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.objects.urls import join_url, name_of_url, named_url_of, url_of


@pytest.mark.parametrize(
    ("word", "url"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        ("gs://bucket", "gs://bucket"),
        ("memory://run/keys", "memory://run/keys"),
        ("file:///tmp/run", "file:///tmp/run"),
        ("run/keys", None),
        ("/run/keys", None),
        ("train:2048", None),
        ("pipe:aws s3 cp s3://bucket/{} -", None),
        ("c:/run", None),
        ("org/model", None),
    ],
)
def test_a_word_and_the_path_made_of_it_are_the_same_url(word: str, url: str | None) -> None:
    assert url_of(word) == url
    assert url_of(Path(word)) == url


def test_a_name_before_a_url_is_kept() -> None:
    assert named_url_of("base+ce=s3://bucket/ce") == ("base+ce=", "s3://bucket/ce")
    assert named_url_of("s3://bucket/ce") == ("", "s3://bucket/ce")
    assert named_url_of(Path("s3://bucket/ce")) == ("", "s3://bucket/ce")
    assert named_url_of("ce=run/ce") is None and named_url_of("Hello: //") is None


def test_parts_of_urls() -> None:
    assert join_url("s3://bucket/run/", "keys") == "s3://bucket/run/keys"
    assert join_url("s3://bucket/run", "") == "s3://bucket/run"
    assert name_of_url("s3://bucket/run/keys") == "keys"
