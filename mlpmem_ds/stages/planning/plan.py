"""`plan`: what a run will need in bytes, hours, GPUs and memory, stage by stage.

Bytes follow from the formats, seconds are operations over rates (cost_model.py). `--calibrate RUN`
takes the sizes that no flag gives, and the rates, from a finished run on the same kind of machine.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.world import World
from mlpmem_ds.maths.weighting import default_perplexity
from mlpmem_ds.models.memory_config import PRESETS, MemoryConfig
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.index.factory import (
    choose_factory,
    choose_num_shards,
    make_index,
    resolve_factory,
)
from mlpmem_ds.stages.keys.plan import auto_unit_positions
from mlpmem_ds.stages.planning.calibration import calibrate, read_run, sizes_of_run
from mlpmem_ds.stages.planning.config import DEFAULTS, Config
from mlpmem_ds.stages.planning.cost_model import (
    Calibration,
    Cost,
    costs,
    resolve_search,
    seconds_of_sending,
)
from mlpmem_ds.stages.planning.counts import body_operations
from mlpmem_ds.stages.planning.workload import Machine, Workload
from mlpmem_ds.stages.targets.units import auto_shard_positions

_logger = logging.getLogger(__name__)
_POSITIONS_OF_GPU = 8192  # of a step, that keep a GPU busy for longer than sending does at usual sizes
_GPUS_OF_NODE = 16
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
    """Plan a run; write the JSON if --output names a file."""
    if config.output is not None and (config.output.is_dir() or not config.output.parent.is_dir()):
        raise UserError(
            f"--output {config.output}: name a file in a directory that exists, such as plan.json"
        )
    plan = make_plan(config)
    if config.output is not None and world.is_first:
        publish_json(config.output, {**plan.to_json(), "settings": plain_values(config)})
    return plan


def run_as_table(config: Config, world: World) -> str:
    """As `run`, for a terminal."""
    return table(run(config, world)).rstrip("\n")


def make_plan(config: Config) -> Plan:
    """The plan of these flags, a finished run and this machine."""
    machine = _machine(config)
    run = None if config.calibrate is None else read_run(config.calibrate)
    run_sizes = {} if run is None else sizes_of_run(run)
    work = _workload(config, run_sizes, machine)
    calibration, calibrated = Calibration(), tuple[str, ...]()
    if run is not None:
        calibration = calibrate(run, _workload_of_run(run_sizes, machine), machine)
        calibrated = run.stages
    result = costs(work, machine, calibration)
    return Plan(
        work=work,
        machine=machine,
        costs=result,
        calibrated=calibrated,
        warnings=(
            *_warnings(result, machine),
            *_warnings_of_training(work, machine),
            *_warnings_of_machine(config, machine),
        ),
        price_per_gpu_hour=config.price_per_gpu_hour,
    )


def table(plan: Plan) -> str:
    """The plan in words, a line a stage."""
    work, machine = plan.work, plan.machine
    where = f"{machine.gpus} GPUs of {machine.gpu_flops / 1e12:.0f} TFLOP/s" if machine.gpus else "no GPU"
    price = "" if plan.price_per_gpu_hour is None else f"{'price':>11}"
    lines = [
        (
            f"{work.positions:,} positions · base of {work.parameters / 1e6:,.1f} M parameters, width"
            f" {work.width}, vocabulary {work.vocab_size:,} · keys {work.codec} x {work.dim} · {work.factory}"
            f" · {work.search} search, k {work.k} · memory of {work.memory.num_parameters() / 1e6:,.1f} M"
            " parameters"
        ),
        (
            f"{machine.ranks} ranks of {machine.cores} threads, {where}, {machine.memory_bytes / 1e9:.1f} GB"
            f" of memory, {machine.disk_bytes / 1e9:.1f} GB of disk"
        ),
        "",
        (
            f"{'stage':<9}{'on disk':>10}{'files':>10}{'B/position':>12}{'time':>10}{'memory a rank':>15}"
            f"{'GPU hours':>11}{price}  figures"
        ),
    ]
    for name, cost in plan.costs.items():
        lines.append(_row(name, cost, plan, basis=_basis(plan, name)))
    all_costs = list(plan.costs.values())
    total = Cost(
        bytes=sum(cost.bytes for cost in all_costs),
        num_files=sum(cost.num_files for cost in all_costs),
        operations=sum(cost.operations for cost in all_costs),
        seconds=plan.seconds,
        rank_memory_bytes=max(cost.rank_memory_bytes for cost in all_costs),
        gpu_hours=plan.gpu_hours,
    )
    lines.append(_row("all", total, plan, basis=""))
    lines += [f"{name}: {cost.limit}" for name, cost in plan.costs.items() if cost.limit]
    if work.input_codec == "none":
        lines.append(_words_on_online_inputs(work))
    lines.append(
        f"A stage takes no less time than its bytes do at {machine.disk_rate / 1e9:g} GB/s of the disk"
        " (--disk-gb-per-second)."
    )
    return "\n".join([*lines, "", *(f"warning: {line}" for line in plan.warnings)]).rstrip() + "\n"


def _row(name: str, cost: Cost, plan: Plan, *, basis: str) -> str:
    hours = "-" if cost.gpu_hours is None else f"{cost.gpu_hours:.2f}"
    price = "" if plan.price_per_gpu_hour is None else f"{price_in_words(plan.price(cost.gpu_hours)):>11}"
    time = "-" if cost.seconds is None else time_in_words(cost.seconds)
    return (
        f"{name:<9}{bytes_in_words(cost.bytes):>10}{cost.num_files:>10,}"
        f"{cost.bytes / plan.work.positions:>12.1f}{time:>10}{bytes_in_words(cost.rank_memory_bytes):>15}"
        f"{hours:>11}{price}  {basis}"
    ).rstrip()


def _basis(plan: Plan, stage: str) -> str:
    """What the time of a stage rests on."""
    if plan.costs[stage].limit:
        return "not supported, see below"
    if stage in plan.calibrated:
        return "from the run"
    return "assumed rates" if plan.costs[stage].gpu_hours else "estimate"


def _words_on_online_inputs(work: Workload) -> str:
    """What it costs that keys store no inputs."""
    online = body_operations(work) / work.positions
    trained = float(work.memory.training_flops())
    return (
        f"The keys store no inputs: the base computes them in each epoch, {online / 1e9:.3g} GFLOP a position"
        f" and {online / trained:.2g} times the memory's own training (--stride {work.block_size} would halve"
        " overlapping windows; --input-codec int8 stores inputs)."
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def _workload(config: Config, run_sizes: dict[str, Any], machine: Machine) -> Workload:
    """The sizes: from the flags, else the model, else the calibrated run, else the stages' defaults."""
    flags = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) is not None
    }
    shape: dict[str, Any] = {}
    if config.model is not None:
        try:
            shape = dataclasses.asdict(read_shape(config.model))
        except ValueError as error:
            raise UserError(
                f"--model {config.model}: {error}; give --parameters, --width and --vocab-size instead"
            ) from error
    # The keys and the memory of another base have other sizes than the run's, and units follow the positions.
    own = ("unit_positions", "shard_positions", *(("dim", "memory") if shape or config.input_layers else ()))
    inherited = {name: value for name, value in run_sizes.items() if name not in own}
    sizes: dict[str, Any] = DEFAULTS | inherited | shape | flags
    if "k" in flags and "neighbour_perplexity" not in flags:
        sizes.pop("neighbour_perplexity", None)  # the run's belongs to the run's k
    sizes.setdefault("neighbour_perplexity", default_perplexity(sizes["k"]))
    missing = [name for name in ("parameters", "width", "vocab_size") if name not in sizes]
    if missing:
        raise UserError(
            f"{', '.join(map(_flag, missing))} missing: give them, or --model, or --calibrate a finished run"
        )
    memory = _memory(config, sizes)
    sizes["dim"] = sizes.get("dim", min(256, sizes["width"]))
    if sizes["codec"] == "raw":
        sizes["dim"] = flags.get("dim", sizes["width"])
    sizes["unit_positions"] = auto_unit_positions(sizes["positions"])
    sizes["shard_positions"] = auto_shard_positions(sizes["positions"])
    sizes["factory"] = _factory(config.factory, sizes, machine)
    sizes["num_shards"] = _num_shards(sizes)
    key_bytes = sizes["dim"] * (1 if sizes["codec"] == "int8" else 2)
    sizes["search"] = resolve_search(config.search, sizes["positions"], key_bytes, machine)
    sizes |= {"memory": memory, "parameters": int(sizes["parameters"])}
    return Workload(**{field.name: sizes[field.name] for field in dataclasses.fields(Workload)})


def _workload_of_run(run_sizes: dict[str, Any], machine: Machine) -> Workload:
    """The run's own sizes; stages that it lacks have the defaults, and no factor is measured for them."""
    sizes: dict[str, Any] = DEFAULTS | {"parameters": 1, "search": "exact"} | run_sizes
    sizes.setdefault("neighbour_perplexity", default_perplexity(sizes["k"]))
    if "factory" not in sizes:
        sizes["factory"] = choose_factory(sizes["positions"], sizes["dim"], machine.memory_bytes)[0]
    sizes["num_shards"] = _num_shards(sizes)
    sizes.setdefault("shard_positions", auto_shard_positions(sizes["positions"]))
    memory = sizes.get("memory")
    sizes["memory"] = MemoryConfig.from_dict(memory) if memory else _default_memory(sizes)
    return Workload(**{field.name: sizes[field.name] for field in dataclasses.fields(Workload)})


def _memory(config: Config, sizes: dict[str, Any]) -> MemoryConfig:
    memory = _memory_of_size(config, sizes)
    if config.head is None:
        return memory
    if config.head == "frozen" and memory.hidden_size != sizes["width"]:
        raise UserError(
            f"--head frozen: the base's head reads {sizes['width']:,} numbers, and the memory is"
            f" {memory.hidden_size:,} wide: leave out --preset, or take one of that width"
        )
    return dataclasses.replace(memory, shared_head="that of the base" if config.head == "frozen" else None)


def _memory_of_size(config: Config, sizes: dict[str, Any]) -> MemoryConfig:
    if config.preset is not None:
        memory = PRESETS[config.preset](sizes["vocab_size"])
        return dataclasses.replace(memory, input_size=sizes["input_layers"] * sizes["width"])
    return MemoryConfig.from_dict(sizes["memory"]) if "memory" in sizes else _default_memory(sizes)


def _default_memory(sizes: dict[str, Any]) -> MemoryConfig:
    """Four blocks of the base's width, as train makes them."""
    width = sizes["width"]
    return MemoryConfig(
        input_size=sizes["input_layers"] * width,
        hidden_size=width,
        intermediate_size=4 * width,
        num_blocks=4,
        vocab_size=sizes["vocab_size"],
    )


def _factory(factory: str, sizes: dict[str, Any], machine: Machine) -> str:
    factory = resolve_factory(factory, sizes["positions"], sizes["dim"], machine.memory_bytes)[0]
    try:
        make_index(factory, sizes["dim"], sizes["positions"])
    except ValueError as error:
        raise UserError(f"--factory: {error}") from error
    return factory


def _num_shards(sizes: dict[str, Any]) -> int:
    """As asked, or as build_index chooses it."""
    num_lists = make_index(sizes["factory"], sizes["dim"], sizes["positions"]).num_lists
    return sizes["num_shards"] or choose_num_shards(sizes["positions"], num_lists)


def _machine(config: Config) -> Machine:
    folder = Path.cwd() if config.output is None else config.output.parent
    return Machine(
        ranks=config.ranks,
        cores=config.threads or max(1, (os.cpu_count() or 1) // config.ranks),
        gpus=config.gpus,
        gpu_flops=config.gpu_tflops * 1e12,
        gpu_bytes=config.gpu_memory_gb * 1e9,
        memory_bytes=(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if config.memory_gb is None
            else round(config.memory_gb * 1e9)
        ),
        disk_bytes=(
            shutil.disk_usage(folder).free if config.disk_gb is None else round(config.disk_gb * 1e9)
        ),
        disk_rate=config.disk_gb_per_second * 1e9,
        network_rate=config.network_gb_per_second * 1e9,
        nodes=config.nodes,
        gpu_network_rate=config.gpu_network_gb_per_second * 1e9,
    )


def _warnings(result: dict[str, Cost], machine: Machine) -> list[str]:
    """What will not fit, with a remedy."""
    remedies = {
        "keys": "fewer ranks a node",
        "index": "fewer lists, or a smaller sample (--factory)",
        "targets": "fewer ranks a node, a smaller --dim, or --batch-positions of write_targets",
        "memory": "more ranks (ZeRO-3 spreads the state), or a smaller --preset",
    }
    lines = [
        f"{machine.ranks_of_node} ranks of {name} need"
        f" {bytes_in_words(machine.ranks_of_node * cost.rank_memory_bytes)} of memory and one node has"
        f" {bytes_in_words(machine.memory_bytes)}: spread them over nodes (--nodes), or take"
        f" {remedies.get(name, 'fewer ranks')}"
        for name, cost in result.items()
        if machine.ranks_of_node * cost.rank_memory_bytes > machine.memory_bytes
    ]
    total = sum(cost.bytes for cost in result.values())
    temporary = max(cost.temporary_bytes for cost in result.values())
    if total + temporary > machine.disk_bytes:
        lines.append(
            f"all stages together leave {bytes_in_words(total)}, the targets need {bytes_in_words(temporary)}"
            f" more while they are written (elsewhere: write_targets --lists), and the disk has"
            f" {bytes_in_words(machine.disk_bytes)}: a larger disk, a smaller --dim, --input-codec int8"
            " or none, or --encoding compact"
        )
    return lines


def _warnings_of_training(work: Workload, machine: Machine) -> list[str]:
    """Of small batches, whose gradients and weights take longer to send than to compute with."""
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


def _warnings_of_machine(config: Config, machine: Machine) -> list[str]:
    """What is assumed of a machine with GPUs."""
    lines = []
    if machine.gpus > _GPUS_OF_NODE * machine.nodes:
        lines.append(
            f"{machine.gpus} GPUs on {machine.nodes} {'node' if machine.nodes == 1 else 'nodes'}: few nodes"
            f" have more than {_GPUS_OF_NODE}, and what is sent between nodes takes longer; give --nodes"
        )
    if machine.gpus:
        missing = [_flag(name) for name in ("threads", "memory_gb") if getattr(config, name) is None]
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def bytes_in_words(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def price_in_words(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.2f}" if amount < 1000 else f"{amount:,.0f}"


def time_in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"
