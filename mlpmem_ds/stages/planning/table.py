"""Part of `plan`: a plan as a table for a terminal, a line a stage."""

from __future__ import annotations

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.planning.config import Config
from mlpmem_ds.stages.planning.cost_model import Cost
from mlpmem_ds.stages.planning.counts import body_operations
from mlpmem_ds.stages.planning.plan import Plan, run
from mlpmem_ds.stages.planning.words import bytes_in_words, price_in_words, time_in_words
from mlpmem_ds.stages.planning.workload import Workload


def run_as_table(config: Config, world: World) -> str:
    """As `plan.run`, for a terminal."""
    return render_table(run(config, world)).rstrip("\n")


def render_table(plan: Plan) -> str:
    """The plan in words: its sizes, a line a stage, what was assumed, and the warnings."""
    work, machine = plan.work, plan.machine
    where = f"{machine.gpus} GPUs of {machine.gpu_flops / 1e12:.0f} TFLOP/s" if machine.gpus else "no GPU"
    price = "" if plan.price_per_gpu_hour is None else f"{'price':>11}"
    gpu = f"{'on its GPU':>12}" if machine.gpus else ""
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
            f"{gpu}{'GPU hours':>11}{price}  figures"
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
        rank_gpu_bytes=max(cost.rank_gpu_bytes for cost in all_costs),
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
    held = bytes_in_words(cost.rank_gpu_bytes) if cost.rank_gpu_bytes else "-"
    gpu = f"{held:>12}" if plan.machine.gpus else ""
    time = "-" if cost.seconds is None else time_in_words(cost.seconds)
    return (
        f"{name:<9}{bytes_in_words(cost.bytes):>10}{cost.num_files:>10,}"
        f"{cost.bytes / plan.work.positions:>12.1f}{time:>10}{bytes_in_words(cost.rank_memory_bytes):>15}"
        f"{gpu}{hours:>11}{price}  {basis}"
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
