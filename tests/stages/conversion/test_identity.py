"""When an export is the one that the flags ask for."""

from __future__ import annotations

from typing import Any

from mlpmem_ds.stages.conversion.identity import differences_of, is_card_known


def identity(*, base: str = "11", card: Any = (), **inputs: str) -> dict[str, Any]:
    """`card` (): that of the base says nothing."""
    config = {"lambda": 0.25, "dtype": "float32", **({} if card == () else {"base_card": card})}
    return {
        "format": "mlpmem-export",
        "version": 1,
        "inputs": {"memory": "22", "base": base, **inputs},
        "config": config,
    }


MIT, APACHE = {"license": "mit", "language": ("en",)}, {"license": "apache-2.0"}


def test_the_card_counts_where_it_was_read_both_times() -> None:
    for old, new in ((MIT, MIT), (MIT, None), (None, MIT), (None, None), ((), None), (None, ()), ((), ())):
        assert differences_of(identity(card=old), identity(card=new)) == []
    assert differences_of(identity(card={"license": "mit", "language": ["en"]}), identity(card=MIT)) == []
    for old, new in ((MIT, APACHE), ((), MIT), (MIT, ())):
        [words] = differences_of(identity(card=old), identity(card=new))
        assert words.startswith("config was") and "base_card" in words
    assert [is_card_known(identity(card=card)) for card in (MIT, (), None)] == [True, True, False]


def test_all_else_counts_in_any_case() -> None:
    for card in (MIT, None):
        [words] = differences_of(identity(base="33", card=None), identity(card=card))
        assert words.startswith("inputs was") and "'33'" in words
    another = {**identity(card=None), "version": 2}
    assert differences_of(another, identity(card=MIT)) == ["version was 2, now 1"]
    assert len(differences_of({}, identity())) == len(differences_of(None, identity())) == 4


def test_a_file_of_the_base_that_only_one_run_found_is_explained() -> None:
    inputs, why = differences_of(identity(), identity(generation_config="44"))
    assert inputs.startswith("inputs was") and "without the network" in why
    [words] = differences_of(identity(generation_config="44"), identity(generation_config="55"))
    assert "without the network" not in words
