"""`plan`: what a run will need in bytes, hours, GPUs and memory, stage by stage.

Bytes follow from the formats, seconds are operations over rates (cost_model.py). `--calibrate RUN`
takes the rates from a finished run on the same kind of machine, and the sizes that no flag gives and that
hold for this text and base too.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.host import host_bytes
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.planning.calibration import calibrate, read_run, sizes_of_run
from mlpmem_ds.stages.planning.config import Config
from mlpmem_ds.stages.planning.cost_model import Calibration, Cost, costs
from mlpmem_ds.stages.planning.plan_warnings import assumptions, base_missing, shortages, small_batches
from mlpmem_ds.stages.planning.sizes import planned_workload, workload_of_run
from mlpmem_ds.stages.planning.workload import Machine, Workload, cores_of_rank

_FORMAT, _VERSION = "mlpmem-plan", 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need, and what does not fit."""

    work: Workload
    machine: Machine
    costs: dict[str, Cost]
    calibrated: tuple[str, ...]
    warnings: tuple[str, ...]
    price_per_gpu_hour: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages; None where one of them cannot be planned."""
        return _sum([cost.gpu_hours for cost in self.costs.values()])

    def price(self, gpu_hours: float | None) -> float | None:
        """Of so many hours; None without a price, or without hours."""
        if gpu_hours is None or self.price_per_gpu_hour is None:
            return None
        return gpu_hours * self.price_per_gpu_hour

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where one of them cannot be planned."""
        return _sum([cost.seconds for cost in self.costs.values()])

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "work": dataclasses.asdict(self.work),
            "machine": dataclasses.asdict(self.machine),
            "stages": [
                {"name": name, **dataclasses.asdict(cost), "price": self.price(cost.gpu_hours)}
                for name, cost in self.costs.items()
            ],
            "calibrated": list(self.calibrated),
            "bytes": sum(cost.bytes for cost in self.costs.values()),
            "files": sum(cost.num_files for cost in self.costs.values()),
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "price": self.price(self.gpu_hours),
            "warnings": list(self.warnings),
        }


def run(config: Config, world: World) -> Plan:
    """Plan a run; write the JSON if --output names a file.

    Raises:
        UserError: a size is missing or does not fit, or --output is no place for a file.
    """
    if config.output is not None:
        check_output_file(config.output, example="plan.json")
    plan = make_plan(config)
    if config.output is not None and world.is_first:
        publish_json(config.output, {**plan.to_json(), "settings": plain_values(config)})
    return plan


def make_plan(config: Config) -> Plan:
    """The plan of these flags, a finished run and this machine."""
    machine = _machine(config)
    run = None if config.calibrate is None else read_run(config.calibrate)
    run_sizes = {} if run is None else sizes_of_run(run)
    work = planned_workload(config, run_sizes, machine)
    calibration = Calibration()
    if run is not None:
        calibration = calibrate(run, workload_of_run(run_sizes, machine), machine, threads=config.threads)
    result = costs(work, machine, calibration)
    return Plan(
        work=work,
        machine=machine,
        costs=result,
        calibrated=calibration.stages,
        warnings=(
            *shortages(result, machine),
            *small_batches(work, machine),
            *assumptions(config, machine),
            *([] if run is None else base_missing(run)),
        ),
        price_per_gpu_hour=config.price_per_gpu_hour,
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def _machine(config: Config) -> Machine:
    folder = Path.cwd() if config.output is None else config.output.parent
    return Machine(
        ranks=config.num_ranks,
        cores=cores_of_rank(config.threads, ranks=config.num_ranks, nodes=config.nodes),
        gpus=config.gpus,
        gpu_flops=config.gpu_tflops * 1e12,
        gpu_bytes=config.gpu_memory_gb * 1e9,
        memory_bytes=host_bytes() if config.memory_gb is None else round(config.memory_gb * 1e9),
        disk_bytes=(
            shutil.disk_usage(folder).free if config.disk_gb is None else round(config.disk_gb * 1e9)
        ),
        disk_rate=config.disk_gb_per_second * 1e9,
        network_rate=config.network_gb_per_second * 1e9,
        nodes=config.nodes,
        gpu_network_rate=config.gpu_network_gb_per_second * 1e9,
    )
