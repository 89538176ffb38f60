"""Tiny bases and memories with peaked distributions, and what their joint model must give."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.pretrained_memory import PretrainedMemory

from ..joint_models import joined

VOCAB, WIDTH, PAD, EOS = 61, 32, 0, 2
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
LLAMA_SIZES = {
    **TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BASES = {
    "gpt2": {
        **TOKENS,
        "n_embd": WIDTH,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
    },  # head tied to the embeddings
    "llama": LLAMA_SIZES,
    "qwen2": {**LLAMA_SIZES, "tie_word_embeddings": True},
    "gemma2": {**LLAMA_SIZES, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "opt": {**LLAMA_SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
}
POINT = CapturePoint(layer=2)


def spread(model: nn.Module, seed: int) -> None:
    """Weights far from the start, so that distributions are peaked and mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def tiny_base(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASES[family]))
        .eval()
        .requires_grad_(False)
    )
    spread(model, 6)
    return model


def tiny_memory(*, seed: int = 7, **changes: object) -> Memory:
    torch.manual_seed(seed)
    values = {
        "input_size": WIDTH,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_blocks": 2,
        "vocab_size": VOCAB,
    }
    memory = Memory(MemoryConfig.from_dict({**values, **changes}))
    spread(memory, seed + 1)
    return memory


def tiny_joint(
    family: str, lmbda: float = 0.4, point: CapturePoint = POINT, *, num_memories: int = 1
) -> MemoryAugmentedLM:
    """With one memory, or a bank, whose others read the last layer's output."""
    further = [
        PretrainedMemory(
            module=tiny_memory(seed=20 + number, hidden_size=20),
            input_layer=-1,
            input_point="layer_output",
            lmbda=None,
            vocabulary_sha256="",
            provenance={"corpus": f"further {number}"},
        )
        for number in range(1, num_memories)
    ]
    return joined(tiny_base(family), tiny_memory(), lmbda=lmbda, input_point=point, further=further)


def random_ids(num_sequences: int = 3, num_tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(9))


def expected_log_probabilities(
    joint: MemoryAugmentedLM, ids_BS: torch.Tensor, point: CapturePoint
) -> torch.Tensor:
    """The mixture in fp64 from its definition, the memory's input by a capture of its own."""
    state_BSD = capture(joint.base, [point])(ids_BS).states[point]
    base_BSV = joint.base(ids_BS).logits.double().softmax(-1)
    memory_BSV = joint.memory.head(joint.memory(state_BSD)).double().softmax(-1)
    return ((1 - joint.lmbda) * base_BSV + joint.lmbda * memory_BSV).log()
