"""The device of a rank, a value: a stage finds it once and passes it to models, searches and kernels.

A launcher may show a rank all GPUs of its machine (then the local rank chooses), or one alone
(`--gpus-per-task=1`), which is number 0 for every local rank: hence the remainder.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.host import host_bytes
from mlpmem_ds.core.world import World


def device_of_rank(requested: str, world: World) -> torch.device:
    """The device that `--device` means on this rank, a GPU with its number.

    `auto` is this rank's own GPU where there are GPUs, else the CPU; `cuda` is this rank's own GPU; `cpu` and
    `cuda:N` are what they say. With a GPU float32 products are set to be float32's own.

    Raises:
        UserError: there is no such device here.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    if requested.startswith("cuda") and torch.cuda.is_available():
        # Some containers turn TF32 on by a variable (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and float32 products
        # then keep 10 bits: keys would differ from those of other machines.
        torch.set_float32_matmul_precision("highest")
    if requested == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", gpu_number(world))
    try:
        device = torch.device(requested)
        if device.type == "meta" or (device.type == "cpu" and device.index is not None):
            raise RuntimeError("nothing is computed there" if device.type == "meta" else "there is one CPU")
        if device.type == "cuda" and torch.cuda.is_available():
            if device.index >= torch.cuda.device_count():
                raise RuntimeError(f"this process sees {torch.cuda.device_count()} GPUs, counted from 0")
        else:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        reason = first_line(error).partition(". This could be")[0]  # torch lists all that it was built for
        raise UserError(
            f"--device {requested} is not here ({reason}): give auto, cpu, cuda or cuda:N"
        ) from error
    return device


def memory_bytes(device: torch.device) -> int:
    """Of a GPU, free or not; 0 of a CPU, whose memory is not its own."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0


def identity_of(device: torch.device) -> str:
    """Which GPU of the world this is, the same by any number that a process sees it by; "" of a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def free_host_bytes() -> int:
    """Memory of this machine that programs may still take, as Linux estimates it; without an estimate, all of
    it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        lines = dict(line.split(":") for line in text.strip().split("\n"))
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return host_bytes()


def gpu_number(world: World) -> int:
    """Which of the GPUs that this process sees is this rank's; more ranks than GPUs share them in turn."""
    return world.local_rank % max(1, torch.cuda.device_count())


def ranks_of_a_gpu(world: World) -> int:
    """How many ranks share one of the GPUs that this process sees, as far as the launcher says. A rank that
    sees one alone is taken to have it for itself (`--gpus-per-task=1`)."""
    visible = torch.cuda.device_count()
    return -(-(world.local_size or 1) // visible) if visible > 1 else 1
