"""Part of `plan`: the sizes of a run, from flags, a model, a finished run and the stages' defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlpmem_ds.core.config import flag_name
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.maths.weighting import default_perplexity
from mlpmem_ds.models.memory_config import PRESETS, MemoryConfig
from mlpmem_ds.models.shape import read_shape
from mlpmem_ds.stages.index.factory import choose_factory, choose_num_shards, make_index, resolve_factory
from mlpmem_ds.stages.keys.plan import auto_unit_positions
from mlpmem_ds.stages.planning.config import DEFAULTS, Config
from mlpmem_ds.stages.planning.cost_model import resolve_search
from mlpmem_ds.stages.planning.workload import Machine, Workload, check_sizes
from mlpmem_ds.stages.targets.units import auto_shard_positions

_OF_BASE = ("parameters", "width", "vocab_size", "dim", "memory")
_FOLLOWERS: dict[str, tuple[str, ...]] = {
    "positions": ("unit_positions", "shard_positions", "num_shards"),
    "factory": ("num_shards",),
    "width": _OF_BASE,
    "vocab_size": _OF_BASE,
    "input_layers": ("memory",),
    "codec": ("dim",),
    "k": ("neighbour_perplexity",),
}
"""a size → those that a run has because of it, and that a plan with another one does not take from the run"""


def planned_workload(config: Config, run_sizes: dict[str, Any], machine: Machine) -> Workload:
    """The sizes: from the flags, else the model, else the calibrated run, else the stages' defaults.

    Raises:
        UserError: one is missing or does not fit, or the model cannot be read.
    """
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
    sizes: dict[str, Any] = DEFAULTS | _inherited(run_sizes, shape | flags) | shape | flags
    sizes.setdefault("neighbour_perplexity", default_perplexity(sizes["k"]))
    missing = [name for name in ("parameters", "width", "vocab_size") if name not in sizes]
    if missing:
        named = ", ".join(map(flag_name, missing))
        other_remedy = (
            ", or --calibrate a finished run"
            if config.calibrate is None
            else "; the run of --calibrate has another base, or its base is not on this disk"
        )
        raise UserError(f"{named} missing: give them, or --model{other_remedy}")
    memory = _memory(config, sizes)
    sizes["dim"] = sizes.get("dim", min(256, sizes["width"]))
    if sizes["codec"] == "raw":
        sizes["dim"] = flags.get("dim", sizes["width"])
    check_sizes(sizes)
    sizes.setdefault("unit_positions", auto_unit_positions(sizes["positions"]))
    sizes.setdefault("shard_positions", auto_shard_positions(sizes["positions"]))
    sizes["factory"] = _factory(config.factory, sizes, machine)
    sizes["num_shards"] = _num_shards(sizes)
    key_bytes = sizes["dim"] * (1 if sizes["codec"] == "int8" else 2)
    sizes["search"] = resolve_search(config.search, sizes["positions"], key_bytes, machine)
    sizes |= {"memory": memory, "parameters": int(sizes["parameters"])}
    return Workload(**{field.name: sizes[field.name] for field in dataclasses.fields(Workload)})


def _inherited(run_sizes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The run's sizes without those that follow from one that is given otherwise."""
    changed = [
        name
        for name, value in given.items()
        if name in run_sizes and value not in ("auto", run_sizes[name])  # auto names none
    ]
    left_out = {follower for name in changed for follower in _FOLLOWERS.get(name, ())}
    return {name: value for name, value in run_sizes.items() if name not in left_out}


def workload_of_run(run_sizes: dict[str, Any], machine: Machine) -> Workload:
    """The run's own sizes; stages that it lacks have the defaults, and no factor is measured for them, nor
    without the base's parameters for those that run the base."""
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
