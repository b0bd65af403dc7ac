"""The state in a manifest: every field with its type and range. A field that does not fit is an error that names it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping

from neox.errors import CheckpointError
from neox.files import JsonObject

COUNT_LIMIT = 1 << 53  # steps, samples and tokens: integers that every JSON parser represents exactly
STEP_LIMIT = 10**15  # the step is part of a folder's name, and further steps follow
# starts of training in one folder; far below the limit of the manifest's numbers, so that later ones are readable too
START_LIMIT = 1 << 40
PROCESS_LIMIT = 1 << 24
LARGEST = sys.float_info.max

Check = Callable[[object, str], object]  # what a check returns is ignored


def integer(limit: int, least: int = 0) -> Check:
    """An integer in [least, limit)."""

    def check(value: object, where: str) -> None:
        if type(value) is not int or not least <= value < limit:
            raise fault(where, value, f"an integer from {least} to {limit - 1}")

    return check


def number(value: object, where: str) -> float:
    """A finite number; returns it."""
    if (type(value) is not int and type(value) is not float) or abs(value) > LARGEST or value != value:
        raise fault(where, value, "a finite number")
    return value


def text(value: object, where: str) -> None:
    """A string."""
    if not isinstance(value, str):
        raise fault(where, value, "a string")


def anything(value: object, where: str) -> None:
    """Any JSON value: it is compared, never computed with."""


def optional(inner: Check) -> Check:
    """null, or a value that `inner` accepts."""

    def check(value: object, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def rows(*inner: Check, any_number: bool = False) -> Check:
    """A list with one item per check, or any number of items of one kind."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, list) or (not any_number and len(value) != len(inner)):
            raise fault(where, value, "a list" if any_number else f"a list of {len(inner)}")
        checks = inner * len(value) if any_number else inner
        for index, (item, one) in enumerate(zip(value, checks, strict=True)):
            one(item, f"{where}[{index}]")

    return check


def many(inner: Check) -> Check:
    """A list of one kind."""
    return rows(inner, any_number=True)


def table(needed: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys; `others` may be missing. Further keys, of a later version, are ignored."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise fault(where, value, "an object")
        for key, one in needed.items():
            if key not in value:
                raise fault(f"{where}.{key}", None, "a value: the key is missing")
            one(value[key], f"{where}.{key}")
        for key, one in (others or {}).items():
            if key in value:
                one(value[key], f"{where}.{key}")

    return check


def values_of(inner: Check) -> Check:
    """An object with any keys."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise fault(where, value, "an object")
        for key, item in value.items():
            inner(item, f"{where}.{key}")

    return check


def fault(where: str, got: object, want: str) -> CheckpointError:
    """The error for a field."""
    return CheckpointError("the checkpoint's state is malformed", where=where, got=repr(got)[:80], want=want)


def state_check() -> Check:
    """The check of a complete state. The fields that training needs are required where optimizer state was saved."""
    count, share = integer(COUNT_LIMIT), number
    file = rows(text, text, count, count)
    source = table(
        {
            "path": text,
            "weight": share,
            "files": values_of(file),
            "span": optional(rows(count, count)),
            "epochs": optional(integer(COUNT_LIMIT, 1)),
            "samples": optional(integer(COUNT_LIMIT, 1)),
        }
    )
    stretch = rows(count, many(share), many(count))
    fields = {
        "step": integer(STEP_LIMIT),
        "updates": integer(STEP_LIMIT),
        "consumed": count,
        "tokens": count,
        "optimizer": text,
    }
    record = table(
        {
            "step": integer(STEP_LIMIT),
            "loss": optional(share),
            "lr": share,
            "grad_norm": optional(share),
            "step_time": share,
        },
        dict.fromkeys(("tokens", "samples", "targets", "tokens_per_s", "tflops", "mfu", "memory_gb"), share),
    )
    others = {
        "guard": table({}, {"losses": many(share), "skipped": count}),
        "loss_scale": table(
            {"cur_scale": positive, "cur_iter": count, "last_overflow_iter": number, "cur_hysteresis": count}
        ),
        "pending": optional(record),
        "data": table(
            {
                "settings": table({"data.seq_length": integer(COUNT_LIMIT, 1)}),
                "sources": many(source),
                "stretches": many(stretch),
            }
        ),
    }
    trained, weights = table(fields, others), table({}, fields | others)

    def check(value: object, where: str) -> None:
        (trained if isinstance(value, dict) and "optimizer" in value else weights)(value, where)

    return check


def positive(value: object, where: str) -> None:
    """A finite number above 0."""
    if number(value, where) <= 0:
        raise fault(where, value, "a number above 0")


def check_state(state: JsonObject, step: int, where: str = "body.state") -> None:
    """Check the state of a checkpoint of `step`. Raises CheckpointError that names the field."""
    state_check()(state, where)
    if state.get("step", step) != step:
        raise fault(f"{where}.step", state["step"], f"{step}, the checkpoint's step")
    pending = state.get("pending")
    if pending is not None and pending["step"] != step:
        raise fault(f"{where}.pending.step", pending["step"], f"{step}, the checkpoint's step")
    if "data" in state:
        check_data(state["data"], state.get("consumed", 0), f"{where}.data")


def check_data(data: JsonObject, consumed: int, where: str) -> None:
    """Check that the parts of a data cursor are consistent."""
    sources, stretches = data["sources"], data["stretches"]
    firsts = [first for first, _, _ in stretches]
    if not sources or not stretches:
        raise fault(where, f"{len(sources)} sources, {len(stretches)} stretches", "at least one of each")
    if firsts != sorted(set(firsts)) or firsts[-1] > consumed:
        raise fault(f"{where}.stretches", firsts, f"ascending numbers of samples, at most {consumed}")
    for index, (first, weights, taken) in enumerate(stretches):
        if (
            len(weights) != len(sources)
            or len(taken) != len(sources)
            or min(weights) < 0
            or not 0 < sum(weights) < math.inf
        ):
            raise fault(
                f"{where}.stretches[{index}]", [first, weights, taken], f"weights and counts of {len(sources)} sources"
            )
    for index, source in enumerate(sources):
        if source["files"] and "tokens" not in source["files"]:
            raise fault(f"{where}.sources[{index}].files", source["files"], "tokens among them")
