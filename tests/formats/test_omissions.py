from typing import get_args

from mlpmem_ds.formats.omissions import (
    REASONS,
    MergedOmissions,
    Omission,
    ReasonName,
    count_by_reason,
    describe_omissions,
)


def test_every_reason_has_words_and_what_loses_text_a_remedy() -> None:
    assert set(get_args(ReasonName)) == set(REASONS)
    for reason in REASONS.values():
        assert reason.words and (reason.remedy or not reason.loses_text)


def test_omissions_of_a_file_are_merged_by_reason_and_detail() -> None:
    merged = MergedOmissions()
    for number in range(1000):
        merged.add(Omission(name=f"x.tar:{number}", reason="not text", detail=".jpg"))
        merged.add(Omission(name=f"x.tar:{number}", reason="empty"))
    assert merged.all() == [
        Omission(name="x.tar:0", reason="not text", detail=".jpg", count=1000),
        Omission(name="x.tar:0", reason="empty", count=1000),
    ]
    assert count_by_reason(merged.all()) == {"empty": 1000, "not text": 1000}


def test_a_line_names_the_first_and_the_remedy() -> None:
    omissions = [Omission(name=f"{letter}.txt", reason="encoding") for letter in "abcd"]
    omissions.append(Omission(name="bad\nname\x1b[2J", reason="broken link"))
    encoding, link = describe_omissions(omissions)
    assert encoding.startswith(
        "files that are not text in UTF-8, or in the --encoding that was given: 4 (a.txt, b.txt, c.txt, …);"
    )
    assert r"(bad\nname\x1b[2J)" in link
    assert describe_omissions([]) == []


def test_an_omission_survives_json() -> None:
    omission = Omission(name="a", reason="empty", detail="d", count=3)
    assert Omission.from_json(omission.to_json()) == omission
