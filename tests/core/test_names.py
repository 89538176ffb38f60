import os

from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.names import read_name, spell_name


@given(st.binary(max_size=40))
def test_every_name_of_bytes_is_spelled_in_utf8_and_read_back(name: bytes) -> None:
    decoded = os.fsdecode(name)
    spelled = spell_name(decoded)
    spelled.encode("utf-8")
    assert os.fsencode(read_name(spelled)) == name


@given(
    st.text(st.characters(blacklist_categories=[]) | st.sampled_from("\\xu05cde\ud83d\udce9"), max_size=12)
)
def test_every_text_is_spelled_in_utf8_and_read_back(name: str) -> None:
    spelled = spell_name(name)
    spelled.encode("utf-8")
    assert read_name(spelled) == name


def test_a_name_that_can_be_written_stays_as_it_is() -> None:
    assert spell_name("caf\udce9.txt") == r"caf\xe9.txt"
    assert spell_name(r"caf\xe9.txt") == r"caf\x5cxe9.txt"
    for name in ("a/b c.txt", "ä\u2028\n'", r"C:\temp\x.txt", "😀"):
        assert spell_name(name) == name
