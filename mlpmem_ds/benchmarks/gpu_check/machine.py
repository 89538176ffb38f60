"""Steps of the GPU check: what the machine is, and the tests of the suite that need a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mlpmem_ds.benchmarks.common import describe_machine, describe_versions
from mlpmem_ds.benchmarks.gpu_check.steps import Context

_logger = logging.getLogger(__name__)
_ROOT = Path(__file__).parents[3]
_OPTIONAL = ("flash_attn", "mpi4py")
_DISK_BYTES = 12e9


class _Count:
    """A plugin of pytest that counts outcomes."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed += report.failed


def describe(context: Context) -> None:
    """GPUs and their memory, versions, optional libraries, free disk."""
    report = context.report
    _logger.info("%s %s", describe_machine(), describe_versions())
    for name in _OPTIONAL:
        report.fact(f"has_{name}", importlib.util.find_spec(name) is not None)
    report.fact("has_faiss_gpu", hasattr(importlib.import_module("faiss"), "StandardGpuResources"))
    report.speed("free_disk", shutil.disk_usage(context.work).free / 1e9, "GB", at_least=_DISK_BYTES / 1e9)
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        _logger.info("GPU %d: %s", number, properties)
        report.fact(f"memory_of_gpu_{number}", properties.total_memory / 1e9, "GB")
        torch.ones(1, device=f"cuda:{number}").add_(1).item()  # it computes


def test_maths(context: Context) -> None:
    """`tests/maths`, what is marked `gpu`: in the main thread, then in a fresh one.

    A fresh thread has CUDA's current device of its own, 0 until it is told. In a rehearsal some kernels run
    in Triton's interpreter.
    """
    words = ["-m", "gpu", str(_ROOT / "tests" / "maths")]
    if context.sizes.is_rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which comes later
        twins = _ROOT / "tests" / "maths" / "kernels" / "test_twins.py"
        words = [str(twins), "-k", "rounded_once or mixture_ends or no_gradient"]
    _test(context, "main_thread", words)
    with ThreadPoolExecutor(max_workers=1) as fresh:
        fresh.submit(_test, context, "fresh_thread", words).result()


def test_libraries(context: Context) -> None:
    """All other tests that are marked `gpu`; those of a library that is missing skip."""
    paths = [path for path in sorted((_ROOT / "tests").iterdir()) if path.is_dir() and path.name != "maths"]
    _test(context, "other", ["-m", "gpu", *map(str, paths)], min_passed=0)


def _test(context: Context, name: str, words: Sequence[str], *, min_passed: int = 1) -> None:
    count = _Count()
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--noconftest", f"--rootdir={_ROOT}"]
    if importlib.util.find_spec("xdist") is None:
        options.remove("-n")
        options.remove("0")
    if not context.sizes.is_rehearsal:
        options.remove("--noconftest")
    code = pytest.main([*options, "-c", str(_ROOT / "pyproject.toml"), *words], plugins=[count])
    sys.stdout.flush()
    context.report.fact(f"passed_{name}", count.passed, "tests", at_least=min_passed)
    context.report.fact(f"failed_{name}", count.failed, "tests", at_most=0)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests could not run: pytest ended with code {int(code)}, see above")
