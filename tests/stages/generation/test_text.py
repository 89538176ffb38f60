"""The text of new tokens: in pieces as whole, with its spaces, its characters and its control tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlpmem_ds.stages.generation.text import GrowingText, Writer, side_by_side, text_after

TEXT = [
    "the quick brown fox!",
    "naïve 日本語 text 🙂🙃 end",
    "a\n    indented\n\n  line ",
    "ünïcode . , ! it 's",
]


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that a character is spread over up to four; "!" is marked special, as some do."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, show_progress=False, initial_alphabet=alphabet, special_tokens=["<e>"]
    )
    words.train_from_iterator(["the quick brown fox " * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<e>", pad_token="!", clean_up_tokenization_spaces=True
    )


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece: the first space of a text is not decoded, and unknown characters are bytes."""
    entries = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    entries += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁quick"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    entries += ["▁t", "▁th"]
    words = Tokenizer(
        models.BPE(
            vocab={entry: number for number, entry in enumerate(entries)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.add_special_tokens([AddedToken("<s>")])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


VOCABULARIES = [byte_level(), metaspace()]


@pytest.mark.parametrize("tokenizer", VOCABULARIES)
@pytest.mark.parametrize("text", TEXT)
def test_every_cut_of_a_text_gives_the_rest_of_it(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):
        growing = GrowingText(tokenizer, ids[:cut])
        pieces = [*map(growing.add, ids[cut:]), growing.finish()]
        before = tokenizer.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")  # cut within a character
        assert "".join(pieces) == text_after(tokenizer, ids[:cut], ids[cut:]) == text[len(before) :]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_space_between_prompt_and_continuation_is_kept() -> None:
    tokenizer = metaspace()
    prompt, new = tokenizer("quick")["input_ids"], [tokenizer.convert_tokens_to_ids("▁the")]
    assert tokenizer.decode(new) == "the"
    assert text_after(tokenizer, prompt, new) == " the"


def test_characters_that_never_end_are_given_at_the_end() -> None:
    tokenizer = byte_level()
    half = tokenizer("日", add_special_tokens=False)["input_ids"][:2]
    growing = GrowingText(tokenizer, tokenizer("a")["input_ids"])
    assert [*map(growing.add, half)] == ["", ""]
    assert growing.finish() == "\N{REPLACEMENT CHARACTER}" and growing.finish() == ""


def test_a_prompt_that_ends_with_a_replacement_character_keeps_it() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a\N{REPLACEMENT CHARACTER} fox", add_special_tokens=False)["input_ids"]
    cut = len(tokenizer("a\N{REPLACEMENT CHARACTER}", add_special_tokens=False)["input_ids"])
    assert text_after(tokenizer, ids[:cut], ids[cut:]) == " fox"


def test_a_stream_ends_before_the_end_token_and_shows_control_tokens() -> None:
    tokenizer = byte_level()
    prompt = tokenizer("the ", add_special_tokens=False)["input_ids"]
    new = tokenizer("é!", add_special_tokens=False)["input_ids"]
    end, control = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("!")
    pieces: list[str] = []
    writer = Writer(tokenizer, prompt, [end], pieces.append)
    writer.put(torch.tensor([prompt]))
    for token in [*new, control, end, control]:
        writer.put(torch.tensor([token]))
    writer.end()
    assert "".join(pieces) == "é!!" == text_after(tokenizer, prompt, [*new, control])


def test_columns_keep_line_ends_and_wrap_long_lines() -> None:
    lines = side_by_side(("left", "right"), ("a\n    b", "x" * 70 + "\n\n" + "word " * 20)).split("\n")
    assert all(len(line) <= 118 for line in lines)
    assert lines[0].split() == ["left", "right"]
    assert [line[:58].rstrip() for line in lines[2:4]] == ["a", "    b"]
    right = [line[60:] for line in lines[2:]]
    assert right[:3] == ["x" * 58, "x" * 12, ""] and "".join(right[3:]).replace(" ", "") == "word" * 20
