"""Which tokens of a conversation are answers: by the marks of a template, and by its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
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
