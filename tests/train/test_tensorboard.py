"""Event files as TensorBoard itself reads them."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neox.train.tensorboard import EventFile


def scalars(folder):
    read = EventAccumulator(str(folder)).Reload()
    return {name: [(entry.step, entry.value) for entry in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars(tmp_path):
    events = EventFile(tmp_path / "new", 1)
    events.add(1, {"loss": 2.5, "lr": 0.5})
    events.add(2, {"loss": 2.25})
    assert scalars(tmp_path / "new") == {"loss": [(1, 2.5), (2, 2.25)], "lr": [(1, 0.5)]}  # before it is closed
    events.close()


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path, monkeypatch):
    for time, first in ((1000, 1), (2000, 3)):
        monkeypatch.setattr("time.time_ns", lambda time=time: time * 10**9)
        events = EventFile(tmp_path, first)
        for step in range(first, first + 4):
            events.add(step, {"loss": time + step})
        events.close()
    assert [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())] == ["0000001000", "0000002000"]
    assert scalars(tmp_path)["loss"] == [(1, 1001), (2, 1002), (3, 2003), (4, 2004), (5, 2005), (6, 2006)]
