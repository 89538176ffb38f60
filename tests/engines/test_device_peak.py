"""The peak of a device: by its name on a listed GPU, else measured."""

from __future__ import annotations

import pytest
import torch

from mlpmem_ds.engines import device_peak


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA GH200 480GB", 9.89e14),
        ("NVIDIA H100 NVL", 8.35e14),
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA L40S", 3.62e14),
        ("NVIDIA L40", 1.81e14),
        ("NVIDIA L4", 1.21e14),
    ],
)
def test_the_longest_listed_name_gives_the_data_sheets_peak(
    name: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak.peak_of(torch.device("cuda", 0), torch.bfloat16)
    assert peak.flops == flops and name in peak.source


@pytest.mark.parametrize(
    "name", ["NVIDIA H200 NVL", "NVIDIA GB200", "NVIDIA A100X", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_a_gpu_whose_name_only_begins_or_ends_like_a_listed_one_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(device_peak, "measure_peak", lambda device, dtype: 5.0)
    assert device_peak.peak_of(torch.device("cuda", 0), torch.bfloat16).flops == 5.0


def test_other_devices_and_dtypes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_peak._SIZES, "cpu", 64)
    peak = device_peak.peak_of(torch.device("cpu"), torch.float32)
    assert peak.flops > 1e6 and "measured" in peak.source
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unlisted")
    monkeypatch.setattr(device_peak, "measure_peak", lambda device, dtype: 5.0)
    assert device_peak.peak_of(torch.device("cuda", 0), torch.bfloat16).flops == 5.0
