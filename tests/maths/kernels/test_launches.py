"""Every launch stands under the device of its tensors, in any thread: with eight pretended GPUs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from mlpmem_ds.maths.kernels import list_candidates, probability_rows, sparse_rows  # noqa: E402

_ROWS, _VOCABULARY = 3, 50


class Recorder:
    """Stands for `torch.cuda.device_of`: like CUDA's current device, what is open is a thread's own."""

    def __init__(self) -> None:
        self._thread = threading.local()
        self.launches: list[tuple[str, torch.device | None]] = []

    def device_of(self, tensor: torch.Tensor) -> Recorder:
        self._thread.entered = tensor.device
        return self

    def __enter__(self) -> None:
        self._thread.device = self._thread.entered

    def __exit__(self, *_: object) -> None:
        self._thread.device = None

    def kernel(self, name: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*args: Any, **constants: Any) -> None:
                    device = getattr(recorder._thread, "device", None)
                    tensors = [value for value in args if isinstance(value, torch.Tensor)]
                    assert tensors and all(tensor.device == device for tensor in tensors)
                    recorder.launches.append((name, device))

                return launch

        return Kernel()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "device_of", recorder.device_of)
    for module, names in (
        (probability_rows, ("label_rows_kernel", "part_normalizers_kernel", "mixture_rows_kernel")),
        (sparse_rows, ("sparse_rows_kernel",)),
        (list_candidates, ("list_candidates_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, recorder.kernel(name))
    return recorder


def call_all(device: torch.device) -> None:
    """Each wrapper once, with tensors that have a device and no content."""
    with FakeTensorMode():
        logits_CV = torch.empty(_ROWS, _VOCABULARY, device=device)
        numbers_C = torch.empty(_ROWS, device=device)
        labels_C = torch.empty(_ROWS, dtype=torch.int64, device=device)
        probability_rows.label_rows(logits_CV, labels_C.unsqueeze(1))  # an index would ask the driver
        probability_rows.mixture_rows(logits_CV, logits_CV, 0.5)
        probability_rows.mixture_rows(logits_CV, logits_CV, numbers_C.double())
        sparse_rows.sparse_rows(
            logits_CV,
            offsets_C1=torch.empty(_ROWS + 1, dtype=torch.int64, device=device),
            ids_E=labels_C,
            teacher_E=numbers_C,
            teacher_mass_C=numbers_C,
            alphas_C=numbers_C,
            labels_C=labels_C,
            weights_C=numbers_C,
            log_base_C=None,
            log_lambda=0.0,
            gradient_dtype=torch.bfloat16,
        )
        codes_CV, norms_C = logits_CV.to(torch.int8), numbers_C.int()
        list_candidates.list_candidates(
            torch.empty(_ROWS * _ROWS, dtype=torch.int64, device=device),
            queries_BD=codes_CV,
            keys_ND=codes_CV,
            norms_N=norms_C,
            ids_N=labels_C,
            rows_S=labels_C,
            places_S=labels_C,
            bounds_HS=torch.empty(2, _ROWS, dtype=torch.int64, device=device),
            tiles_5T=torch.empty(5, 1, dtype=torch.int64, device=device),
            max_pairs=_ROWS,
            id_bits=2,
        )


def test_kernels_run_on_the_device_of_their_tensors(recorder: Recorder) -> None:
    devices = [torch.device("cuda", number) for number in range(8)]
    for device in devices:
        call_all(device)
    assert [device for _, device in recorder.launches] == [device for device in devices for _ in range(7)]
    folder = Path(sparse_rows.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    launched = {name for text in sources for name in re.findall(r"(\w+)\[\(", text)}
    assert {name for name, _ in recorder.launches} == launched  # a new kernel belongs here


def test_so_they_do_in_worker_threads(recorder: Recorder) -> None:
    devices = [torch.device("cuda", number) for number in range(8)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(call_all, devices))
    assert sorted(str(device) for _, device in recorder.launches) == sorted(
        str(device) for device in devices for _ in range(7)
    )


def test_there_is_no_launch_outside_a_guard(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake sees a wrapper without its guard."""
    monkeypatch.setattr(Recorder, "__enter__", lambda self: None)
    with pytest.raises(AssertionError):
        call_all(torch.device("cuda:3"))
