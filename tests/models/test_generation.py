"""Generation of the joint model beside transformers' own of the base alone: every way of choosing, padding,
caches, streams."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

from ..joint_models import joined

VOCAB, WIDTH, PAD, NEW = 67, 24, 0, 10
SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "head_dim": 8,
}
FAMILIES = {
    "gpt2": {
        **{name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "n_embd": WIDTH,
        "n_layer": 3,
        "n_head": 3,
        "n_positions": 48,
    },
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
}
WITH_STATES = {
    "mamba": {"state_size": 4},  # its cache is `cache_params`
    "rwkv": {"attention_hidden_size": WIDTH},  # `state`
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "minimax": {  # a cache of its own kind
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "num_local_experts": 2,
    },
}
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "top-k with a penalty": {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


@pytest.fixture(scope="module", params=FAMILIES)
def joint(request: pytest.FixtureRequest) -> MemoryAugmentedLM:
    """A random base and memory with peaked distributions."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    memory = Memory(
        MemoryConfig(input_size=WIDTH, hidden_size=16, intermediate_size=32, num_blocks=2, vocab_size=VOCAB)
    ).requires_grad_(False)
    for parameter in (*base.parameters(), *memory.parameters()):
        parameter += 0.25 * torch.randn(parameter.shape)
    return joined(base, memory, lmbda=0.4, input_point=CapturePoint(layer=-2))


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 3, 9 and 6 tokens, padded on the left, and their mask."""
    tokens = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row, length in enumerate((3, 9, 6)):
        tokens[row, : 9 - length], mask[row, : 9 - length] = PAD, 0
    return tokens, mask


def generate(model: torch.nn.Module, way: str, **options: object) -> torch.Tensor:
    tokens, mask = prompts()
    torch.manual_seed(11)
    settings = GenerationConfig(max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=2, **WAYS[way])
    return model.generate(tokens, attention_mask=mask, generation_config=settings, **options)  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
def test_at_lambda_zero_every_token_is_the_bases(joint: MemoryAugmentedLM, way: str) -> None:
    joint.lmbda = 0.4
    mixed = generate(joint, way)
    joint.lmbda = 0.0
    bare = generate(joint.base, way)
    assert torch.equal(generate(joint, way), bare)
    assert not torch.equal(mixed, bare)


def test_each_padded_prompt_and_each_cache_gives_the_same_tokens(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    tokens, mask = prompts()
    together = generate(joint, "greedy")
    assert torch.equal(generate(joint, "greedy", cache_implementation="static"), together)
    assert torch.equal(generate(joint, "greedy", use_cache=False), together)
    for row in range(len(tokens)):
        prompt = tokens[row : row + 1, mask[row] == 1]
        alone = joint.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=2,
        )[0, prompt.shape[1] :]
        assert together[row, 9 : 9 + len(alone)].tolist() == alone.tolist()


def test_the_memory_sees_one_position_a_token_and_keeps_no_cache(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    tokens, mask = prompts()
    shapes: list[tuple[int, ...]] = []
    handle = joint.memory.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    mixed = joint.generate(tokens, attention_mask=mask, **options)
    handle.remove()
    assert shapes == [(3, 1, WIDTH)] * 5  # the prompt's positions but the last are never computed
    bare = joint.base.generate(tokens, attention_mask=mask, **options)
    assert type(mixed.past_key_values) is type(bare.past_key_values) is DynamicCache
    sizes = [
        [(layer.keys.shape, layer.values.shape) for layer in output.past_key_values.layers]
        for output in (mixed, bare)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 3


class Pieces(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


def test_a_stream_is_given_each_token_and_its_end(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    tokens = prompts()[0][1:2]
    pieces = Pieces()
    whole = joint.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, streamer=pieces)
    assert pieces.tokens == whole[0].tolist() and pieces.ended


def test_generation_ends_at_any_of_several_end_tokens(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    tokens, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    free = joint.generate(tokens, **options, eos_token_id=None)[:, 9:].tolist()
    ends = [free[0][2], free[1][4]]
    stopped = joint.generate(tokens, **options, eos_token_id=ends)[:, 9:].tolist()
    for row, wanted in zip(stopped, free, strict=True):
        cut = next((at + 1 for at, token in enumerate(wanted) if token in ends), NEW)
        assert row[:cut] == wanted[:cut] and set(row[cut:]) <= {PAD}


def test_scores_of_generation_are_the_mixtures_logits(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    tokens = prompts()[0][1:2]
    output = joint.generate(
        tokens,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        whole = joint(output.sequences).logits[0, 8:-1]
        totals = joint.base(output.sequences).logits[0, 8:-1].logsumexp(-1)
    torch.testing.assert_close(torch.cat(output.logits), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.logsumexp(-1), totals, rtol=0, atol=2e-6)


def test_assisted_generation_gives_the_same_tokens(joint: MemoryAugmentedLM) -> None:
    joint.lmbda = 0.4
    prompt = prompts()[0][1:2]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    plain = joint.generate(prompt, **options)
    assert torch.equal(joint.generate(prompt, **options, assistant_model=joint.base), plain)
    assert torch.equal(joint.generate(prompt, **options, prompt_lookup_num_tokens=3), plain)


def test_past_the_context_it_does_what_the_base_does(joint: MemoryAugmentedLM) -> None:
    long = torch.randint(3, VOCAB, (1, 60), generator=torch.Generator().manual_seed(6))  # the context is 48
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    results = []
    for model, lmbda in ((joint.base, 0.0), (joint, 0.0), (joint, 0.4)):
        joint.lmbda = lmbda
        try:
            results.append(model.generate(long, **options).shape)
        except IndexError:  # learned positions end, rotary ones do not
            results.append(None)
    assert results == [None if joint.config.base_config.model_type == "gpt2" else (1, 62)] * 3


@pytest.mark.parametrize("family", WITH_STATES)
def test_a_base_of_states_goes_on_from_the_whole_text(family: str) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZES, **WITH_STATES[family]})
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    memory = Memory(
        MemoryConfig(input_size=WIDTH, hidden_size=16, intermediate_size=24, num_blocks=1, vocab_size=VOCAB)
    )
    for values in (*base.parameters(), *memory.parameters()):
        if values.dim() > 1:
            torch.nn.init.normal_(values, std=0.3)
    names = {"mamba": "backbone.layers", "rwkv": "rwkv.blocks"}
    point = CapturePoint(layer=-1, point="layer_output")
    provenance = {"input_layers_path": names.get(family, "model.layers")}
    joint = joined(base, memory, lmbda=0.4, input_point=point, provenance=provenance)
    prompt = prompts()[0][1:2]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    found, expected = joint.generate(prompt, **options), prompt
    for _ in range(NEW):
        token = joint(expected, use_cache=False).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, token], dim=1)
    assert found.tolist() == expected.tolist()
    refused = "assisted generation is not supported with stateful models|assisted decoding requires a cache"
    for model in (base, joint):
        with pytest.raises((ValueError, RuntimeError), match=refused):
            model.generate(prompt, **options, prompt_lookup_num_tokens=3)
    if family in names:
        with pytest.raises(ValueError, match="without past_key_values generates from tokens: give input_ids"):
            joint.generate(inputs_embeds=base.get_input_embeddings()(prompt), **options)
