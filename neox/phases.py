"""The phases of a run: announced by the code that runs them, followed by observers.

Heartbeat, profiler and fault injection are observers. A program that trains with this library can add its own:

    class Printer(Observer):
        def enter(self, phase, step=None):
            print(phase)

    train(config, Mesh.single(), phases=Phases(Printer()))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, TypeVar

PHASES = {
    "start": "config checked, torch imported, nothing joined",
    "joined": "process group and watchdog running",
    "data": "before the datasets are opened and their index files built",
    "build": "before model and engine are built",
    "restore": "before a checkpoint is restored",
    "ready": "before the first step of this start",
    "batch": "before a step asks the loader for its batch",
    "step": "before the first micro-batch of a step",
    "forward": "before the forward pass of a micro-batch",
    "backward": "before the backward pass of a micro-batch",
    "update": "loss known, before gradients are clipped and applied",
    "updated": "after the update of a step",
    "record": "after a step, before its numbers are recorded",
    "evaluate": "before a batch of an evaluation",
    "save": "before the state is copied for a checkpoint",
    "saved": "after a checkpoint was begun, or written if it is not written in the background",
}
VALUES = {
    "loss": "the loss of a micro-batch, before its backward pass",
    "loss_number": "this process's sum of losses, its gradient untouched",
    "gradient": "the gradient of one parameter in a micro-batch, before it is reduced",
    "parameter": "one weight of this process, before a step",
}

Product = TypeVar("Product")


class Scalable(Protocol):
    """A number or a tensor: what `Observer.value` may return multiplied by a number."""

    def __mul__(self: Product, factor: float, /) -> Product: ...


Value = TypeVar("Value", bound=Scalable)


class Observer:
    """Follows the phases of a run. Every method does nothing until a subclass overrides it.

    Attributes:
        changes_values: whether `value` may return another value. Hooks that cost time are installed only for such an
            observer.
    """

    changes_values = False

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread enters a phase.

        Args:
            phase: a key of PHASES.
            step: number of the optimizer step; given for `batch` and `record`.
        """

    def value(self, name: str, value: Value) -> Value:
        """The number or tensor that the run continues with in place of `value`; `name` is a key of VALUES."""
        return value

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Open while the main thread waits for other processes."""
        return contextlib.nullcontext()


class Phases:
    """Passes every announcement to all observers, in their order."""

    def __init__(self, *observers: Observer):
        self.observers = list(observers)

    def attach(self, *observers: Observer) -> None:
        """Add observers."""
        self.observers += observers

    @property
    def changes_values(self) -> bool:
        """Whether an observer may change a value."""
        return any(observer.changes_values for observer in self.observers)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Announce a phase; see `Observer.enter`."""
        for observer in self.observers:
            observer.enter(phase, step)

    def value(self, name: str, value: Value) -> Value:
        """Announce a value; returns the value to continue with."""
        for observer in self.observers:
            value = observer.value(name, value)
        return value

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the body of a `with` as waiting for other processes."""
        with contextlib.ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.waiting())
            yield
