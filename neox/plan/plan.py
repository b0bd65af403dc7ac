"""The plan of a run: as a value, as text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from neox.config.problems import raise_problems
from neox.config.schema import Config
from neox.config.validate import problem
from neox.config.values import flatten
from neox.errors import ConfigError
from neox.files import JsonObject
from neox.model.shapes import num_parameters
from neox.plan.activations import Activations
from neox.plan.communication import traffic
from neox.plan.devices import Device
from neox.plan.fit import Change, Estimate, changes, conflicts, estimate
from neox.runtime.launch import MAX_PROCESSES

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Requirements of a run.

    Attributes:
        config: config of the run.
        world_size: number of devices.
        device: type of the devices.
        estimate: estimate for the unchanged config; None if it breaks rules.
        refused: the broken rules.
        change: the smallest change that makes it run and fit; None if it fits unchanged, or if there is none.
        fastest: the fastest change of a few keys; None if there is none, or the smallest is as fast.
    """

    config: Config
    world_size: int
    device: Device
    estimate: Estimate | None
    refused: tuple[ConfigError, ...]
    change: Change | None
    fastest: Change | None = None

    @property
    def fits(self) -> bool:
        """Whether the unchanged config runs and fits."""
        return self.estimate is not None and self.estimate.peak <= self.device.usable


def make_plan(config: Config, world_size: int, device: Device) -> Plan:
    """Plan a config on a number of devices. No tensor is created, and no data is read.

    Raises:
        ConfigError: the config breaks rules, and no change of layout or batch size fixes that.
    """
    if not 1 <= world_size <= MAX_PROCESSES:
        want = f"1 to {MAX_PROCESSES}"
        raise ConfigError("wrong number of devices", where="--world-size", got=world_size, want=want)
    broken = conflicts(config, world_size, device.kind)
    values = dict(flatten(config)) if broken else {}
    refused = tuple(problem(conflict, values, {}) for conflict in broken)
    found = None if broken else estimate(config, world_size, device)
    fits = found is not None and found.peak <= device.usable
    change, fastest = (None, None) if fits else changes(config, world_size, device)
    if refused and change is None:
        raise_problems(refused)
    return Plan(config, world_size, device, found, refused, change, None if fastest is change else fastest)


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def headline(plan: Plan) -> str:
    """Describe model and devices on one line."""
    model, device = plan.config.model, plan.device
    usable = f"{device.usable / GB:.4g} of {device.memory / GB:.4g} GB usable"
    size = f"{num_parameters(model):,} parameters, {model.num_layers} layers"
    return f"{size} | {plan.world_size} x {device.name} ({usable})"


def layout_line(found: Estimate) -> str:
    """Describe the layout on one line."""
    layout, batch, config = found.layout, found.layout.batch, found.config
    axes = [
        f"{name} {size}"
        for name, size in (("tensor", layout.tp), ("pipeline", layout.pp), ("context", layout.cp))
        if size > 1
    ]
    parts = [
        ", ".join([*axes, f"data {layout.dp}"]) + (", sequence parallel" if layout.sequence else ""),
        f"ZeRO {config.zero.stage}",
        config.precision.dtype,
    ]
    parts.append(f"checkpointing {config.train.activation_checkpointing}")
    parts.append(
        f"batch {batch.global_batch_size} = {batch.micro_batch_size} x {batch.gradient_accumulation} x "
        f"{batch.dp}, {config.data.seq_length} tokens"
    )
    return " | ".join(parts)


COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "buffers",
    "activations",
    "uncheckpointed",
    "logits",
    "peak",
    "at",
    "checkpoint",
)


def memory_lines(found: Estimate) -> list[str]:
    """Format a table of memory, one row per stage, in GB per process.

    Consecutive stages with the same parameters share a row, which shows the first stage, as it needs the most memory.
    """
    rows = [["stage", "blocks", "parameters", *COLUMNS]]
    for stage, memory in zip(found.layout.stages, found.memories, strict=True):
        act = memory.activations
        same = [str(stage.blocks), f"{stage.parameters:,}"]
        if rows[-1][1:3] == same and not act.logits:
            rows[-1][0] = f"{rows[-1][0].split('-')[0]}-{stage.number}"
            continue
        sizes = (
            memory.parameters,
            memory.gradients,
            memory.optimizer,
            memory.buffers,
            act.resident,
            act.uncheckpointed * act.in_flight,
            act.logits,
            memory.peak,
        )
        rows.append(
            [
                str(stage.number),
                *same,
                *(f"{size / GB:.3f}" for size in sizes),
                memory.moment,
                f"{memory.checkpoint / GB:.3f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def time_lines(found: Estimate, device: Device) -> list[str]:
    """Describe FLOPs, the time of a step and of the run."""
    time, batch, config = found.time, found.layout.batch, found.config
    tokens = batch.global_batch_size * config.tokens_per_sample
    processes = found.layout.replicas * found.layout.tp * found.layout.pp
    mfu = time.flops / time.total / processes / device.peak(config.precision.dtype)
    names = ("products", "elementwise", "messages", "bubble", "reduction", "update")
    parts = ", ".join(f"{name} {duration(vars(time)[name])}" for name in names if vars(time)[name] > 0)
    sent = max(sum(row.sent for row in traffic(config, found.layout, stage)) for stage in found.layout.stages)
    return [
        f"step: {time.flops:.4g} FLOP, {time.flops / tokens:.4g} per token; a process sends {sent / GB:.4g} GB",
        f"estimated time: {duration(time.total)} per step ({parts}); {tokens / time.total:,.0f} tokens/s, MFU "
        f"{100 * mfu:.0f} %",
        f"{config.train.train_iters:,} steps: {duration(time.total * config.train.train_iters)}, "
        f"{time.flops * config.train.train_iters:.3g} FLOP",
    ]


def describe(found: Estimate, device: Device) -> list[str]:
    """Describe an estimate in full."""
    host = max(memory.host for memory in found.memories)
    lines = [layout_line(found), "", "one process, GB (10^9 bytes):", *memory_lines(found)]
    if host:
        lines.append(f"host memory in addition: {host / GB:.3f} GB per process")
    return [*lines, "", *time_lines(found, device)]


def verdict(plan: Plan) -> list[str]:
    """State whether the run fits, and which change would make it fit."""
    device = plan.device
    if plan.fits and plan.estimate is not None:
        return [f"FITS: {plan.estimate.peak / GB:.2f} of {device.usable / GB:.2f} GB"]
    if plan.estimate is None:
        lines = ["DOES NOT FIT: the config is invalid", *(f"  {error.line()}" for error in plan.refused)]
    else:
        lines = [f"DOES NOT FIT: {plan.estimate.peak / GB:.2f} GB needed, {device.usable / GB:.2f} GB usable"]
    if plan.change is None:
        return [
            *lines,
            "no change of layout, micro-batch size, checkpointing or ZeRO stage makes it fit; use more or "
            "larger devices",
        ]
    lines += [f"smallest change that fits: {change_text(plan.change)}"]
    if plan.fastest is not None:
        lines += [f"fastest change that fits: {change_text(plan.fastest)}"]
    return [*lines, "with the smallest:"]


def change_text(change: Change) -> str:
    """Format a change as options, with the resulting memory and time."""
    keys = " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.keys.items()
    )
    return f"--set {keys} ({change.estimate.peak / GB:.2f} GB, {duration(change.estimate.time.total)} per step)"


def lines(plan: Plan) -> list[str]:
    """Format the plan as lines of text."""
    out = [headline(plan)]
    if plan.estimate is not None:
        out += describe(plan.estimate, plan.device)
    out += ["", *verdict(plan)]
    if plan.change is not None:
        out += ["", *describe(plan.change.estimate, plan.device)]
    return [
        *out,
        "",
        f"device: {plan.device.source}",
        "Sizes of tensors are computed, times are a first-order estimate (docs/plan.md).",
    ]


def estimate_json(found: Estimate) -> JsonObject:
    """Convert an estimate to JSON values. Sizes are in bytes, times in seconds."""
    layout, batch = found.layout, found.layout.batch
    stages = []
    for stage, memory in zip(layout.stages, found.memories, strict=True):
        row: JsonObject = {
            "stage": stage.number,
            "blocks": [stage.first, stage.end],
            "parameters": stage.parameters,
            **asdict(memory),
        }
        row["activations"] = activations_json(memory.activations)
        sent: dict[str, float] = dict.fromkeys(("tensor", "context", "pipeline", "data"), 0.0)
        for each in traffic(found.config, layout, stage):
            sent[each.axis] += each.sent
        row["sent_per_step"] = sent
        stages.append({**row, "peak": memory.peak, "moment": memory.moment})
    axes = {
        "tensor": layout.tp,
        "pipeline": layout.pp,
        "context": layout.cp,
        "data": layout.dp,
        "sequence": layout.sequence,
    }
    steps = found.config.train.train_iters
    return {
        "layout": axes,
        "batch": asdict(batch),
        "stages": stages,
        "peak": found.peak,
        "time": asdict(found.time),
        "flops_per_token": found.time.flops / batch.global_batch_size / found.config.tokens_per_sample,
        "total_seconds": found.time.total * steps,
        "total_flops": found.time.flops * steps,
    }


def activations_json(found: Activations) -> JsonObject:
    """Convert activations to JSON values. The names are part of the output format, which does not change."""
    values = asdict(found) | {"kept": found.saved, "whole": found.uncheckpointed, "resident": found.resident}
    return {name: value for name, value in values.items() if name not in ("saved", "uncheckpointed")}


def as_json(plan: Plan) -> JsonObject:
    """Convert the plan to JSON values."""
    return {
        "parameters": num_parameters(plan.config.model),
        "world_size": plan.world_size,
        "device": asdict(plan.device),
        "fits": plan.fits,
        "refused": [error.line() for error in plan.refused],
        "estimate": None if plan.estimate is None else estimate_json(plan.estimate),
        "change": change_json(plan.change),
        "fastest": change_json(plan.fastest),
    }


def change_json(change: Change | None) -> JsonObject | None:
    """Convert a change to JSON values."""
    return None if change is None else {"keys": change.keys, "estimate": estimate_json(change.estimate)}
