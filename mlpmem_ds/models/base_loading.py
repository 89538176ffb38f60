"""A frozen causal language model, loaded from a directory or the Hub.

Place in the pipeline: every stage that runs a base loads it here; `backbone` reads its hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_REASON = 400


def load_base(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    attention: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """A causal language model from a directory or from the Hub, in eval mode, without gradients.

    `attention` is a transformers attention implementation (`sdpa`, `eager`, `flash_attention_2`, ...), or
    `auto`: `sdpa`, and `eager` for a model that has none (`attention_of` says which). Raises ValueError when
    the model cannot be loaded, and when its files lack weights (transformers would fill those at random and
    go on); the message does not name it.

    The weights are read straight to `device`: no copy of the whole model is made in the host's memory first.
    None leaves them where the loader puts them.

    `device_map` spreads a model that is too large for one device over several, layer by layer (accelerate):
    `auto` and its like, or a mapping of module paths to devices, `cpu` or `disk`; `device` is not used then.
    `quantization_config` is of transformers, such as `BitsAndBytesConfig`.
    """
    from transformers import AutoModelForCausalLM  # seconds to import; a start may need no base

    name = str(name_or_path)
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise ValueError(
            "there is no model directory: give a directory with config.json and weights, or a Hub name"
        )
    source = str(Path(name).expanduser()) if _is_path(name) else name
    placement = _placement(device, device_map, offload_folder)
    if quantization_config is not None:
        placement["quantization_config"] = quantization_config
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            output_loading_info=True,
            trust_remote_code=False,  # else it asks at the terminal
            **placement,
        )
        model, report = loaded
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library under the loader raises a family of its own
        if quantization_config is not None:
            raise ValueError(
                f"cannot be loaded with this quantization ({_reason(error)}): its library must be one that"
                " transformers takes, and know the device; in floats the base needs none"
            ) from error
        raise ValueError(
            f"cannot load the causal language model (dtype {dtype}, attention {attention}):"
            f" {_reason(error)}. Give a directory written by save_pretrained or the name of a model on the"
            " Hub (which needs the network, or its cache on this machine); attention 'auto' works for every"
            " model."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"the files lack {len(missing)} weights ({shown}): not a complete causal language"
            " model. Download or save it again."
        )
    base: PreTrainedModel = model
    return base.eval().requires_grad_(False)


def _placement(
    device: torch.device | str | None,
    device_map: str | dict[str, Any] | None,
    offload_folder: str | Path | None,
) -> dict[str, Any]:
    """The loader's arguments for where the weights go."""
    if device_map is not None:
        return {"device_map": device_map, "offload_folder": offload_folder}
    if device is not None and torch.device(device).type != "cpu":
        return {"device_map": {"": torch.device(device)}}
    return {}


def _reason(error: Exception) -> str:
    """What a loader's error says, in a line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if "ignore_mismatched_sizes" in text:
        return "the weights have other shapes than config.json says"
    if "Weights only load failed" in text:
        return "pytorch_model.bin is damaged, or holds more than tensors: take a safetensors version"
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation that a loaded model's language model runs with."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def _is_path(name: str) -> bool:
    return Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
