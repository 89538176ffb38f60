import errno
from dataclasses import dataclass

import pytest

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.front_end import keep_bars_to_terminals, run_front_end
from mlpmem_ds.core.world import World


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    number: int = option("a number", 1)


def run_with(error: BaseException | None, *words: str) -> int:
    def run(config: Config, world: World) -> None:
        if error is not None:
            raise error

    return run_front_end(Config, run, argv=list(words))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("use --other"), 2, "error: use --other"),
        (DamagedDataError("file x"), 2, "file x"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "free some space"),
        (KeyboardInterrupt(), 130, "continues where it was"),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(error) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "i/o"), AssertionError()])
def test_our_own_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_with(error)


def test_the_deepspeed_launchers_flag_is_ignored() -> None:
    assert run_with(None, "--local_rank=1", "--number", "2") == 0


def test_libraries_draw_their_bars_on_terminals_only() -> None:
    on_terminal: dict[str, str] = {}
    in_log: dict[str, str] = {}
    asked_for = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    keep_bars_to_terminals(on_terminal, is_terminal=True)
    keep_bars_to_terminals(in_log, is_terminal=False)
    keep_bars_to_terminals(asked_for, is_terminal=False)
    assert (on_terminal, in_log) == ({}, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    assert asked_for == {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
