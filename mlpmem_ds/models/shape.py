"""The shape of a base without its weights: how many parameters, how wide, how many tokens it knows. Read by
`plan`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import first_line
from mlpmem_ds.formats.model_directory import absence_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Parameters (tied ones once), size of a hidden state, entries of the vocabulary."""

    parameters: int
    width: int
    vocab_size: int


def read_shape(path: str, *, local_files_only: bool = False) -> ModelShape:
    """The shape of the model in a directory or under a Hub name, from its configuration alone; with
    `local_files_only` the Hub is not asked for it.

    Raises ValueError where there is no configuration of a causal language model.
    """
    try:
        config: Any = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=local_files_only
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a family of errors for each kind of configuration
        reason = first_line(error)
        if absence := absence_of(path, error=error):
            raise ValueError(absence) from error
        raise ValueError(f"no configuration of a causal language model ({reason})") from error
    text = config.get_text_config()
    parameters = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    return ModelShape(parameters=parameters, width=text.hidden_size, vocab_size=text.vocab_size)
