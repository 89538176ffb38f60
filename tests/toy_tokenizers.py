"""Small tokenizers of every kind, built here. Each ends with `<e>`, and has `<pad>` and `<mask>`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = ["<e>", "<pad>", "<mask>"]
_TEXTS = ["the quick brown fox jumps over the lazy dog, again and again; été", "<e> <mask> e > < /"] * 5


def _wrap(backend: Any, **settings: Any) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<e>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **settings})


def byte_level(**settings: Any) -> PreTrainedTokenizerFast:
    """As GPT-2, with an added token that is not special, and one that takes the spaces next to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_TEXTS, trainer)
    backend.add_tokens(["<tool>", "    "])
    backend.add_special_tokens([AddedToken("<wide>", lstrip=True, rstrip=True, special=True)])
    return _wrap(backend, **settings)


def begin_and_end(**settings: Any) -> PreTrainedTokenizerFast:
    """As `byte_level`; puts two tokens before a text and the end token after it."""
    backend = byte_level().backend_tokenizer
    backend.add_special_tokens(["<s>", "<lang>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <lang> $A <e>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "<lang>", "<e>")],
    )
    return _wrap(backend, bos_token="<s>", **settings)


def unigram(**settings: Any) -> PreTrainedTokenizerFast:
    """As T5: its special tokens are words of the vocabulary, the likeliest ones."""
    letters = sorted(set("".join(_TEXTS)) - {" "})
    vocabulary = [("<unk>", 0.0), *((token, 0.0) for token in SPECIAL), ("▁", -2.0), ("▁the", -1.5)]
    backend = Tokenizer(models.Unigram([*vocabulary, *((letter, -3.0) for letter in letters)], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return _wrap(backend, unk_token="<unk>", **settings)


def merged(**settings: Any) -> PreTrainedTokenizerFast:
    """As Llama 2: a BPE with bytes for what it lacks, whose merges make `<e>` and `<mask>`."""
    letters = sorted(set("".join(_TEXTS)) - {" "}) + ["▁"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    names += ["<e", "ma", "mas", "mask", "<mask", "th", "the"]
    merges = [("<", "e"), ("<e", ">"), ("m", "a"), ("ma", "s"), ("mas", "k"), ("<", "mask"), ("<mask", ">")]
    backend = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(names)},
            [*merges, ("t", "h"), ("th", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return _wrap(backend, unk_token="<unk>", **settings)


def word_piece(**settings: Any) -> PreTrainedTokenizerFast:
    """As BERT: lower case, no accents, `[CLS]` before a text and `[SEP]` after it; split at spaces alone."""
    names = ["[UNK]", "[CLS]", "[SEP]", *SPECIAL, "the", "fox", "##x"]
    letters = sorted(set("".join(_TEXTS).lower()) - {" "})
    names += [*letters, *(f"##{letter}" for letter in letters if letter != "x")]
    backend = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", *SPECIAL])
    return _wrap(backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **settings)


def words(**settings: Any) -> PreTrainedTokenizerFast:
    """Whole words, among them the special tokens."""
    names = ["<unk>", *SPECIAL, "the", "quick", "fox", "a", "b"]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", *SPECIAL])
    backend.add_tokens([AddedToken("<tool>", single_word=True)])
    return _wrap(backend, unk_token="<unk>", **settings)


def lossy(**settings: Any) -> PreTrainedTokenizerFast:
    """A BPE of a few letters without an unknown token: it leaves the others out."""
    names = ["a", "b", "ab", " ", "e", "<", ">", "x"]
    backend = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [("a", "b")]))
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool>"])
    return _wrap(backend, **settings)


def of_bytes(**settings: Any) -> ByT5Tokenizer:
    """ByT5, which is written in Python and has no backend; its own end token."""
    return ByT5Tokenizer(**settings)


KINDS: dict[str, Callable[..., Any]] = {
    maker.__name__: maker
    for maker in (byte_level, begin_and_end, unigram, merged, word_piece, words, lossy, of_bytes)
}
