"""A process alone is the first of one."""

from neox.train.place import Place


def test_the_default_is_alone():
    assert (Place().rank, Place().local_rank, Place().world_size) == (0, 0, 1)
