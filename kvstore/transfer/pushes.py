"""Pushes that peers asked this end for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmserve.kvstore.transfer.base import Handle, Place, Progress, TransferEngine, TransferError
from llmserve.kvstore.transfer.calls import Ask, Pushed, Stop
from llmserve.kvstore.transfer.peers import Peer, Peers
from llmserve.kvstore.transfer.runs import RunTable


@dataclass(slots=True)
class _Push:
    ask: Ask
    peer: Peer
    engine: TransferEngine
    handle: Handle
    stopped: bool = False


class Pushes:
    """Each is answered once, when it can write no more."""

    def __init__(self, engines: Mapping[str, TransferEngine], peers: Peers) -> None:
        self._engines, self._peers = engines, peers
        self._running: list[_Push] = []

    def __bool__(self) -> bool:
        return bool(self._running)

    def begin(self, ask: Ask) -> None:
        """Start a push, or say why not."""
        import numpy

        peer = self._peers.of(ask.ends)
        engine = self._engines.get(ask.engine)
        try:
            if engine is None or ask.engine not in peer.engines:
                raise TransferError(f"{ask.engine} is not open here")
            runs = RunTable(numpy.frombuffer(ask.runs, dtype=numpy.int64).reshape(-1, 3))
            handle = engine.push(self._peers.connected(peer, ask.engine), runs, Place(ask.yours), Place(ask.mine))
        except TransferError as error:
            self._peers.say(peer, Pushed(ask.ends.mover, ask.id, False, str(error)))
            return
        self._running.append(_Push(ask, peer, engine, handle))

    def stop(self, stop: Stop) -> None:
        """Nobody waits for it any more."""
        for push in self._running:
            if (push.ask.ends.mover, push.ask.id) == (stop.mover, stop.id):
                push.stopped = True

    def advance(self) -> None:
        """Tell the peers of what has ended."""
        self._running = [push for push in self._running if not self._ended(push)]

    def _ended(self, push: _Push) -> bool:
        progress = push.engine.poll(push.handle)
        if progress is Progress.RUNNING and not push.stopped:
            return False
        if not push.engine.release(push.handle):
            return False
        ok = progress is Progress.DONE
        self._peers.say(push.peer, Pushed(push.ask.ends.mover, push.ask.id, ok, "" if ok else "the push failed"))
        return True
