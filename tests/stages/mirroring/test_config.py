"""The flags of `mirror`: which way it goes, and what does not fit together."""

from __future__ import annotations

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.mirroring.config import Config


def test_the_urls_say_which_way_it_goes() -> None:
    assert Config(source="run", target="s3://b/run").to_url == "s3://b/run"
    assert Config(source="s3://b/run", target="run").from_url == "s3://b/run"
    assert Config(source="s3://b/run", verify=True).from_url == "s3://b/run"
    assert Config().from_url is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"source": "run"}, "run alone"),
        ({"source": "s3://b/run"}, "s3://b/run alone"),
        ({"source": "run", "target": "copy"}, "two local paths"),
        ({"source": "s3://b/x", "target": "s3://b/y"}, "two URLs"),
        ({"source": "s3://b/x", "target": "y", "watch": True}, "go with DIRECTORY URL"),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(**flags)  # type: ignore[arg-type]
