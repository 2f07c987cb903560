"""Pages on their way to the storage classes: within bounds, and each written once unless it has to be."""

from __future__ import annotations

import asyncio

from tests.kvstore.test_tiers import World, key, page

PAGES = 12


class Writing:
    """A write-behind over a store whose writes wait until they may go on."""

    def __init__(self, bound_bytes: int) -> None:
        from llmserve.workers.offload.writing import WriteBehind

        self.world = World()
        self.goes_on = asyncio.Event()
        self.waiting_bytes = self.most_waiting_bytes = 0
        self._encoded, self._write = self.world.tiers.encoded, self.world.tiers.write
        self.world.tiers.encoded = self.encoded  # type: ignore[method-assign, assignment]
        self.world.tiers.write = self.write  # type: ignore[method-assign, assignment]
        self.behind = WriteBehind(self.world.tiers, bound_bytes, parallel=4)
        self._encoding = 0

    async def encoded(self, *arguments: object) -> bytes | None:
        self._encoding += 1
        data = await self._encoded(*arguments)  # type: ignore[arg-type]
        self._encoding -= 1
        assert data is not None
        self.waiting_bytes += len(data)
        self.most_waiting_bytes = max(self.most_waiting_bytes, self.waiting_bytes)
        return data

    async def write(self, name: object, data: bytes, **options: object) -> bool:
        await self.goes_on.wait()
        done = await self._write(name, data, **options)  # type: ignore[arg-type]
        self.waiting_bytes -= len(data)
        return done

    async def settled(self) -> None:
        """Nothing is encoded any more, and nobody may begin to."""
        for _ in range(50):
            await asyncio.sleep(0)
        while self._encoding:
            await asyncio.sleep(0.001)

    def keep(self, number: int, *, anew: bool = False) -> asyncio.Task[list[bool]]:
        from llmserve.workers.offload.writing import Outgoing

        outgoing = Outgoing(key(number), b"", page(number), anew)
        return asyncio.create_task(self.behind.keep([outgoing], lambda moved: None))


async def test_of_jobs_side_by_side_no_more_is_encoded_and_waits_than_the_bound() -> None:
    bound_bytes = 3 * World().tiers.most_bytes
    writing = Writing(bound_bytes)
    jobs = [writing.keep(number) for number in range(PAGES)]
    await writing.settled()
    writing.goes_on.set()
    assert await asyncio.gather(*jobs) == [[True]] * PAGES
    assert writing.most_waiting_bytes <= bound_bytes
    assert len(writing.world.fast.pages) == PAGES


async def test_a_page_larger_than_the_bound_goes_alone() -> None:
    writing = Writing(bound_bytes=10)
    writing.goes_on.set()
    assert await asyncio.gather(*(writing.keep(number) for number in range(3))) == [[True]] * 3
    assert writing.most_waiting_bytes <= writing.world.tiers.most_bytes


async def test_a_page_that_is_there_is_not_written_again_unless_it_could_not_be_read() -> None:
    writing = Writing(bound_bytes=10**6)
    writing.goes_on.set()
    await writing.world.store(1)
    writing.world.fast.pages[key(1).path] = b"unreadable"
    assert await writing.keep(1) == [True]
    assert writing.world.fast.pages[key(1).path] == b"unreadable"
    assert await writing.keep(1, anew=True) == [True]
    assert await writing.world.load(1)
