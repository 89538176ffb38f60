"""Caches move to a temporary directory where the home directory is read-only; the user's choice stands."""

import os
from pathlib import Path

import pytest

from mlpmem_ds.core.caches import move_caches

NAMES = {"HF_MODULES_CACHE", "TRITON_CACHE_DIR", "MPLCONFIGDIR"}


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that only looks read-only: the super-user may write anywhere."""
    home, real = tmp_path / "home", os.access
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))

    def access(path: object, mode: int) -> bool:
        return not str(path).startswith(str(home)) and real(str(path), mode)

    monkeypatch.setattr(os, "access", access)
    return home


def test_nothing_moves_from_a_home_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "not made yet"))
    environment: dict[str, str] = {}
    move_caches(environment)
    assert environment == {} and list(tmp_path.iterdir()) == []


def test_caches_leave_a_read_only_home(read_only: Path, tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": "/mine", "HF_HOME": str(tmp_path / "hub")}
    move_caches(environment)
    assert environment.keys() == {"TRITON_CACHE_DIR", "HF_HOME", "MPLCONFIGDIR"}
    assert environment["TRITON_CACHE_DIR"] == "/mine"
    environment = {}
    move_caches(environment)
    assert environment.keys() == NAMES
    assert not any(place.startswith(str(read_only)) for place in environment.values())


def test_without_a_temporary_directory_all_stays(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    environment: dict[str, str] = {}
    move_caches(environment)
    assert environment == {}
