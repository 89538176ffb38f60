"""Where no GPU is, the twins run in Triton's interpreter (in a process of its own: it is chosen before the
import) and are compiled ahead of time for three GPUs."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
TWINS = Path(__file__).with_name("test_twins.py")

# Pointers by the end of their name; what is not here is a 32-bit integer.
_TYPES = {
    "offsets_ptr": "*i64",
    "ids_ptr": "*i64",
    "labels_ptr": "*i64",
    "d_logits_ptr": "*bf16",
    "log_lambda": "fp32",
    "queries_ptr": "*i8",
    "keys_ptr": "*i8",
    "norms_ptr": "*i32",
    "key_ids_ptr": "*i64",
    "rows_ptr": "*i64",
    "places_ptr": "*i64",
    "bounds_ptr": "*i64",
    "tiles_ptr": "*i64",
    "candidates_ptr": "*i64",
    "log_keep": "fp32",
    "log_take": "fp32",
}
_KERNELS = {
    "sparse_rows.sparse_rows_kernel": {
        "THROUGH_MIXTURE": True,
        "WANTS_GRADIENT": True,
        "COLUMNS": 8192,
        "ENTRIES": 128,
    },
    "probability_rows.label_rows_kernel": {"COLUMNS": 8192},
    "probability_rows.part_normalizers_kernel": {"COLUMNS": 2048},
    "probability_rows.mixture_rows_kernel": {"WEIGHT_BY_ROW": True, "COLUMNS": 2048, "PARTS": 128},
    "list_candidates.list_candidates_kernel": {
        "NUM_RANGES": 2,
        "ID_BITS": 39,
        "PAIRS": 128,
        "KEYS": 64,
        "DIMS": 128,
    },
}
_MIXES = ("sparse_rows.sparse_rows_kernel", "probability_rows.mixture_rows_kernel")


def test_the_twins_equal_the_originals_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(TWINS)]
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    passed, skipped = (int(re.search(rf"(\d+) {word}", finished.stdout)[1]) for word in ("passed", "skipped"))
    assert passed >= 25 and skipped == 2  # only what measures a GPU


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", _KERNELS)
def test_the_twins_compile_for_gpus_that_are_not_here(kernel, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, name = kernel.split(".")
    function = getattr(importlib.import_module(f"mlpmem_ds.maths.kernels.{module}"), name)
    constants = _KERNELS[kernel]
    signature = {
        argument: "constexpr"
        if argument in constants
        else _TYPES.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
        for argument in function.arg_names
    }
    compiled = triton.compile(
        ASTSource(
            function,
            signature,
            constexprs={(function.arg_names.index(key),): constants[key] for key in constants},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    assert len(compiled.asm["cubin"]) > 1000 and f"sm_{capability}" in compiled.asm["ptx"]
    if kernel in _MIXES:  # what is not a number stays so, also where the interpreter does not tell
        assert all(f"{word}.NaN.f32" in compiled.asm["ptx"] for word in ("max", "min"))
