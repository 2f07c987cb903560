"""Probes of a pair of ends: both directions of every engine once, one at a time so that none measures another."""

from __future__ import annotations

from llmserve.kvstore.transfer.base import Place, Region, Run
from llmserve.kvstore.transfer.fetches import Job
from llmserve.kvstore.transfer.ladder import Rung
from llmserve.kvstore.transfer.orders import Fetch
from llmserve.kvstore.transfer.pacing import TokenBucket
from llmserve.kvstore.transfer.peers import Peer, Peers

_PROBE_S = 2.0


class Probes:
    """Which probe is next."""

    def __init__(self, memory: Region | None, peers: Peers, bucket: TokenBucket, piece_bytes: int) -> None:
        """``memory`` is registered already; without it nothing is probed. ``piece_bytes``: what pages come in."""
        self._memory, self._peers, self._bucket = memory, peers, bucket
        self._piece_bytes = piece_bytes

    def next(self, now_s: float) -> Job | None:
        """The probe to be made now, its bytes charged; only where pages were fetched from."""
        if self._memory is None:
            return None
        for peer in self._peers:
            if not (peer.wanted and peer.names and peer.ends.probe_bytes):
                continue
            for rung in peer.ladder.due(now_s):
                if self._bucket.wait_s(now_s) > 0:
                    return None
                job = _probe(self._memory, peer, rung, self._piece_bytes)
                self._bucket.take(job.size_bytes, now_s)
                return job
        return None


def _probe(memory: Region, peer: Peer, rung: Rung, piece_bytes: int) -> Job:
    size_bytes = min(memory.size_bytes, peer.ends.probe_bytes) // 2
    piece = max(1, min(piece_bytes, size_bytes))
    # Written to the second half: the peer may probe at the same time and reads the first.
    runs = [
        Run(memory.address + size_bytes + at, peer.ends.probe + at, min(piece, size_bytes - at))
        for at in range(0, size_bytes, piece)
    ]
    there = Place(peer.ends.probe_gpu)
    fetch = Fetch(f"probe of {peer.ends.mover[:8]}", peer.ends, runs, memory.place, there, None, _PROBE_S)
    return Job(fetch, peer, size_bytes, probe=rung)
