"""Conversations → ids and which of them are answers, or prompts, by the tokenizer's chat template.

An *answer token* is one that the model generates in use: of what the assistant thinks, says and calls, from
the place where a prompt would end on, to the special token that ends the turn. A template says it itself by
`{% generation %}`. Else the turns before an answer are rendered as a prompt (`add_generation_prompt`): where
the whole conversation begins so, the answer begins behind it. A template with which it is not so is refused.

n tokens of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.engines.tokenizer import EncodedDocument, TextEncoder
from mlpmem_ds.formats.chats import ANSWERS, Conversation, Message, says_something
from mlpmem_ds.formats.text_encoding import NotTextError, decode_text

Span: TypeAlias = tuple[int, int]
"""characters [start, stop)"""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_TEXTS = tuple(map(chr, range(0xE000, 0xE800)))  # private characters: most texts hold none
_FINDING = 2  # of answers in texts of templates without marks: raised where other tokens would count
_WRITTEN_BY_TEMPLATE = ("reasoning_content", "tool_calls")  # of a message, in the template's own words
_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": ANSWERS, "content": "b"}]


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as text, and which characters of it are answers."""

    text: str
    answers: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Conversations → documents; `open_chat_encoder` makes one.

    `encoder` parses special tokens, because templates are written with them. `template` is of Jinja.
    """

    encoder: TextEncoder
    template: str

    @property
    def label(self) -> str:
        return self.encoder.label

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    @property
    def marks_answers(self) -> bool:
        """Whether the template says what the answers are."""
        return bool(_MARKS.search(self.template))

    @property
    def sha256(self) -> str:
        """Of what decides the texts and which of their tokens are answers, next to the tokenizer."""
        return content_hash(self.template if self.marks_answers else [self.template, _FINDING])

    def encode_documents(
        self, texts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[EncodedDocument]:
        """Each conversation, as `Conversation.to_text` gives it, as a document with its answers.

        Raises:
            UserError: the template refuses it, or does not show where its answers are.
        """
        labels = [f"conversation {at + 1}" for at in range(len(texts))] if names is None else names
        conversations = [Conversation.from_text(text) for text in texts]
        chats = [self.render(one, label) for one, label in zip(conversations, labels, strict=True)]
        written = [chat.text for chat in chats]
        encoded = self.encoder.encode_documents(written, names)
        spans = self.encoder.tokenizer(
            written, add_special_tokens=False, truncation=False, padding=False, verbose=False,
            return_offsets_mapping=True, return_attention_mask=False,
        )  # fmt: skip
        documents = []
        for number, (chat, document) in enumerate(zip(chats, encoded, strict=True)):
            first = self._first_of(document.ids, spans["input_ids"][number], labels[number])
            is_answer_n = np.zeros(len(document.ids), bool)
            offsets_n2 = np.asarray(spans["offset_mapping"][number], np.int64).reshape(-1, 2)
            for start, stop in chat.answers:
                inside_n = (offsets_n2[:, 0] < stop) & (offsets_n2[:, 1] > start)
                is_answer_n[first : first + len(offsets_n2)] |= inside_n
            is_answer_n[:1] = False  # no position has the first token of a stream as its value
            documents.append(
                document._replace(
                    is_answer_n=is_answer_n,
                    num_bytes=len(chat.text.encode()),
                    num_answer_bytes=self._num_answer_bytes(chat, conversations[number]),
                )
            )
        return documents

    def _num_answer_bytes(self, chat: RenderedChat, conversation: Conversation) -> int:
        """UTF-8 bytes of what the assistant says; with its reasoning and calls, as they are written."""
        answers = conversation.answers
        if any(message.get(name) for message in conversation.messages for name in _WRITTEN_BY_TEMPLATE):
            answers = [self._special.sub("", chat.text[start:stop]) for start, stop in chat.answers]
        return sum(len(answer.encode()) for answer in answers)

    def _first_of(self, ids_n: np.ndarray, own: Sequence[int], name: str) -> int:
        """Where in a document its text begins, of which the tokenizer gives `own` ids."""
        for first in (0, len(self.encoder.begin_ids)):
            if np.array_equal(ids_n[first : first + len(own)], own):
                return first
        raise UserError(
            f"{name}: {self.encoder.label} gives other tokens with their places than without, so that its"
            " answers cannot be found: use a tokenizer that is saved as a tokenizer.json"
        )

    def render(self, conversation: Conversation, name: str) -> RenderedChat:
        """The text of a conversation, and its answers.

        Raises:
            UserError: as `encode_documents`.
        """
        try:
            if self.marks_answers:
                texts, spans = self._render(conversation.messages, conversation, with_marks=True)
                if not spans[0]:
                    raise ValueError("it marks nothing of it by {% generation %}")
                return RenderedChat(text=texts[0], answers=tuple(spans[0]))
            text = self._render(conversation.messages, conversation)[0][0]
            return RenderedChat(text=text, answers=tuple(self._answers(text, conversation)))
        except UserError:
            raise
        except Exception as error:  # templates raise what they like, such as for roles that do not alternate
            raise self._refusal(name, error) from error

    def render_prompt(self, conversation: Conversation, name: str) -> str:
        """The text of a conversation up to where the assistant's answer begins.

        Raises:
            UserError: the template refuses it.
        """
        try:
            messages = conversation.messages
            return self._render(messages, conversation, add_generation_prompt=True)[0][0]
        except Exception as error:
            raise self._refusal(name, error) from error

    @cached_property
    def end_of_answer(self) -> int | None:
        """The special token that the template puts after an answer; None where it puts none."""
        try:
            chat = self.render(Conversation(messages=tuple(_PROBE)), "a question and its answer")
        except UserError:  # where its answers end cannot be seen
            return None
        start, stop = chat.answers[-1]
        ids = self.encoder.encode([chat.text[start:stop]])[0].ids
        return ids[-1] if ids and ids[-1] in self.encoder.special_ids else None

    def _refusal(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{name}: the chat template of {self.encoder.label} refuses this conversation"
            f" ({first_line(error)}): leave it out, or give another --chat-template"
        )

    def _answers(self, text: str, conversation: Conversation) -> list[Span]:
        """The spans of the assistant's turns, by rendering the turns before each as a prompt.

        Raises:
            ValueError: a prompt is not how the text begins, or an answer is not in it.
        """
        messages = conversation.messages
        turns = [at for at, message in enumerate(messages) if message["role"] == ANSWERS]
        starts = []
        for turn in turns:
            prompt = self._render(messages[:turn], conversation, add_generation_prompt=True)[0][0]
            if not text.startswith(prompt):
                raise ValueError(
                    f"it writes the turns before message {turn + 1} in another way when it is asked for an"
                    " answer, so that answers cannot be told apart; one with {% generation %} says itself"
                    " where they are"
                )
            starts.append(len(prompt))
        spans = []
        for turn, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
            if not says_something(messages[turn]):
                continue
            stop = self._stop(text, conversation, turn, (start, limit))
            if self._special.sub("", text[start:stop]).strip():
                spans.append((start, stop))
        if not spans and conversation.has_answer:
            raise ValueError("it writes nothing of what the assistant says")
        return spans

    def _stop(self, text: str, conversation: Conversation, turn: int, within: Span) -> int:
        """Where the assistant's turn `turn` ends, with the special token that ends it.

        Raises:
            ValueError: what it says is not in the text, or where the turn ends cannot be seen.
        """
        start, limit = within
        message = conversation.messages[turn]
        content: str = message["content"].strip()
        at = text.find(content, start, limit)
        if at >= 0 and message.get("tool_calls"):
            return self._end_of_calls(text, conversation, turn, within)
        if at >= 0 and text.find(content, at + 1, limit) < 0:
            stop = at + len(content)
            space = message["content"][len(message["content"].rstrip()) :]  # which most templates keep
            return self._end_of_turn(text, stop + len(space) * text.startswith(space, stop), limit)
        # Also in its reasoning, in the template's own words or in the next question.
        end = None if at < 0 else self._end_as_another(text, conversation, turn)
        if end is None:
            raise ValueError(
                f"message {turn + 1} is not as it is in what it writes; one with {{% generation %}} says"
                " itself where answers are"
            )
        return self._end_of_turn(text, end, limit)

    def _end_of_calls(self, text: str, conversation: Conversation, turn: int, within: Span) -> int:
        """Where a turn with calls of tools ends: by the text up to it, else as another turn there would."""
        start, limit = within
        written = self._render(conversation.messages[: turn + 1], conversation)[0][0]
        if text.startswith(written):
            ends = [found.end() for found in self._special.finditer(text, start, len(written))]
            return ends[-1] if ends else len(written.rstrip())
        stop = self._end_as_another(text, conversation, turn)
        if stop is None:  # such as where only the last turn is written with its reasoning
            raise ValueError(
                f"message {turn + 1} calls tools, and where that ends in what it writes cannot be seen; one"
                " with {% generation %} says itself where answers are"
            )
        return self._end_of_turn(text, stop, limit)

    def _end_as_another(self, text: str, conversation: Conversation, turn: int) -> int | None:
        """Where a turn's own words end: all behind them is as behind another text; None where it is not."""
        other = next((character for character in _OTHER_TEXTS if character not in text), None)
        if other is None:
            return None
        messages = list(conversation.messages)
        messages[turn] = {
            **{name: value for name, value in messages[turn].items() if name != "tool_calls"},
            "content": other,
        }
        after = self._render(messages, conversation)[0][0].rpartition(other)[2]
        return len(text) - len(after) if text.endswith(after) else None

    def _end_of_turn(self, text: str, stop: int, limit: int) -> int:
        """Where an answer ends: behind the special token that follows what it says, if one does."""
        found = self._special.match(text, stop, limit)
        return stop if found is None else found.end()

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokenizer = self.encoder.tokenizer
        words = {str(token) for token in tokenizer.all_special_tokens}
        words |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        return re.compile(f" ?(?:{'|'.join(map(re.escape, longest_first))})")

    def _render(
        self,
        messages: Sequence[Message],
        conversation: Conversation,
        *,
        add_generation_prompt: bool = False,
        with_marks: bool = False,
    ) -> tuple[list[str], list[list[Span]]]:
        special: Mapping[str, Any] = self.encoder.tokenizer.special_tokens_map
        result: tuple[list[str], list[list[Span]]] = render_jinja_template(  # type: ignore[assignment]
            conversations=[list(messages)],
            tools=list(conversation.tools) or None,
            chat_template=self.template,
            return_assistant_tokens_mask=with_marks,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
        return result


def open_chat_encoder(encoder: TextEncoder, template: Path | None) -> ChatEncoder:
    """The encoder of conversations.

    Args:
        encoder: of texts, which parses special tokens.
        template: a file with a template of Jinja; None: the tokenizer's own.

    Raises:
        UserError: there is no template, it cannot be used, or the tokenizer does not say where tokens are.
    """
    label, tokenizer = encoder.label, encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{label} is written in Python and does not say where in a text its tokens are, so that answers"
            " cannot be found: save it elsewhere as a tokenizer.json and give that directory"
        )
    source = chat_template_of(encoder, template)
    chats = ChatEncoder(encoder=encoder, template=source)
    chats.render(Conversation(messages=tuple(_PROBE)), "a question and its answer")
    tokenizer.chat_template = source  # the corpus keeps it with its tokenizer
    return chats


def chat_template_of(encoder: TextEncoder, template: Path | None) -> str:
    """The source of a template: of the file, else the tokenizer's own.

    Raises:
        UserError: there is none, or the file is no text.
    """
    if template is not None:
        try:
            source = decode_text(template.read_bytes())
        except (OSError, NotTextError) as error:
            raise UserError(f"--chat-template {template} cannot be read ({first_line(error)})") from error
        if not source.strip():
            raise UserError(f"--chat-template {template} is empty: give a file with a template of Jinja")
        return source
    try:
        own: str = encoder.tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"{encoder.label} has no chat template: give one with --chat-template FILE, such as the"
            " chat_template.jinja of a model that was trained on chats"
        ) from error
    return own
