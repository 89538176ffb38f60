"""Part of `plan`: what will not fit, what takes longer than it must, and what was assumed; with remedies."""

from __future__ import annotations

import dataclasses

from mlpmem_ds.core.config import flag_name
from mlpmem_ds.stages.planning.calibration import FinishedRun
from mlpmem_ds.stages.planning.config import Config
from mlpmem_ds.stages.planning.cost_model import Cost, seconds_of_sending
from mlpmem_ds.stages.planning.words import bytes_in_words, time_in_words
from mlpmem_ds.stages.planning.workload import Machine, Workload

_POSITIONS_OF_GPU = 8192  # of a step, that keep a GPU busy for longer than sending does at usual sizes
_GPUS_OF_NODE = 16


def shortages(costs: dict[str, Cost], machine: Machine) -> list[str]:
    """Of memory and disk: a line for each stage that needs more than a node or a GPU has, one for all files.

    Args:
        costs: by stage.
        machine: with `memory_bytes` of a node, `gpu_bytes` of a GPU, and `disk_bytes` of all.
    """
    remedies = {
        "keys": "fewer ranks a node",
        "index": "fewer lists, or a smaller sample (--factory)",
        "targets": "fewer ranks a node, a smaller --dim, or --batch-positions of write_targets",
        "memory": "more ranks (ZeRO-3 spreads the state), or a smaller --preset",
    }
    gpu_remedies = {
        "keys": "a rank a node (--ranks) with --device-map auto of extract_keys",
        "memory": "more GPUs and ranks (ZeRO-3 spreads the state), a smaller --preset, or --input-codec int8",
    }
    lines = [
        f"{machine.ranks_of_node} ranks of {name} need"
        f" {bytes_in_words(machine.ranks_of_node * cost.rank_memory_bytes)} of memory and one node has"
        f" {bytes_in_words(machine.memory_bytes)}: spread them over nodes (--nodes), or take"
        f" {remedies.get(name, 'fewer ranks')}"
        for name, cost in costs.items()
        if machine.ranks_of_node * cost.rank_memory_bytes > machine.memory_bytes
    ]
    lines += [
        f"a rank of {name} holds {bytes_in_words(cost.rank_gpu_bytes)} on its GPU, and"
        f" {machine.gpus} GPUs of {bytes_in_words(machine.gpu_bytes)} for {machine.ranks} ranks have"
        f" {bytes_in_words(machine.gpu_bytes_of_rank)} each: larger GPUs (--gpu-memory-gb), or take"
        f" {gpu_remedies[name]}"
        for name, cost in costs.items()
        if cost.rank_gpu_bytes > machine.gpu_bytes_of_rank
    ]
    total = sum(cost.bytes for cost in costs.values())
    stage = max(costs, key=lambda name: costs[name].temporary_bytes)
    temporary = costs[stage].temporary_bytes
    if total + temporary > machine.disk_bytes:
        more = f"{bytes_in_words(temporary)} more while"
        needs = {
            "targets": f"the targets need {more} they are written (elsewhere: write_targets --lists)",
            "memory": f"the training needs {more} it saves a checkpoint (fewer: train --keep-checkpoints)",
        }
        lines.append(
            f"all stages together leave {bytes_in_words(total)}, {needs[stage]}, and the disk has"
            f" {bytes_in_words(machine.disk_bytes)}: a larger disk, a smaller --dim, --input-codec int8"
            " or none, or --encoding compact"
        )
    return lines


def small_batches(work: Workload, machine: Machine) -> list[str]:
    """A line where gradients and weights take longer to send than a step takes to compute."""
    sending, smooth = (
        seconds_of_sending(dataclasses.replace(work, batch_positions=size), machine)
        for size in (work.batch_positions, machine.gpus * _POSITIONS_OF_GPU)
    )
    if sending <= 2 * smooth:
        return []
    return [
        f"steps of {work.batch_positions:,} positions on {machine.gpus} GPUs send gradients and weights for"
        f" {time_in_words(sending)}: give --batch-positions of {_POSITIONS_OF_GPU:,} a GPU, or train on fewer"
    ]


def base_missing(run: FinishedRun) -> list[str]:
    """A line where a finished run gives no time to the stages that run its base."""
    if run.parameters is not None:
        return []
    return [
        f"the base of {run.root / 'keys'} is neither on this disk nor in the cache of the Hub, so the run"
        " does not teach the time of keys, nor of a training on keys without inputs: plan in the directory"
        " that the base's path starts from, or fetch the base"
    ]


def assumptions(config: Config, machine: Machine) -> list[str]:
    """What is assumed of a machine with GPUs, a line each."""
    lines = []
    if machine.gpus > machine.ranks:
        lines.append(
            f"{machine.gpus} GPUs and --ranks {machine.ranks}: a rank uses one GPU (of extract_keys with"
            f" --device-map auto several), and the plan has all of them at work: give --ranks {machine.gpus}"
        )
    if machine.gpus > _GPUS_OF_NODE * machine.nodes:
        lines.append(
            f"{machine.gpus} GPUs on {machine.nodes} {'node' if machine.nodes == 1 else 'nodes'}: few nodes"
            f" have more than {_GPUS_OF_NODE}, and what is sent between nodes takes longer; give --nodes"
        )
    if machine.gpus:
        missing = [flag_name(name) for name in ("threads", "memory_gb") if getattr(config, name) is None]
        if missing:
            lines.append(
                f"{' and '.join(missing)} not given: this machine's are assumed "
                f"({machine.cores} threads a rank, {bytes_in_words(machine.memory_bytes)} of memory)"
            )
        lines.append(
            "times on GPUs are shares of their peak (.4 forward, .35 training, .2 search) and passes over"
            " tiles of distances, not measurements: --calibrate a run on such a machine"
        )
    return lines
