"""Storage with sites: each call has its own, and without faults it is the plain storage."""

import errno

import pytest

from neox.checkpoint.find import find
from neox.checkpoint.storage import LOCAL
from neox.checkpoint.verify import verify
from neox.errors import DiskError
from neox.testing.faults import FaultInjector, parse
from neox.testing.storage import FaultyStorage, storage_with
from tests.checkpoint.builders import save_one

CALLS = (
    "make_dir",
    "create",
    "write",
    "sync",
    "close",
    "sync_dir",
    "rename",
    "publish",
    "unlink",
    "retain",
    "remove_dir",
)


def test_without_faults_the_local_storage_is_used():
    assert storage_with(FaultInjector()) is LOCAL
    assert isinstance(storage_with(FaultInjector(parse("eio@0:write:1"))), FaultyStorage)
    assert storage_with(FaultInjector(parse("eio@1:write:1"), rank=0)) is LOCAL


@pytest.mark.parametrize("call", CALLS)
def test_each_call_fails_at_its_site_and_nothing_is_lost(tmp_path, call):
    old = save_one(tmp_path, 1)
    keep = 1 if call in ("unlink", "retain", "remove_dir") else 0
    with pytest.raises(DiskError, match=errno.errorcode[errno.EDQUOT]):
        save_one(tmp_path, 2, keep=keep, storage=storage_with(FaultInjector(parse(f"edquot@0:{call}:1"))))
    verify(find(tmp_path, "must"))
    if not keep:
        verify(old)
    verify(save_one(tmp_path, 3, storage=storage_with(FaultInjector(parse("delay0.001@0:write:1")))))
