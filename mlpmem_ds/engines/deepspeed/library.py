"""The one file that imports DeepSpeed.

It is imported inside functions, because it reads its environment (DS_ACCELERATOR) while it is imported, and
takes seconds. What DeepSpeed 0.19 does silently, and this package refuses or repairs: unknown keys and a left
"auto" are accepted; `latest` is written before every rank has finished; a missing checkpoint restarts from
scratch; another world size or ZeRO stage cannot be loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_logger = logging.getLogger(__name__)
_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def import_deepspeed() -> Any:
    """The library, on its CPU accelerator where there is no CUDA and only there, and without its prints."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif os.environ.get("DS_ACCELERATOR") == "cpu":  # of a login node's shell, say, which a job takes along
        del os.environ["DS_ACCELERATOR"]
        _logger.info("DS_ACCELERATOR=cpu is ignored where PyTorch sees a GPU; CUDA_VISIBLE_DEVICES= hides it")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with silenced():
        library = importlib.import_module("deepspeed")
        _import_muon()
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # PyTorch 2.13 has new names for what DeepSpeed calls: a warning of each rank in each run.
    warnings.filterwarnings("ignore", message="`torch\\.distributed", category=FutureWarning)
    if not torch.cuda.is_available():
        # A just-in-time C++ build that only inference uses: 31 s, and fatal where there is no compiler. With
        # CUDA it is never made, and reading this table starts compilers and asks each GPU.
        compatible = getattr(import_part("ops"), "__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    return library


def _import_muon() -> None:
    """DeepSpeed's engine asks whether its optimizer is Muon, and that module has its kernels compiled while
    it is imported: torch's compiler is loaded for it, in 1.8 of the 8.7 s that a training's imports took."""
    if _MUON in sys.modules:
        return

    def leave_as_it_is(function: Any = None, **_: Any) -> Any:
        return leave_as_it_is if function is None else function

    compiler: Any = torch
    compile_it, compiler.compile = compiler.compile, leave_as_it_is
    try:
        with contextlib.suppress(ImportError):  # a DeepSpeed that has no Muon
            importlib.import_module(_MUON)
    finally:
        compiler.compile = compile_it


def import_part(name: str) -> Any:
    """The module `deepspeed.<name>`; after `import_deepspeed`."""
    return importlib.import_module(f"deepspeed.{name}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """What DeepSpeed prints inside is not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
