"""Samples of small files that users give: configurations of models and of DeepSpeed, tokenizers, prompts,
questions."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from mlpmem_ds.benchmarks.fuzz.documents import decoded, encoded, parsed_json, texts_of_json
from mlpmem_ds.benchmarks.fuzz.target import Content, Sample, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_texts
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.engines.tokenizer import open_encoder, require_end
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.stages.generation.config import Config as GenerateConfig
from mlpmem_ds.stages.generation.prompts import read_prompts
from mlpmem_ds.stages.harness.config import Config as EvalConfig
from mlpmem_ds.stages.harness.local_tasks import build_tasks
from mlpmem_ds.stages.planning import table
from mlpmem_ds.stages.planning.config import Config as PlanConfig

_MODELS: tuple[Callable[[], PretrainedConfig], ...] = (
    lambda: LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
    lambda: GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=32),
)


def write_model(random: Random, folder: Path) -> Sample:
    """A model directory; its weights are only hashed here."""
    root = folder / "model"
    root.mkdir()
    config = random.choice(_MODELS)()
    (root / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["X"]}, indent=1), encoding="utf-8"
    )
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = root / "model-1.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    index = root / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors"}}, indent=1),
        encoding="utf-8",
    )
    sample = Sample(inputs=(root,), files=(root / "config.json", index, weights), content=Content(values=()))
    return dataclasses.replace(sample, content=read_model(sample))


def read_model(sample: Sample) -> Content:
    """As `plan` reads a configuration, and the other stages the files."""
    (root,) = sample.inputs
    table.run_as_table(PlanConfig(positions=1000, model=str(root)), World())
    return Content(values=[fingerprint_model(str(root))])


def write_ds_config(random: Random, folder: Path) -> Sample:
    """One of the configurations that are shipped."""
    shipped = random.choice(sorted(ds_configs().glob("zero[123].json")) + [ds_configs() / "cpu.json"])
    path = folder / shipped.name
    path.write_bytes(shipped.read_bytes())
    sample = Sample(inputs=(path,), files=(path,), content=Content(values=()))
    return dataclasses.replace(sample, content=read_ds_config(sample))


def read_ds_config(sample: Sample) -> Content:
    config: dict[str, Any] = resolve_ds_config(
        sample.inputs[0],
        batch=64,
        batch_flag="--batch-positions",
        world_size=2,
        max_micro_batch=16,
        gradient_clipping=1.0,
    )
    return Content(values=[config])


@functools.cache
def _tokenizer_json() -> str:
    """A small byte-level BPE with three special tokens, one of which stands before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<bos>", "<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a page about the lake and its fish"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return str(tokenizer.to_str(pretty=True))


def write_tokenizer(random: Random, folder: Path) -> Sample:
    root = folder / "tokenizer"
    root.mkdir()
    (root / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<bos>",
    }
    (root / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    sample = Sample(
        inputs=(root,),
        files=(root / "tokenizer.json", root / "tokenizer_config.json"),
        content=Content(values=()),
        settings={"texts": made_up_texts(random)},
    )
    return dataclasses.replace(sample, content=read_tokenizer(sample))


def read_tokenizer(sample: Sample) -> Content:
    """The ids of some texts, as `prepare_corpus` would write them."""
    (root,) = sample.inputs
    encoder = open_encoder(load_tokenizer(str(root)), label=f"--tokenizer {root}")
    require_end(encoder)
    encoded = encoder.encode_documents(sample.settings["texts"])
    return Content(values=[document.ids.tolist() for document in encoded])


def write_prompts(random: Random, folder: Path) -> Sample:
    """A text file with a prompt a line, or JSON lines."""
    prompts = made_up_texts(random)
    if is_json := random.random() < 0.5:
        lines = [json.dumps(random.choice((text, {"prompt": text, "x": 1}))) for text in prompts]
    else:
        prompts = [text for text in (_in_a_line(text) for text in prompts) if text.strip()] or ["x"]
        lines = prompts
    path = folder / ("prompts.jsonl" if is_json else "prompts.txt")
    path.write_bytes(encoded(random, "".join(f"{line}\n" for line in lines)))
    return Sample(inputs=(path,), files=(path,), content=Content(values=prompts))


def _in_a_line(text: str) -> str:
    return text.translate({ord(character): " " for character in "\n\r\0\ufeff"})


def read_prompts_file(sample: Sample) -> Content:
    config = GenerateConfig(model="m", prompts_file=sample.inputs[0])
    return Content(values=read_prompts(config))


def expect_prompts(sample: Sample) -> Content:
    """The lines that are not blank; or the texts of JSON lines."""
    (path,) = sample.files
    text = decoded(path.read_bytes())
    if path.suffix == ".txt":
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        return Content(values=[line for line in lines if line.strip()])
    lines = [line.removeprefix("\ufeff") for line in text.split("\n")]
    values = [parsed_json(line) for line in lines if line.strip()]
    return Content(values=[value["prompt"] if isinstance(value, dict) else value for value in values])


def write_questions(random: Random, folder: Path) -> Sample:
    questions = [text if text.strip() else "x" for text in made_up_texts(random)]
    records = [
        {"question": text, "answer": random.choice(("a", ["b", "c\u2028"]))}
        | {"id": random.choice((1, 10**30, None, float("nan")))}
        for text in questions
    ]
    path = folder / "questions.jsonl"
    lines = [json.dumps(record, ensure_ascii=random.random() < 0.5) for record in records]
    path.write_bytes(encoded(random, "".join(f"{line}\n" for line in lines)))
    return Sample(inputs=(path,), files=(path,), content=Content(values=questions))


def read_questions(sample: Sample) -> Content:
    """The questions of the task that the harness is given."""
    (path,) = sample.inputs
    folder = path.parent / "tasks"
    folder.mkdir(exist_ok=True)
    build_tasks(EvalConfig(model="m", questions=path), folder)
    (written,) = folder.glob("*.jsonl")
    return Content(values=[json.loads(line)["question"] for line in written.open(encoding="utf-8")])


def expect_questions(sample: Sample) -> Content:
    values = texts_of_json(sample.files[0].read_bytes(), "question")
    return Content(values=values)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="model", write=write_model, read=read_model, expect=None),
        Target(name="tokenizer", write=write_tokenizer, read=read_tokenizer, expect=None),
        Target(name="prompts", write=write_prompts, read=read_prompts_file, expect=expect_prompts),
        Target(name="questions", write=write_questions, read=read_questions, expect=expect_questions),
        Target(name="ds-config", write=write_ds_config, read=read_ds_config, expect=None),
    )
}
