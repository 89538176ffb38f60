"""Conversations in the forms that data sets have, and what is said of those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.chats import Conversation, NoConversationError, chat_record, conversation_of
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}
RULES = ReadRules(chats=True)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER]), "id": 3},
        {"messages": [{"role": "Human", "content": [{"type": "text", "text": "Why"}, "?"]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversation": [{"from": "user", "value": "Why?"}, {"from": "model", "value": "So."}]},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "Why?", "response": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"instruction": "Why?", "context": None, "response": "So."},
    ],
)
def test_each_form_is_one_conversation(values: dict[str, Any]) -> None:
    conversation = conversation_of(values)
    assert conversation == Conversation(messages=(QUESTION, ANSWER))
    assert conversation.answers == ["So."]
    assert Conversation.from_text(conversation.to_text()) == conversation


def test_system_tools_and_inputs_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    values = {"system": "Be kind.", "messages": [QUESTION, call], "tools": [{"name": "f"}]}
    conversation = conversation_of(values)
    assert conversation.messages[0] == {"role": "system", "content": "Be kind."}
    assert conversation.messages[2]["tool_calls"] == call["tool_calls"]
    assert conversation.tools == ({"name": "f"},)
    asked = conversation_of({"instruction": "Add.", "input": "1 2", "output": "3"}).messages[0]
    assert asked == {"role": "user", "content": "Add.\n\n1 2"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "a"}, "it has the fields text; needed are messages, conversations, prompt and completion"),
        ({"messages": "a"}, "its messages is str, not a list"),
        ({"messages": ["a"]}, "message 1 of its messages is str, not an object"),
        ({"messages": [QUESTION, {"role": "judge", "content": "a"}]}, "message 2 .* the role 'judge'; these"),
        ({"messages": [{"content": "a"}]}, "has the role None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, "a content is int, not text"),
        ({"prompt": "a"}, "needed are"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(values: Any, message: str) -> None:
    with pytest.raises(NoConversationError, match=message):
        conversation_of(values)
    with pytest.raises(UserError, match=f"x.jsonl line 7 is no conversation: .*{message}"):
        chat_record(Path("x.jsonl"), "line 7", "7", values, None)


def test_a_conversation_without_an_answer_is_left_out() -> None:
    for messages in ([QUESTION], [QUESTION, {"role": "assistant", "content": " \n"}], []):
        found = chat_record(Path("x"), "line 1", "1", {"messages": messages}, None)
        assert found == Omission(name="1", reason="no answer")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}
    assert isinstance(chat_record(Path("x"), "line 1", "1", {"messages": [QUESTION, call]}, None), Record)
    values = {"messages": [QUESTION, ANSWER], "from_whom": "me"}
    record = chat_record(Path("x"), "line 1", "1", values, "from_whom")
    assert isinstance(record, Record) and record.group == "me"
    with pytest.raises(UserError, match="no field 'who'"):
        chat_record(Path("x"), "line 1", "1", values, "who")


def test_files_of_conversations_are_read_and_others_are_told(tmp_path: Path) -> None:
    lines = [{"messages": [QUESTION, ANSWER]}, {"prompt": "a", "completion": "b"}, {"messages": [QUESTION]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("a text")
    found = [
        document for file in find_files([str(tmp_path)], None, ()).files
        for document in read_documents(file, RULES)
    ]  # fmt: skip
    assert [one.name for one in found if isinstance(one, Document)] == ["a.jsonl:1", "a.jsonl:2"]
    assert [(one.name, one.reason) for one in found if isinstance(one, Omission)] == [
        ("a.jsonl:3", "no answer"),
        ("b.txt", "no conversations"),
    ]
    (named,) = find_files([str(tmp_path / "b.txt")], None, ()).files
    with pytest.raises(UserError, match="cannot hold conversations"):
        list(read_documents(named, RULES))


def test_tables_of_conversations_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    feather = pytest.importorskip("pyarrow.feather")
    rows = [{"messages": [QUESTION, ANSWER], "topic": {"name": "why"}, "score": 1.5}] * 300
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "b.feather")
    for file in find_files([str(tmp_path)], None, ()).files:
        found = list(read_documents(file, ReadRules(chats=True, group_field="topic.name")))
        assert len(found) == 300 and {one.group for one in found if isinstance(one, Document)} == {"why"}
        texts = {one.text for one in found if isinstance(one, Document)}
        assert texts == {Conversation(messages=(QUESTION, ANSWER)).to_text()}
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
    (other,) = find_files([str(tmp_path / "c.parquet")], None, ()).files
    with pytest.raises(UserError, match="has no column of a conversation, such as messages"):
        list(read_documents(other, RULES))
