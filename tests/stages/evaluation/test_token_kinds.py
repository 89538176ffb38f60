"""Kinds of tokens, of a byte-level vocabulary that this test trains and of a sentence-piece one written by
hand."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlpmem_ds.stages.evaluation.token_kinds import KINDS, kinds_of_positions, read_vocabulary_kinds

TEXT = "The value returned Alpha_beta 42 (x), naïve\n    if alpha:\n"


def kinds_of_text(root, tokenizer, text):
    """Token, kind of each token but the first."""
    tokenizer.save(str(root / "tokenizer.json"))
    kinds = read_vocabulary_kinds(root, tokenizer.get_vocab_size() + 1, tokenizer.get_vocab_size())
    encoding = tokenizer.encode(text)
    ids = np.array([*encoding.ids, tokenizer.get_vocab_size()])
    found = kinds_of_positions(kinds, ids[:-1], ids[1:])
    return list(zip([*encoding.tokens[1:], "END"], [KINDS[kind] for kind in found], strict=True))


def test_a_byte_level_vocabulary(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" value alpha if"] * 9, trainer)
    found = kinds_of_text(tmp_path, tokenizer, TEXT)
    kinds = dict(reversed(found))
    assert (
        kinds["Ġvalue"] == "word start"
        and kinds["h"] == "word continuation"
        and kinds["END"] == "end of document"
    )
    assert kinds["4"] == "number" and kinds["("] == "punctuation" and kinds["Ċ"] == "whitespace"
    assert kinds["Ã"] == "part of a character" and kinds["A"] == "capitalized word start"
    assert found[[token for token, _ in found].index("(") + 1] == (
        "x",
        "word start",
    )  # a letter after a bracket
    after_underscore = found[[token for token, _ in found].index("_") + 1]
    assert after_underscore[1] == "word continuation"
    assert kinds["Ġif"] == "word start"


def test_a_vocabulary_with_sentence_piece_marks(tmp_path):
    pieces = {"▁The": 0, "▁val": 1, "ue": 2, "▁": 3, "7": 4, ".": 5, "<unk>": 6}
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=6))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    found = kinds_of_text(tmp_path, tokenizer, "The value 7. The")
    assert [token for token, _ in found[:2]] == ["▁val", "ue"]
    kinds = dict(found)
    assert (
        kinds["▁val"] == "word start"
        and kinds["ue"] == "word continuation"
        and kinds["▁The"] == "capitalized word start"
    )
    assert kinds["7"] == "number" and kinds["."] == "punctuation"


def test_without_a_tokenizer_file_there_are_no_kinds(tmp_path):
    assert read_vocabulary_kinds(tmp_path, 10, 0) is None


@pytest.mark.parametrize("extra", [0, 5])
def test_entries_that_the_tokenizer_does_not_have(tmp_path, extra):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "B": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kinds = read_vocabulary_kinds(tmp_path, 2 + extra, 1)
    assert len(kinds.kinds_V) == 2 + extra
    assert {KINDS[kind] for kind in kinds.kinds_V[2:]} <= {"part of a character"}
