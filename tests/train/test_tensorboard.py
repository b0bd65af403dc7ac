"""Event files as TensorBoard itself reads them."""

import io
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from neox.train.tensorboard import EventFile, append


def scalars(folder):
    read = EventAccumulator(str(folder)).Reload()
    return {name: [(entry.step, entry.value) for entry in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars(tmp_path):
    begin = time.time()
    events = EventFile(tmp_path / "run" / "new", 1)
    events.add(1, {"loss": 2.5, "lr": 0.5})
    events.add(2, {"loss": 2.25})
    assert scalars(tmp_path / "run" / "new") == {"loss": [(1, 2.5), (2, 2.25)], "lr": [(1, 0.5)]}  # before it is closed
    events.close()
    read = [event.wall_time for event in EventFileLoader(str(events.path)).Load()]
    assert len(read) == 4
    assert all(begin <= when <= time.time() for when in read)  # TensorBoard's axis of relative time


def test_a_record_that_the_disk_cuts_short_is_taken_back(tmp_path):
    path = tmp_path / "events"
    with path.open("ab", buffering=0) as file:
        append(file, b"first")
        cut = Cut(file.fileno(), "ab", closefd=False)
        with pytest.raises(OSError, match="full"):
            append(cut, b"second")
        append(file, b"third")
    assert path.read_bytes() == b"firstthird"


class Cut(io.FileIO):
    """A file on a disk that has room for three bytes."""

    room = 3

    def write(self, data):
        if not self.room:
            raise OSError("full")
        count = super().write(bytes(data[: self.room]))
        self.room -= count
        return count


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path, monkeypatch):
    for second, first in ((1000, 1), (2000, 3)):
        monkeypatch.setattr("time.time_ns", lambda second=second: second * 10**9)
        events = EventFile(tmp_path, first)
        for step in range(first, first + 4):
            events.add(step, {"loss": second + step})
        events.close()
    assert [path.name.split(".")[3] for path in sorted(tmp_path.iterdir())] == ["0000001000", "0000002000"]
    assert scalars(tmp_path)["loss"] == [(1, 1001), (2, 1002), (3, 2003), (4, 2004), (5, 2005), (6, 2006)]
