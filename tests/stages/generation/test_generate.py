"""The generation front-end: with and without memory, several prompts at once, sampling, and what it
refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.formats.corpus import SpecialTokens
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.generation.config import Config
from mlpmem_ds.stages.generation.exported_model import load_model
from mlpmem_ds.stages.generation.generate import (
    _encode,
    _generation_config,
    continue_batch,
)
from mlpmem_ds.stages.generation.text import side_by_side

from ...toy_tokenizers import KINDS
from .conftest import LAMBDA, run_front_end

PROMPTS = ("alpha beta return", "in", "for value in range import é gamma")
NEW = 12


@pytest.fixture(scope="module")
def tokenizer(export_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(export_dir)


@torch.no_grad()
def greedy_ids(export_dir: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, lmbda: float) -> list[int]:
    """The likeliest continuation under the mixture in float64, from the parts, without a cache or
    `generate`."""
    joint = MemoryAugmentedLM.from_pretrained(export_dir)
    point = CapturePoint(layer=0)
    ids = tokenizer(prompt)["input_ids"]
    num_given = len(ids)
    for _ in range(NEW):
        state_D = capture(joint.base, [point])(torch.tensor([ids])).states[point][0, -1]
        base_V = joint.base(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        memory_V = joint.memory.head(joint.memory(state_D)).double().softmax(-1)
        token = int(((1 - lmbda) * base_V + lmbda * memory_V).argmax())
        if token == 0:  # end of text
            break
        ids = [*ids, token]
    return ids[num_given:]


def greedy(export_dir: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, lmbda: float) -> str:
    return tokenizer.decode(greedy_ids(export_dir, tokenizer, prompt, lmbda))


@pytest.mark.parametrize("lmbda", [0.0, None, 1.0])
def test_a_batch_of_prompts_gives_what_each_prompt_gives_alone(
    lmbda: float | None, export_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str]
) -> None:
    flags = ["--max-new-tokens", NEW, *([] if lmbda is None else [f"--lambda={lmbda}"])]
    expected = [
        prompt + greedy(export_dir, tokenizer, prompt, LAMBDA if lmbda is None else lmbda)
        for prompt in PROMPTS
    ]
    assert generate("--prompt", PROMPTS[0], *flags) == expected[0] + "\n"
    together = "\n\n".join(f"[{number} of 3]\n{text}" for number, text in enumerate(expected, start=1)) + "\n"
    assert generate("--prompt", *PROMPTS, *flags) == together
    assert generate("--prompt", *PROMPTS, *flags, "--batch-size", 2) == together


def test_a_model_that_is_spread_out_says_the_same(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str]
) -> None:
    flags = ["--prompt", PROMPTS[0], "--max-new-tokens", NEW]
    assert generate(*flags, "--device-map", "auto") == generate(*flags)
    one = load_model(str(export_dir), device=torch.device("cpu"), device_map={"": "cpu"})
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    expected = load_model(str(export_dir), device=torch.device("cpu"))
    assert torch.equal(one(**ids).logits, expected(**ids).logits)


def test_weights_are_read_straight_to_the_gpu(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    def load(name: str, **settings: object) -> None:
        raise StopError(settings["device_map"])

    monkeypatch.setattr(MemoryAugmentedLM, "from_pretrained", load)
    with pytest.raises(DamagedDataError) as raised:
        load_model(str(export_dir), device=torch.device("cuda:3"), dtype="bfloat16")
    assert isinstance(raised.value.__cause__, StopError)
    assert raised.value.__cause__.args == ({"": torch.device("cuda:3")},)


def test_int8_weights_are_the_joint_models_own(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str]
) -> None:
    joint = MemoryAugmentedLM.from_pretrained(export_dir).eval().quantize_memory()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = joint.generate(**ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
    flags = ["--prompt", PROMPTS[0], "--max-new-tokens", NEW]
    assert (
        generate(*flags, "--memory-weights", "int8")
        == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    )
    assert generate(*flags, "--memory-weights", "int8", "--lambda", 0) == generate(*flags, "--lambda", 0)


def test_without_the_memory_it_is_the_bases_own_generate(
    base_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str]
) -> None:
    base = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    ids = tokenizer(PROMPTS[2], return_tensors="pt")
    ways = (
        ([], {"do_sample": False}),
        (["--num-beams", 3], {"do_sample": False, "num_beams": 3}),
        (["--no-repeat-ngram-size", 1], {"do_sample": False, "no_repeat_ngram_size": 1}),
        (["--repetition-penalty", 1.3], {"do_sample": False, "repetition_penalty": 1.3}),
        (
            ["--temperature", 0.8, "--top-p", 0.9, "--seed", 5],
            {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
        ),
    )
    results = set()
    for flags, options in ways:
        torch.manual_seed(5)
        expected = base.generate(**ids, max_new_tokens=NEW, pad_token_id=0, **options)[
            0, ids["input_ids"].shape[1] :
        ]
        text = generate("--prompt", PROMPTS[2], "--max-new-tokens", NEW, "--lambda", 0, *flags)
        assert text == PROMPTS[2] + tokenizer.decode(expected, skip_special_tokens=True) + "\n", flags
        results.add(text)
    assert len(results) == 5


def test_sampling_follows_the_seed(generate: Callable[..., str]) -> None:
    flags = ("--prompt", PROMPTS[0], "--temperature", 1.5, "--max-new-tokens", NEW)
    first = generate(*flags, "--seed", 1)
    assert first == generate(*flags, "--seed", 1) != generate(*flags, "--seed", 2)


def test_generation_stops_at_the_end_token(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str], tmp_path: Path
) -> None:
    """The second new token of the first prompt is made the end; the other prompts of the batch go on."""
    free = [greedy_ids(export_dir, tokenizer, prompt, LAMBDA) for prompt in PROMPTS]
    copy = shutil.copytree(export_dir, tmp_path / "export")
    settings = json.loads((copy / "generation_config.json").read_text())
    end = free[0][1]
    (copy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, end]}))
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    blocks = (
        generate("--prompt", *PROMPTS, "--max-new-tokens", NEW, model=copy).removesuffix("\n").split("\n\n[")
    )
    found = [block.split("]\n", 1)[1] for block in blocks]
    assert found == [prompt + tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, cut, strict=True)]
    assert len({len(ids) for ids in cut}) > 1


def test_compare_shows_both(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, generate: Callable[..., str]
) -> None:
    text = generate("--prompt", PROMPTS[0], "--max-new-tokens", NEW, "--compare")
    pair = [greedy(export_dir, tokenizer, PROMPTS[0], lmbda) for lmbda in (0.0, LAMBDA)]
    assert pair[0] != pair[1]
    assert text == f"{PROMPTS[0]}\n\n{side_by_side(('base', f'base + memory, λ = {LAMBDA}'), pair)}\n"


@pytest.mark.parametrize("way", [[], ["--temperature", 0.8, "--seed", 3]])
def test_a_stream_writes_the_same_text_in_pieces(
    way: list[object], export_dir: Path, generate: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--prompt", PROMPTS[2], "--max-new-tokens", NEW, *way]
    pieces: list[str] = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), write(text))[1])
    assert generate(*flags, "--stream") == generate(*flags)
    streamed = pieces[: pieces.index("\n", 1) + 1]
    assert (
        len([piece for piece in streamed if piece.strip()]) > 1
    )  # whole words: of random text there are few


def test_prompts_from_a_file(tmp_path: Path, generate: Callable[..., str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", PROMPTS[2]]) + "\n", encoding="utf-8")
    flags = ("--max-new-tokens", NEW)
    assert generate("--prompts-file", path, *flags) == generate("--prompt", PROMPTS[0], PROMPTS[2], *flags)


def test_an_overflow_is_no_text(export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = shutil.copytree(export_dir, tmp_path / "export")
    model = MemoryAugmentedLM.from_pretrained(export)
    with torch.no_grad():
        model.memory.head.weight.fill_(torch.inf)
    model.save_pretrained(export)
    flags = ("--model", export, "--prompt", "in", "--max-new-tokens", 2)
    for way in ([], ["--temperature", 0.8, "--top-p", 0.9], ["--num-beams", 2]):
        assert run_front_end(*flags, *way) == 2, way
        captured = capsys.readouterr()
        assert captured.out == "" and "log-probabilities of the model are not finite" in captured.err
    assert run_front_end(*flags, "--lambda", 0) == 0


def test_a_setting_without_effect_is_said(export_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_front_end("--model", export_dir, "--prompt", "in", "--top-p", "0.5", "--max-new-tokens", "1") == 0
    )
    assert "--top-p 0.5 is ignored" in capsys.readouterr().err


def test_wrong_inputs_are_refused(
    export_dir: Path, base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9")
    damaged = shutil.copytree(export_dir, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    wordless = shutil.copytree(export_dir, tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    other_words = shutil.copytree(export_dir, tmp_path / "other_words")
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    tokenizer.add_tokens(["new-word"])
    tokenizer.save_pretrained(other_words)
    long_prompt = "alpha " * 70
    num_tokens = len(AutoTokenizer.from_pretrained(export_dir)(long_prompt)["input_ids"])
    cases: list[tuple[list[object], str]] = [
        (["--prompt", long_prompt], f"prompt 1 has {num_tokens:,} tokens, and the model reads 64"),
        (["--prompt", "in", "alpha", "--max-new-tokens", 64], "with --max-new-tokens 64 passes the 64"),
        (["--prompt", "in", "", "--max-new-tokens", 1], "prompt 2 is empty"),
        (["--prompt", "in", "--lambda", 1.01], "--lambda must be at least 0 and at most 1, not 1.01"),
        (["--prompt", "in", "--lambda=-0.1"], "--lambda must be at least 0 and at most 1, not -0.1"),
        (["--prompt", "in", "--top-p", 0], "--top-p"),
        (["--prompt", "in", "--temperature", -1], "--temperature"),
        (["--prompt", "in", "--temperature", "1e-40"], "--temperature 1e-40 makes scores that no float32"),
        (["--prompt", "in", "--temperature", "1e39"], "give one from 0.001 to 1000"),
        (["--prompt", "in", "--repetition-penalty", "1e-40"], "--repetition-penalty 1e-40 makes scores"),
        (["--prompt", "in", "--seed", -1], "--seed must be at least 0, not -1"),
        (["--prompt", "in", "--max-new-tokens", 1, "--device", "meta"], "--device meta is not here"),
        (["--prompt", "in", "--num-beams", 0], "--num-beams must be at least 1"),
        (["--prompt", "in", "--max-new-tokens", 1, "--device", "nonsense"], "--device nonsense"),
        (["--prompt", "in", "--stream", "--compare"], "leave out --compare"),
        (["--prompt", "in", "--stream", "--num-beams", 2], "leave out --compare and --num-beams"),
        (["--prompt", "in", "alpha", "--stream"], "there are 2 prompts"),
        ([], "give either --prompt or --prompts-file"),
        (["--prompt", "in", "--prompts-file", empty], "give either --prompt or --prompts-file"),
        (["--prompts-file", empty], "holds no prompt"),
        (["--prompts-file", latin], "UTF-8"),
        (["--prompts-file", tmp_path / "nowhere"], "does not exist"),
        (["--prompt", "in", "--model", base_dir], "a gpt2 model without a memory"),
        (["--prompt", "in", "--model", tmp_path], "cannot be read"),
        (
            ["--prompt", "in", "--model", tmp_path / "nowhere"],
            "it is no name of a model on the Hub: check the path; expected is the output of tools/convert_",
        ),
        (
            ["--prompt", "in", "--max-new-tokens", 1, "--model", damaged],
            "run tools/convert_checkpoint.py again",
        ),
        (["--prompt", "in", "--model", wordless], "its tokenizer cannot be loaded"),
        (
            ["--prompt", "in", "--model", other_words],
            "a tokenizer of 301 tokens that is not the one it was made with",
        ),
        (
            ["--prompt", "in", "--memory-weights", "int8", "--device-map", "balanced"],
            "--memory-weights int8 cannot be rounded where --device-map balanced has put",
        ),
    ]
    for words, said in cases:
        assert run_front_end("--model", export_dir, *words) == 2, words
        captured = capsys.readouterr()
        assert said in captured.err and captured.out == "", (words, captured.err)


def encode(words: Any, prompts: list[str], special_tokens: SpecialTokens = "text") -> list[list[int]]:
    """Ids of prompts for a model that reads 64 tokens and is to give 4."""
    encoder = open_encoder(words, label="the tokenizer of --model", special_tokens=special_tokens)
    return _encode(encoder, prompts, 64, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_its_begin_tokens_once_and_no_end(kind: str) -> None:
    """What a tokenizer puts after a text would end the document that is to be continued."""
    words = KINDS[kind]()
    text = "ab" if kind == "lossy" else "the fox"
    [ids] = encode(words, [text])
    bare, whole = words(text, add_special_tokens=False)["input_ids"], words(text)["input_ids"]
    at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    assert ids == whole[: at + len(bare)] and words.eos_token_id not in ids


def test_spelled_special_tokens_are_text_or_parsed() -> None:
    words = KINDS["begin_and_end"]()
    begin, end = [words.convert_tokens_to_ids(token) for token in ("<s>", "<lang>")], words.eos_token_id
    [as_text] = encode(words, ["<s> a<e>"])
    assert as_text[:2] == begin and not {*begin, end} & {*as_text[2:]}
    assert words.decode(as_text[2:]) == "<s> a<e>"
    a = words("a", add_special_tokens=False)["input_ids"]
    assert encode(words, ["<s><lang>a<e>", "a<e>", "<s><lang>"], "parse") == [
        [*begin, *a, end],
        [*begin, *a, end],
        begin,
    ]


@pytest.mark.parametrize(
    ("kind", "prompt", "needle"),
    [
        ("byte_level", "", "prompt 2 is empty"),
        ("begin_and_end", "", "prompt 2 is empty"),
        ("word_piece", " \t ", "prompt 2 holds only blanks"),
        ("words", " ", "prompt 2 holds only blanks"),
        ("lossy", "a\N{SNOWMAN}b", "prompt 2: .* no token for 1 of its characters"),
        ("byte_level", "x" * 65, "prompt 2 has 65 tokens, and the model reads 64: shorten it to 60"),
        ("begin_and_end", "x" * 60, "prompt 2 has 62 tokens, and with --max-new-tokens 4 passes the 64"),
    ],
)
def test_prompts_that_cannot_be_continued(kind: str, prompt: str, needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        encode(KINDS[kind](), ["a", prompt])


def test_unknown_tokens_in_a_prompt_are_said(caplog: pytest.LogCaptureFixture) -> None:
    encode(KINDS["words"](), ["the fox", "the cat the dog"])
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 2: 2 of its 4 tokens are the tokenizer's unknown token"
    ]


def test_the_flags_alone_choose_tokens(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, generate: Callable[..., str]
) -> None:
    """transformers takes what is not given from the model's own file: a penalty, forced tokens, a length."""
    copy = shutil.copytree(export_dir, tmp_path / "export")
    own = json.loads((copy / "generation_config.json").read_text())
    own |= {"temperature": 0.9, "repetition_penalty": 5.0, "min_new_tokens": 9, "num_return_sequences": 3}
    own |= {"forced_eos_token_id": 0, "max_length": 5, "unheard_of": 1, "do_sample": True}
    (copy / "generation_config.json").write_text(json.dumps(own))
    flags = ["--prompt", *PROMPTS, "--max-new-tokens", NEW]
    assert generate(*flags, model=copy) == generate(*flags)
    model = load_model(str(copy), device=torch.device("cpu"))
    settings = _generation_config(Config(model="m", prompt=("in",), max_new_tokens=4), model, tokenizer)
    continue_batch(model, [[5, 6]], settings)
    assert model.generation_config.repetition_penalty == 5.0  # as it was before


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_is_rendered_by_the_template(
    export_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, generate: Callable[..., str]
) -> None:
    """By the export's own, which `apply_chat_template` of plain transformers follows too, or by a file's."""
    template, copy = tmp_path / "chat.jinja", shutil.copytree(export_dir, tmp_path / "export")
    template.write_text(CHAT_TEMPLATE)
    chats = AutoTokenizer.from_pretrained(export_dir)
    chats.chat_template = CHAT_TEMPLATE
    chats.save_pretrained(copy)
    system, turns = {"role": "system", "content": "be brief"}, ["alpha beta", "in"]
    messages = [[system, {"role": "user", "content": turn}] for turn in turns]
    texts = [
        AutoTokenizer.from_pretrained(copy).apply_chat_template(
            each, tokenize=False, add_generation_prompt=True
        )
        for each in messages
    ]
    assert texts[1] == "system: be brief<|endoftext|>user: in<|endoftext|>assistant: "
    few = ("--max-new-tokens", 6)
    expected = generate("--prompt", *texts, "--special-tokens", "parse", *few)
    said = ("--chat", "--system", "be brief", "--prompt", *turns, *few)
    assert generate(*said, model=copy) == expected
    assert generate(*said, "--chat-template", template) == expected
    lines = [json.dumps({"messages": messages[0]}), json.dumps({"messages": messages[1]})]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    assert generate("--chat", "--prompts-file", tmp_path / "chats.jsonl", *few, model=copy) == expected


def test_what_is_no_chat_is_refused(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = tmp_path / "chats.jsonl"
    lines.write_text(json.dumps({"messages": answered}))
    for words, message in (
        (("--prompt", "in", "--system", "s"), "--system is of --chat: add that, or leave it out"),
        (("--prompt", "in", "--chat-template", "t"), "--chat-template is of --chat: add that"),
        (("--prompt", "in", "--chat"), "has no chat template: give one with --chat-template"),
        (("--prompts-file", lines, "--chat"), "nothing is left to answer after its last message"),
    ):
        assert run_front_end("--model", export_dir, *words) == 2
        assert message in capsys.readouterr().err


def test_a_threshold_without_a_gate_is_remarked(export_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", export_dir, "--prompt", "alpha", "--max-new-tokens", 2)
    for threshold, effect in ((0.1, "changes nothing"), (0.9, f"its weight is {LAMBDA}")):
        assert run_front_end(*words, "--base-only-threshold", threshold) == 0
        said = capsys.readouterr().err
        assert said.count(f"--base-only-threshold {threshold} is for a gate") == 1 and effect in said
