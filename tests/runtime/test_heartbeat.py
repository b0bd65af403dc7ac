"""Progress of the main thread, as the phases of a run report it."""

from __future__ import annotations

from neox.phases import Phases
from neox.runtime.heartbeat import Heartbeat


def test_a_heartbeat_counts_phases_and_knows_the_last_completed_step():
    heartbeat = Heartbeat()
    assert (heartbeat.phase, heartbeat.count, heartbeat.step, heartbeat.watched) == ("start", 0, 0, False)
    phases = Phases(heartbeat)
    phases.enter("batch", 1)
    assert (heartbeat.phase, heartbeat.count, heartbeat.step, heartbeat.watched) == ("batch", 1, 0, False)
    phases.enter("record", 1)
    assert (heartbeat.phase, heartbeat.count, heartbeat.step, heartbeat.watched) == ("record", 2, 1, True)
    with phases.waiting():
        assert heartbeat.waits.waiting
    assert not heartbeat.waits.waiting
    phases.enter("record")
    assert (heartbeat.count, heartbeat.step) == (3, 1)
    phases.enter("batch", 2)
    assert (heartbeat.phase, heartbeat.count, heartbeat.step, heartbeat.watched) == ("batch", 4, 1, True)


def test_a_phase_without_a_step_completes_none():
    heartbeat = Heartbeat()
    Phases(heartbeat).enter("record")
    assert (heartbeat.count, heartbeat.step, heartbeat.watched) == (1, 0, False)
