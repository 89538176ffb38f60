"""The flags of `mirror`: which way it goes, and what does not fit together."""

from __future__ import annotations

import dataclasses

import pytest

from mlpmem_ds import commands
from mlpmem_ds.core.config import flag_of
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
        ({"watch": True}, "say how SOURCE is sent"),
        ({"verify": True}, "say how SOURCE is sent"),
        ({"source": "run"}, "run alone"),
        ({"source": "s3://b/run"}, "s3://b/run alone"),
        ({"source": "run", "target": "copy"}, "two local paths"),
        ({"source": "run", "target": "s3://b/x", "watch_seconds": 3.0}, "--watch-seconds is of --watch: add"),
        ({"source": "s3://b/x", "target": "s3://b/y"}, "two URLs"),
        ({"source": "s3://b/x", "target": "y", "watch": True}, "--watch goes with DIRECTORY URL"),
        ({"source": "s3://b/x", "verify": True, "replace": True}, "changes nothing: leave out"),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(**flags)  # type: ignore[arg-type]


INPUTS = {
    *("corpus", "general", "keys", "raw_keys", "index", "targets", "model", "input_model", "memory", "gate"),
    *("report", "choices_from", "checkpoint", "control", "ensemble", "init_from", "match_memory", "passages"),
}
OTHERS = {  # files, numbers, and words
    *(("import-datastore", "targets"), ("import-datastore", "model"), ("plan", "model")),
    *(("train", "control"), ("view-report", "passages")),
}


def test_every_flag_for_an_input_directory_takes_a_url() -> None:
    missing = []
    for name, command in commands.COMMANDS.items():
        if isinstance(command, commands.Command):
            for field in dataclasses.fields(commands._load(command.config)):
                is_input = field.name in INPUTS and (name, field.name) not in OTHERS
                if is_input and not field.metadata["by_url"]:
                    missing.append(f"{name} {flag_of(field)}")
    assert missing == []
