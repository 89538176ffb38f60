"""Samples of small files that users give: configurations of models and of DeepSpeed, tokenizers."""

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

from mlpmem_ds.benchmarks.fuzz.target import Content, Sample, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_texts
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.config import resolve_ds_config
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.engines.tokenizer import load_tokenizer, open_encoder, require_end
from mlpmem_ds.stages.planning import plan
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
    (root / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["X"]}, indent=1))
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = root / "model-1.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    index = root / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors"}}, indent=1)
    )
    sample = Sample(inputs=(root,), files=(root / "config.json", index, weights), content=Content(values=()))
    return dataclasses.replace(sample, content=read_model(sample))


def read_model(sample: Sample) -> Content:
    """As `plan` reads a configuration, and the other stages the files."""
    (root,) = sample.inputs
    table = plan.run_as_table(PlanConfig(positions=1000, model=str(root)), World())
    return Content(values=[fingerprint_model(str(root)), str(table)])


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
    (root / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
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


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="model", write=write_model, read=read_model, expect=None),
        Target(name="tokenizer", write=write_tokenizer, read=read_tokenizer, expect=None),
        Target(name="ds-config", write=write_ds_config, read=read_ds_config, expect=None),
    )
}
