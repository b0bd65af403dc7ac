"""Phases reach every observer, in order; values pass through all of them."""

from __future__ import annotations

import contextlib

import pytest

from neox.phases import Observer, Phases


class Diary(Observer):
    """Writes down all it is called with, and adds to values."""

    changes_values = True

    def __init__(self, name: str, diary: list):
        self.name = name
        self.diary = diary

    def enter(self, phase, step=None):
        self.diary.append((self.name, phase, step))

    def value(self, name, value):
        return value * 2 + len(self.name)

    @contextlib.contextmanager
    def waiting(self):
        self.diary.append(f"{self.name} waits")
        yield
        self.diary.append(f"{self.name} continues")


def test_an_observer_does_nothing_by_itself():
    phases = Phases(Observer())
    phases.enter("batch", 1)
    assert phases.value("loss", 1.5) == 1.5 and not phases.changes_values
    with phases.waiting():
        pass


def test_all_observers_are_called_in_order():
    diary: list = []
    phases = Phases(Diary("a", diary))
    phases.attach(Diary("bb", diary))
    phases.enter("batch", 3)
    phases.enter("save")
    assert diary == [("a", "batch", 3), ("bb", "batch", 3), ("a", "save", None), ("bb", "save", None)]
    assert phases.changes_values and phases.value("loss", 10) == 44
    diary.clear()
    with phases.waiting():
        assert diary == ["a waits", "bb waits"]
    assert diary[2:] == ["bb continues", "a continues"]


def test_one_observer_of_many_may_change_values():
    assert Phases(Observer(), Diary("a", [])).changes_values
    assert not Phases().changes_values


def test_several_observers_are_attached_and_each_list_is_its_own():
    diary: list = []
    first, second = Phases(), Phases(Observer())
    first.attach(Diary("a", diary), Diary("bb", diary))
    first.enter("step")
    assert [name for name, *_ in diary] == ["a", "bb"] and first.changes_values
    assert len(first.observers) == 2 and len(second.observers) == 1 and not second.changes_values


def test_waiting_ends_for_all_observers_after_an_error():
    closed: list = []

    class Watch(Observer):
        @contextlib.contextmanager
        def waiting(self):
            try:
                yield
            finally:
                closed.append(self)

    phases = Phases(Watch(), Watch())
    with pytest.raises(TimeoutError), phases.waiting():
        raise TimeoutError
    assert closed == phases.observers[::-1]
