"""A base is loaded whole, frozen and where it belongs, or refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from mlpmem_ds.models.base_loading import load_base

from .conftest import random_ids, tiny_base


def test_load_base_is_frozen_and_refuses_what_is_not_whole(tmp_path: Path) -> None:
    model = tiny_base("gpt2")
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype=torch.float32, device="cpu", attention="eager")
    assert not base.training and not any(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(
        base(random_ids()).logits,
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")(
            random_ids()
        ).logits,
    )
    assert load_base(str(tmp_path / "base"), dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16

    weights = {
        key: value
        for key, value in model.state_dict().items()
        if "h.1.mlp" not in key and "lm_head" not in key
    }
    model.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(ValueError, match=r"lack 4 weights .*h\.1\.mlp"):
        load_base(tmp_path / "partial", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="no model directory"):
        load_base(tmp_path / "absent", dtype=torch.float32, device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load the causal language model(?s:.*)save_pretrained"):
        load_base(tmp_path / "empty", dtype=torch.float32, device="cpu")
    given = transformers.BitsAndBytesConfig(load_in_8bit=True)
    given.quant_method = "unheard-of"
    with pytest.raises(ValueError, match="cannot be loaded with this quantization .*in floats"):
        load_base(tmp_path / "base", dtype=torch.float32, device="cpu", quantization_config=given)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load"):
        load_base(tmp_path / "base", dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("device", "device_map", "expected"),
    [
        ("cuda:3", None, {"device_map": {"": torch.device("cuda:3")}}),
        (torch.device("cuda", 5), None, {"device_map": {"": torch.device("cuda:5")}}),
        ("cpu", None, {}),
        (None, None, {}),
        ("cuda:3", "auto", {"device_map": "auto", "offload_folder": None}),
    ],
)
def test_weights_are_read_straight_to_their_device(
    device: str | torch.device | None,
    device_map: str | None,
    expected: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight ranks that each hold a model in the host's memory first would need eight times its size."""
    placements = []

    class Loaded(nn.Linear):
        def to(self, *_: object, **__: object) -> Loaded:
            raise AssertionError("moved after it was loaded")

    def load(name: str, **settings: object) -> tuple[nn.Module, dict[str, list[str]]]:
        for ours in ("dtype", "attn_implementation", "output_loading_info", "trust_remote_code"):
            settings.pop(ours)
        placements.append(settings)
        return Loaded(2, 2), {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_base("name", dtype="auto", device=device, device_map=device_map)
    assert placements == [expected]
