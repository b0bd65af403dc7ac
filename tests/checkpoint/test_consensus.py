"""Errors over the wire. (The exchange between real processes is tested in test_save.py.)"""

import json

import pytest

from neox import errors
from neox.checkpoint.consensus import RankGroup, describe, revive
from neox.config.problems import ConfigErrors

KINDS = [errors.NeoxError, *(kind for kind in errors.NeoxError.__subclasses__() if kind.__module__ == errors.__name__)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_retain_class_and_text(tmp_path, kind):
    error = kind("what", where=tmp_path, got=3, want="that", do="this")
    back = revive(json.loads(json.dumps(describe(error, 5))))
    assert type(back) is kind
    assert back.line() == error.line().replace("where=", "where=rank 5: ")


def test_an_error_without_a_location_gets_its_rank():
    assert revive(describe(errors.DataError("x"), 2)).line() == "error[3] x; where=rank 2"


def test_several_config_errors_retain_their_exit_code():
    several = ConfigErrors([errors.ConfigError("first", where="a"), errors.ConfigError("second", where="b")])
    back = revive(json.loads(json.dumps(describe(several, 1))))
    assert (type(back), back.exit_code, back.line()) == (errors.ConfigError, 2, "error[2] first; where=rank 1: a")


def test_unexpected_exceptions_retain_their_class_name():
    assert revive(describe(KeyError("k"), 0)).line() == "error[1] KeyError: 'k'; where=rank 0"


def test_a_single_process_exchanges_with_itself():
    peers = RankGroup()
    assert peers.all_gather_json({"a": 1}) == [{"a": 1}]
    assert peers.run_on_all(lambda: 7) == [7]
    with pytest.raises(ZeroDivisionError):
        peers.run_on_all(lambda: 1 // 0)


def test_several_ranks_need_a_process_group():
    with pytest.raises(errors.CheckpointError, match=r"torch\.distributed is not initialised"):
        RankGroup(0, 2)


def test_an_error_keeps_every_part_and_one_of_no_class_of_ours_is_general():
    error = errors.DiskError("what", where="there", got=1, want=2, do="this")
    name, parts = describe(error, 3)
    assert (name, parts) == (
        "DiskError",
        {"what": "what", "where": "rank 3: there", "got": "1", "want": "2", "do": "this"},
    )
    assert revive(("Unheard", parts)).exit_code == errors.NeoxError("x").exit_code


class Pair(RankGroup):
    """Rank 0 of two, whose peer gives a fixed answer."""

    def __init__(self, other):
        super().__init__()
        self.world_size = 2
        self.other = other

    def all_gather_json(self, message):
        return json.loads(json.dumps([message, self.other]))


def test_results_are_in_the_order_of_ranks_and_none_is_a_result():
    assert Pair([[5], None]).run_on_all(lambda: 7) == [7, 5]
    assert Pair([[None], None]).run_on_all(lambda: None) == [None, None]
    assert Pair([[[]], None]).run_on_all(lambda: [[1]]) == [[[1]], []]


def test_the_error_of_the_first_rank_that_fails_is_raised():
    theirs = [[], describe(errors.DiskError("theirs", where="there"), 1)]
    with pytest.raises(errors.DiskError, match="theirs; where=rank 1: there"):
        Pair(theirs).run_on_all(lambda: 7)
    for other in (theirs, [[5], None]):
        with pytest.raises(errors.DataError, match="ours; where=rank 0") as caught:
            Pair(other).run_on_all(lambda: (_ for _ in ()).throw(errors.DataError("ours")))
        assert isinstance(caught.value.__cause__, errors.DataError)


def test_an_interrupt_ends_this_process_without_a_message_to_others(monkeypatch):
    monkeypatch.setattr(Pair, "all_gather_json", lambda *_: pytest.fail("others were asked"))
    for kind in (KeyboardInterrupt, SystemExit):
        with pytest.raises(kind):
            Pair(None).run_on_all(lambda kind=kind: (_ for _ in ()).throw(kind()))


def test_what_a_single_process_raises_is_the_error_itself():
    error = errors.DiskError("x", where="here")
    with pytest.raises(errors.DiskError) as caught:
        RankGroup().run_on_all(lambda: (_ for _ in ()).throw(error))
    assert caught.value is error and "rank" not in error.line()
