"""What every stage imports or makes at its first start, done once: a process that is forked from here starts
in milliseconds.

The process server of the tests imports this file (`conftest._forked`). One thread: a fork would be without
the others that OpenMP counts on.
"""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from mlpmem_ds.engines.deepspeed.library import import_deepspeed

_LATE_IMPORTS = (
    "deepspeed.runtime.zero.muon.original_muon",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "mlpmem_ds.engines.collectives.torch_group",
    "mlpmem_ds.stages.conversion.convert_checkpoint",
    "mlpmem_ds.stages.corpus.prepare_corpus",
    "mlpmem_ds.stages.evaluation.evaluate",
    "mlpmem_ds.stages.generation.generate",
    "mlpmem_ds.stages.keys.extract_keys",
    "mlpmem_ds.stages.inspection.inspect_run",
    "mlpmem_ds.stages.report.summary",
    "mlpmem_ds.stages.index.build_index",
    "mlpmem_ds.stages.targets.write_targets",
    "mlpmem_ds.stages.training.train",
    "mlpmem_ds.stages.base.train_base",
    "mlpmem_ds.stages.baseline.train_baseline",
)


def _no_flush(_: Any) -> None:
    """As in `conftest._no_flush_to_disk`: a killed process loses nothing that it has written."""


torch.set_num_threads(1)
import_deepspeed()
for _name in _LATE_IMPORTS:
    importlib.import_module(_name)
logging.disable_progress_bar()
# The model's module and the tables of its weights' names: .2 s in each start.
with tempfile.TemporaryDirectory() as _directory:
    _shape = GPT2Config(
        vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(_shape).save_pretrained(_directory)
    AutoModelForCausalLM.from_pretrained(_directory)
os.fsync = _no_flush
# A fork has no threads, so torch makes its pool anew; where two threads ask for it first, one of them finds
# none ("Invalid thread pool"). So the fork's own thread asks at once.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
gc.collect()
gc.freeze()
