"""The base's capture: every family by structure, against hooks and logits taken independently of it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mlpmem_ds.models.backbone import Taps, capture, logit_transform, state_width
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.logit_transform import LogitTransform
from mlpmem_ds.models.structure import UnknownStructureError, decoder_layers, output_head, resolve_layer

LLAMA_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# model type -> (config, path of the layers, path of the module whose input is the MLP's, inside its layer)
FAMILIES: dict[str, tuple[dict[str, object], str, str]] = {
    "gpt2": (GPT2_SIZES, "transformer.h", "mlp"),
    "llama": (LLAMA_SIZES, "model.layers", "mlp"),
    "mistral": ({**LLAMA_SIZES, "sliding_window": 4}, "model.layers", "mlp"),
    "qwen2": (LLAMA_SIZES, "model.layers", "mlp"),
    "qwen3": ({**LLAMA_SIZES, "head_dim": 16}, "model.layers", "mlp"),
    "gemma2": (
        {**LLAMA_SIZES, "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 4},
        "model.layers",
        "mlp",
    ),
    "gemma3_text": ({**LLAMA_SIZES, "head_dim": 8, "sliding_window": 4}, "model.layers", "mlp"),
    "phi3": (LLAMA_SIZES, "model.layers", "mlp"),
    "gpt_neox": (LLAMA_SIZES, "gpt_neox.layers", "mlp"),
    "opt": (
        {**LLAMA_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers",
        "fc1",
    ),
    "opt_post_norm": (  # the 350 M shape: narrow embeddings, the norm after the MLP
        {**LLAMA_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "model.decoder.layers",
        "fc1",
    ),
    "mixtral": ({**LLAMA_SIZES, "num_local_experts": 7, "num_experts_per_tok": 2}, "model.layers", "mlp"),
    "qwen3_moe": ({**LLAMA_SIZES, **EXPERTS, "mlp_only_layers": [0]}, "model.layers", "mlp"),
    "cohere": ({**LLAMA_SIZES, "logit_scale": 0.3}, "model.layers", "mlp"),
    "granite": ({**LLAMA_SIZES, "logits_scaling": 7.0}, "model.layers", "mlp"),
}


def tiny_base(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family.removesuffix("_post_norm"), **FAMILIES[family][0])
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # far from the start, where norms and biases would hide mistakes
        parameter += 0.05 * torch.randn_like(parameter)
    return model


def random_ids(num_sequences: int = 3, num_tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(4))


def input_seen_by(model: PreTrainedModel, module: nn.Module, ids_BS: torch.Tensor) -> torch.Tensor:
    """The oracle: a hook of the test's own, on a module named by the test, during a forward of the whole
    model."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(input_ids=ids_BS)
    handle.remove()
    assert len(seen) == 1
    return seen[0].reshape(*ids_BS.shape, -1)


def hooks_in(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_of_every_family(family: str) -> None:
    model, ids_BS = tiny_base(family), random_ids()
    _, layers_path, mlp_path = FAMILIES[family]
    layers = decoder_layers(model)
    assert layers is model.get_submodule(layers_path) and len(layers) == 3
    hooks_before = hooks_in(model)
    points = [CapturePoint(layer=layer) for layer in (0, 1, -1)]
    points += [CapturePoint(layer=0, point="layer_output"), CapturePoint(layer=-1, point="final_norm")]
    captured = capture(model, points)(ids_BS)
    assert hooks_in(model) == hooks_before

    for point in points[:3]:
        module = layers[point.layer].get_submodule(mlp_path)
        assert torch.equal(captured.states[point], input_seen_by(model, module, ids_BS)), point
    # The second layer reads what the first one gave.
    assert torch.equal(captured.states[points[3]], input_seen_by(model, layers[1], ids_BS))
    head_input_BSD = input_seen_by(model, model.get_output_embeddings(), ids_BS)
    assert torch.equal(captured.final_BSD, head_input_BSD)
    assert torch.equal(captured.states[points[4]], head_input_BSD)
    assert not any(state.requires_grad for state in captured.states.values())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_several_layers_stand_side_by_side(family: str) -> None:
    model, ids_BS = tiny_base(family), random_ids()
    several = CapturePoint(layer=-1, point="layer_output", earlier=(1, 0))
    behind = CapturePoint(layer=-1, point="final_norm", earlier=(0,))
    states = capture(model, [several, behind, *several.parts, *behind.parts])(ids_BS).states
    for point in (several, behind):
        joined_BSD = torch.cat([states[part] for part in point.parts], dim=-1)
        assert torch.equal(states[point], joined_BSD)
        assert states[point].shape[-1] == state_width(model, point)
    taps = Taps(model, {"several": several})
    for ids in (ids_BS, ids_BS.flip(1)):
        _, read = taps.read(model, *ids.shape, input_ids=ids)
        assert torch.equal(read["several"], capture(model, [several])(ids).states[several])
    taps.remove()
    assert hooks_in(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_the_final_state_are_the_models_own(family: str) -> None:
    model, ids_BS = tiny_base(family), random_ids()
    weight_VD, bias_V = output_head(model)
    final_BSD = capture(model, [])(ids_BS).final_BSD
    logits_BSV = logit_transform(model)(nn.functional.linear(final_BSD, weight_VD, bias_V))
    torch.testing.assert_close(logits_BSV, model(input_ids=ids_BS).logits, rtol=1e-5, atol=1e-5)


def test_what_comes_after_the_head_is_known() -> None:
    assert logit_transform(tiny_base("gemma2")) == LogitTransform(softcap=0.5)
    assert logit_transform(tiny_base("cohere")) == LogitTransform(scale=0.3)
    assert logit_transform(tiny_base("granite")).scale == pytest.approx(1 / 7)
    assert logit_transform(tiny_base("gpt2")).is_identity
    assert LogitTransform(scale=2.0, softcap=3.0)(torch.tensor([4.0])).item() == pytest.approx(
        3 * torch.tanh(torch.tensor(8 / 3)).item()
    )


def test_an_unknown_transform_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_base("gpt2")
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(UnknownStructureError, match="between its final hidden state and its logits"):
        logit_transform(model)


def test_lower_precision_passes_the_check_of_the_logits() -> None:
    assert logit_transform(tiny_base("gemma2").to(torch.bfloat16)).softcap == 0.5


def test_hooks_are_removed_when_the_forward_fails() -> None:
    model = tiny_base("llama")
    before = hooks_in(model)
    with pytest.raises(IndexError):
        capture(model, [CapturePoint(layer=0), CapturePoint(layer=1, point="layer_output")])(
            torch.full((1, 3), 999)
        )
    assert hooks_in(model) == before


def test_gradients_may_flow_through_what_reads_the_states() -> None:
    """Online training puts captured states into the memory: inference tensors would refuse."""
    state_BSD = capture(tiny_base("gpt2"), [CapturePoint(layer=1)])(random_ids()).states[
        CapturePoint(layer=1)
    ]
    linear = nn.Linear(32, 1)
    linear(state_BSD).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.any()


class OddLayer(nn.Module):
    """A layer whose MLP has none of the usual names."""

    def __init__(self, width: int, num_mlps: int = 1) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"a": nn.Linear(width, 40), "b": nn.Linear(40, width)})
        for index in range(num_mlps):
            self.add_module(f"transition{index}", TwoMatrices(width))


class TwoMatrices(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(hidden)))


def with_layers(make: Callable[[], nn.Module], num_layers: int = 3) -> PreTrainedModel:
    model = tiny_base("gpt2")
    model.transformer.h = nn.ModuleList(make() for _ in range(num_layers))
    return model


def test_an_mlp_of_another_name_is_found_by_its_matrices() -> None:
    model = with_layers(lambda: OddLayer(32))
    assert decoder_layers(model) is model.transformer.h


def test_the_experts_of_a_layer_are_not_taken_for_layers() -> None:
    def layer() -> nn.Module:
        layer = OddLayer(32)
        layer.experts = nn.ModuleList(TwoMatrices(32) for _ in range(7))
        return layer

    model = with_layers(layer)
    assert decoder_layers(model) is model.transformer.h


def test_structures_that_are_not_understood_name_the_paths_and_the_remedy() -> None:
    for make in (
        lambda: nn.Linear(32, 32),
        lambda: OddLayer(32, num_mlps=2),
        lambda: OddLayer(32, num_mlps=0),
    ):
        with pytest.raises(
            UnknownStructureError, match=r"transformer\.h: 3 x (?s:.*)--layers-path transformer\.h"
        ):
            decoder_layers(with_layers(make))
    twice = tiny_base("gpt2")
    twice.transformer.other = nn.ModuleList(OddLayer(32) for _ in range(3))
    with pytest.raises(UnknownStructureError, match=r"several lists(?s:.*)transformer\.other: 3 x OddLayer"):
        decoder_layers(twice)
    assert decoder_layers(twice, "transformer.h") is twice.transformer.h
    assert capture(twice, [CapturePoint(layer=0)], layers_path="transformer.h")(random_ids()).states
    # A list that is not run gives nothing: found out at the first forward.
    with pytest.raises(UnknownStructureError, match="did not run"):
        capture(twice, [CapturePoint(layer=0)], layers_path="transformer.other")(random_ids())
    for path in ("transformer.nothing", "transformer.wte"):
        with pytest.raises(UnknownStructureError, match=path):
            decoder_layers(twice, path)


def test_resolve_layer() -> None:
    assert [resolve_layer(index, 36) for index in (0, 35, -1, -36)] == [0, 35, 35, 0]
    # The paper's ~70 % of 36 layers is its layer 25; the product 0.29 * 100 must not fall below 29.
    assert resolve_layer(0.7, 36) == 25 and resolve_layer(0.29, 100) == 29
    for num_layers in range(1, 40):
        for percent in range(1, 100):
            assert resolve_layer(percent / 100, num_layers) == percent * num_layers // 100
    for spec in (36, -37, 1.0, 0.0, -0.5, 1.5, float("nan"), True, "3"):
        with pytest.raises(ValueError, match=r"-36, 35"):
            resolve_layer(spec, 36)  # type: ignore[arg-type]


def test_points_are_checked() -> None:
    model = tiny_base("gpt2")
    with pytest.raises(ValueError, match="ffn_input, layer_output, final_norm"):
        CapturePoint(layer=0, point="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give layer -1"):
        capture(model, [CapturePoint(layer=1, point="final_norm")])
    with pytest.raises(ValueError, match="3 layers"):
        capture(model, [CapturePoint(layer=3)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        CapturePoint(layer=0).layer = 1  # type: ignore[misc]


def test_an_encoder_is_refused() -> None:
    """It would predict each token from those after it, nearly always right."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert", **sizes, intermediate_size=24, initializer_range=0.3)
    with pytest.raises(UnknownStructureError, match="lets a token see those after it"):
        logit_transform(transformers.BertLMHeadModel(config).eval())


def test_a_model_without_a_head_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", **GPT2_SIZES)
    with pytest.raises(UnknownStructureError, match="no linear output head"):
        output_head(transformers.GPT2Model(config))
