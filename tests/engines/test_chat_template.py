"""Which tokens of a conversation are answers: by the marks of a template, and by its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.engines.chat_template import ChatEncoder, chat_template_of, open_chat_encoder
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.chats import Conversation

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
LLAMA = (  # strips contents, a space before them, the begin token at the front
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    " {{ message.content | trim }}{{ eos_token }}{% else %}[INST] {{ message.content | trim }} [/INST]"
    "{% endif %}{% endfor %}"
)
CHAT = (
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "é, 東: it is here."},
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is.\n"},
)


REASONING = CHATML.replace(  # as Qwen3's: empty thoughts too, if the turn is the last one
    "{{ message.content }}",
    "{% if message.role == 'assistant' and (message.reasoning_content or loop.last) %}<think>"
    "{{ message.reasoning_content }}</think>\n\n{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}",
)
STRICT = REASONING.replace(  # as Mistral's: what the assistant says twice in a row is refused
    "{% for message in messages %}",
    "{% for message in messages %}{% if not loop.first and not message.tool_calls and"
    " message.role == messages[loop.index0 - 1].role %}{{ raise_exception('twice') }}{% endif %}",
    1,
)
CALLS = [{"type": "function", "function": {"name": "sum", "arguments": {"of": [2, 2]}}}]
WRITTEN_CALL = '<tool_call>{"name": "sum", "arguments": {"of": [2, 2]}}</tool_call>'


@pytest.fixture
def chat_tokenizer(corpus_dir: Path, tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def opened(folder: Path, template: str) -> ChatEncoder:
    path = folder / "given.jinja"
    path.write_text(template)
    encoder = open_encoder(load_tokenizer(str(folder)), label=f"--tokenizer {folder}", special_tokens="parse")
    return open_chat_encoder(encoder, path)


def answers_of(chats: ChatEncoder, messages: tuple[Any, ...] = CHAT) -> tuple[list[str], str]:
    """The runs of answer tokens, and the whole document, as text."""
    (document,) = chats.encode_documents([Conversation(messages=messages).to_text()])
    tokenizer, runs, run = chats.encoder.tokenizer, [], []
    assert document.is_answer_n is not None and len(document.is_answer_n) == len(document.ids)
    for number, is_answer in zip([*document.ids.tolist(), 0], [*document.is_answer_n, False], strict=True):
        if is_answer:
            run.append(number)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs, tokenizer.decode(document.ids)


def test_answers_are_what_the_assistant_says_and_the_end_of_its_turn(chat_tokenizer: Path) -> None:
    runs, text = answers_of(opened(chat_tokenizer, CHATML))
    assert runs == ["é, 東: it is here.<|im_end|>", "It is.\n<|im_end|>"]
    assert text.startswith("<|im_start|>user\nWhere is it?<|im_end|>") and text.endswith(
        "<|im_end|>\n<|endoftext|>"
    )


def test_marks_of_a_template_say_the_same(chat_tokenizer: Path) -> None:
    assert opened(chat_tokenizer, MARKED).marks_answers
    marked, text = answers_of(opened(chat_tokenizer, MARKED))
    assert (marked, text) == answers_of(opened(chat_tokenizer, CHATML))


def test_templates_that_trim_and_begin_with_a_token(chat_tokenizer: Path) -> None:
    runs, text = answers_of(opened(chat_tokenizer, LLAMA))
    assert [run.strip() for run in runs] == ["é, 東: it is here.<|endoftext|>", "It is.<|endoftext|>"]
    assert text.count("<|endoftext|>") == 3, "one before the text, one for each answer, none after the last"


def test_bytes_are_of_the_text_and_of_the_answers(chat_tokenizer: Path) -> None:
    chats = opened(chat_tokenizer, CHATML)
    (document,) = chats.encode_documents([Conversation(messages=CHAT).to_text()])
    assert document.num_answer_bytes == sum(len(turn["content"].encode()) for turn in CHAT[1::2])
    assert document.num_bytes == len(chats.render(Conversation(messages=CHAT), "x").text.encode())


def test_an_empty_answer_among_others_has_no_tokens(chat_tokenizer: Path) -> None:
    messages = (CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:])
    runs, _ = answers_of(opened(chat_tokenizer, CHATML), messages)
    assert runs == ["It is.\n<|im_end|>"]


def ask(*answers: dict[str, Any]) -> tuple[Any, ...]:
    return ({"role": "user", "content": "2 + 2?"}, *({"role": "assistant"} | answer for answer in answers))


@pytest.mark.parametrize(
    ("answer", "run"),
    [
        ({"content": "4", "reasoning_content": "is 4"}, "<think>is 4</think>\n\n4<|im_end|>"),
        ({"content": "4\n", "reasoning_content": "4, or 4"}, "<think>4, or 4</think>\n\n4\n<|im_end|>"),
        ({"content": "think"}, "<think></think>\n\nthink<|im_end|>"),
        ({"content": "im_end", "reasoning_content": "im_end"}, "<think>im_end</think>\n\nim_end<|im_end|>"),
    ],
)
def test_an_answer_ends_behind_what_is_said_not_in_the_reasoning(
    chat_tokenizer: Path, answer: dict[str, Any], run: str
) -> None:
    chats = opened(chat_tokenizer, REASONING)
    assert answers_of(chats, ask(answer))[0] == [run]
    (document,) = chats.encode_documents([Conversation(messages=ask(answer)).to_text()])
    if "reasoning_content" in answer:
        assert document.num_answer_bytes == len(run.removesuffix("<|im_end|>"))


def test_reasoning_that_a_template_leaves_out_is_not_looked_for(chat_tokenizer: Path) -> None:
    answer = {"content": "4", "reasoning_content": "4"}
    for private in ("", "\ue000"):  # what a text holds is not taken for the place of another answer
        question = {"role": "user", "content": f"4?{private}"}
        messages = (*ask(answer), question, {"role": "assistant", "content": "Yes."})
        runs, _ = answers_of(opened(chat_tokenizer, CHATML), messages)
        assert runs == ["4<|im_end|>", "Yes.<|im_end|>"]


def test_how_answers_are_found_is_part_of_the_hash_where_a_template_marks_none(chat_tokenizer: Path) -> None:
    assert opened(chat_tokenizer, MARKED).sha256 == content_hash(MARKED)
    assert opened(chat_tokenizer, CHATML).sha256 != content_hash(CHATML)


@pytest.mark.parametrize("template", [REASONING, STRICT])
@pytest.mark.parametrize("said", ["", "I add."])
def test_calls_of_tools_are_answers(chat_tokenizer: Path, template: str, said: str) -> None:
    chats = opened(chat_tokenizer, template)
    call = {"content": said, "tool_calls": CALLS, "reasoning_content": "hm"}
    first = f"<think>hm</think>\n\n{said}{WRITTEN_CALL}<|im_end|>"
    assert answers_of(chats, ask(call))[0] == [first]
    later = ({"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."})
    last = "<think></think>\n\nIt is 4.<|im_end|>"
    assert answers_of(chats, (*ask(call), *later))[0] == [first, last]


def test_calls_of_tools_end_where_another_answer_would(chat_tokenizer: Path) -> None:
    """A template that writes a turn in another way if it is the last one."""
    messages = (
        *ask({"content": "", "tool_calls": CALLS}),
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    )
    runs, _ = answers_of(opened(chat_tokenizer, REASONING), messages)
    assert runs == [f"{WRITTEN_CALL}<|im_end|>", "<think></think>\n\nIt is 4.<|im_end|>"]
    with pytest.raises(UserError, match="message 2 calls tools, and where that ends .* cannot be seen"):
        odd = REASONING.replace("</tool_call>", "</tool_call>{% if not loop.last %}!{% endif %}")
        odd = odd.replace("<|im_end|>\n", "{{ '<|eom|>' if message.tool_calls else '<|im_end|>\n' }}")
        answers_of(opened(chat_tokenizer, odd), messages)


def test_calls_that_a_template_does_not_write_are_no_answer(chat_tokenizer: Path) -> None:
    chats = opened(chat_tokenizer, CHATML)
    call = {"content": "", "tool_calls": CALLS}
    with pytest.raises(UserError, match="writes nothing of what the assistant says"):
        answers_of(chats, ask(call))
    later = ({"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."})
    assert answers_of(chats, (*ask(call), *later))[0] == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("{% if add", "Go on.{% if add"), "writes the turns before message 2 in another way"),
        (CHATML.replace("message.content", "message.content | upper"), "message 2 is not as it is in what"),
        ("{{ raise_exception('no such roles') }}", "refuses this conversation .*no such roles"),
        ("{% for %}", "refuses this conversation"),
        (MARKED.replace("'assistant'", "'gpt'"), "marks nothing of it"),
    ],
)
def test_a_template_that_does_not_show_its_answers_is_refused(
    chat_tokenizer: Path, template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(chat_tokenizer, template)


def test_what_cannot_render_is_refused(chat_tokenizer: Path, tmp_path: Path) -> None:
    encoder = open_encoder(load_tokenizer(str(chat_tokenizer)), label="--tokenizer x", special_tokens="parse")
    with pytest.raises(UserError, match="--tokenizer x has no chat template: give one with --chat-template"):
        open_chat_encoder(encoder, None)
    with pytest.raises(UserError, match="--chat-template .* cannot be read"):
        open_chat_encoder(encoder, tmp_path / "none.jinja")
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"--chat-template .*latin.jinja cannot be read \(it is not UTF-8"):
        chat_template_of(encoder, tmp_path / "latin.jinja")
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(UserError, match="empty.jinja is empty: give a file with a template of Jinja"):
        chat_template_of(encoder, tmp_path / "empty.jinja")


def test_a_byte_order_mark_is_no_part_of_a_template(chat_tokenizer: Path, tmp_path: Path) -> None:
    encoder = open_encoder(load_tokenizer(str(chat_tokenizer)), label="--tokenizer x", special_tokens="parse")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "own.jinja").write_text(CHATML, encoding=encoding)
        assert chat_template_of(encoder, tmp_path / "own.jinja") == CHATML


def test_a_prompt_ends_where_the_answer_begins(chat_tokenizer: Path) -> None:
    for template, name in ((CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (LLAMA, "<|endoftext|>")):
        chats = opened(chat_tokenizer, template)
        tokenizer = chats.encoder.tokenizer
        asked = Conversation(messages=CHAT[:3])
        assert chats.render_prompt(asked, "one") == tokenizer.apply_chat_template(
            list(asked.messages), tokenize=False, add_generation_prompt=True
        )
        assert chats.end_of_answer == tokenizer.convert_tokens_to_ids(name)
    strict = opened(
        chat_tokenizer, CHATML + "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"one: the chat template .* refuses this conversation \(no\)"):
        strict.render_prompt(Conversation(messages=({"role": "tool", "content": "x"},)), "one")
