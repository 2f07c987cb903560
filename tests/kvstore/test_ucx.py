"""What only UCX can get wrong when a peer dies: its endpoints are closed while they still have work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmserve.kvstore.transfer import unavailable
from llmserve.kvstore.transfer.base import Progress, Run
from llmserve.kvstore.transfer.ucx import UcxEngine
from tests.kvstore.ends import HOST, End, Remote, wait_for

pytestmark = pytest.mark.skipif(unavailable("ucx") is not None, reason=f"UCX: {unavailable('ucx')}")

SIZE = 64 << 20


@pytest.fixture
def alone() -> Iterator[End]:
    end = End("ucx", SIZE)
    yield end
    end.engine.close()


@pytest.fixture
def victim() -> Iterator[Remote]:
    victim = Remote("ucx", SIZE, fill=9)
    yield victim
    victim.kill()


def test_a_peer_whose_death_is_heard_of_before_ucx_has_noticed_is_given_up_and_forgotten(
    alone: End, victim: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = alone.engine
    assert isinstance(engine, UcxEngine)
    peer = engine.connect(victim.description)
    handles = [engine.pull(peer, [Run(alone.address, victim.address, SIZE)], HOST, HOST) for _ in range(4)]
    assert wait_for(lambda: bool(alone.read().any()), engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_drive", lambda: None)
        victim.process.kill()
        victim.process.wait()
        assert alone.finish(handles[-1]) is Progress.FAILED
        engine.forget(peer)
    assert all(engine.release(handle) for handle in handles)
    assert wait_for(lambda: not engine._abandoned, engine), "buffers are written to for ever"
    other = End("ucx", SIZE)
    other.write(7)
    peer = engine.connect(other.description)
    again = engine.pull(peer, [Run(alone.address, other.address, SIZE)], HOST, HOST)
    assert alone.finish(again, other.engine) is Progress.DONE
    assert (alone.read() == 7).all()
    other.engine.close()
