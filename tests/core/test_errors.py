"""A package that is missing is named with what needs it, the reason and the remedy."""

import pytest

from mlpmem_ds.core.errors import UserError, package_for


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(UserError) as raised, package_for("--kind x", "absent", "pip install absent"):
        raise ImportError("No module named 'absent'")
    said = "--kind x needs the package absent (No module named 'absent'): pip install absent"
    assert str(raised.value) == said


def test_other_errors_inside_go_through() -> None:
    with pytest.raises(ZeroDivisionError), package_for("--kind x", "absent", "pip install absent"):
        raise ZeroDivisionError
