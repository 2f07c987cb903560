"""The manager against a model, and its rules one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kvstore.keys import PageKey
from llmserve.kvstore.manager import Manager, Move, MoveKind, Rules, TierRules
from llmserve.kvstore.notices import Notice, NoticeKind
from llmserve.kvstore.stores.base import Stored

SIZE = 10
KINDS = ("stored", "used", "due", "wait", "lost")


def key(number: int, space: str = "t-a") -> PageKey:
    return PageKey("f00d" * 4, space, number.to_bytes(32, "big"))


def path(number: int, space: str = "t-a") -> str:
    return key(number, space).path


class World:
    """A manager whose orders are carried out at once on tiers that are sets of paths."""

    def __init__(self, capacities: list[float], prefetch: bool = False, **rules: object) -> None:
        self.names = [f"tier{n}" for n in range(len(capacities))]
        self.manager = Manager(
            [TierRules(name, size, prefetch) for name, size in zip(self.names, capacities, strict=True)],
            Rules(**rules),  # type: ignore[arg-type]
        )
        self.tiers: list[dict[str, float]] = [{} for _ in capacities]
        """By tier: path -> time of last use."""
        self.now_s = 1000.0
        self.lost: list[str] = []

    def store(self, number: int, space: str = "t-a", parent: int | None = None) -> None:
        self.tiers[0][path(number, space)] = self.now_s
        before = parent.to_bytes(32, "big") if parent is not None else b""
        notice = Notice(NoticeKind.STORED, self.names[0], path(number, space), SIZE, before)
        self.manager.notice(notice, self.now_s)

    def use(self, number: int, space: str = "t-a", tier: int = 0) -> None:
        if path(number, space) in self.tiers[tier]:
            self.tiers[tier][path(number, space)] = self.now_s
        self.manager.notice(Notice(NoticeKind.USED, self.names[tier], path(number, space)), self.now_s)

    def settle(self) -> list[Move]:
        """Carry out all that is due, until nothing is."""
        done: list[Move] = []
        while moves := self.manager.due(self.now_s):
            for move in moves:
                self.carry_out(move)
            done.extend(moves)
            self.manager.check()
        return done

    def carry_out(self, move: Move) -> None:
        space = move.path.split("/")[3]
        if move.kind is MoveKind.PREFETCH:
            return
        del self.tiers[move.tier][move.path]
        if move.kind is MoveKind.DEMOTE:
            self.tiers[move.tier + 1][move.path] = self.now_s
            self.manager.stored(
                move.tier + 1, key(int(move.path.split("/")[5].split(".")[0], 16), space), SIZE, self.now_s
            )
        elif not any(move.path in tier for tier in self.tiers):
            self.lost.append(move.path)
        self.manager.removed(move.tier, move.path)

    def bytes_of(self, tier: int, space: str) -> int:
        return SIZE * sum(f"/{space}/" in name for name in self.tiers[tier])


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_it_knows_what_the_model_holds_keeps_to_capacities_and_protects_hot_sets(data: st.DataObject) -> None:
    hot = {"t-a": data.draw(st.integers(0, 15)) * SIZE, "t-b": data.draw(st.integers(0, 15)) * SIZE}
    capacities = [float(SIZE * data.draw(st.integers(1, 12))) for _ in range(data.draw(st.integers(1, 3)))]
    world = World(capacities, hot_keep_s=20.0, evict_if_inactive_s=100.0, hot_bytes=hot)
    manager = world.manager
    for kind in data.draw(st.lists(st.sampled_from(KINDS), max_size=60)):
        space = data.draw(st.sampled_from(["t-a", "t-b", "t-c"]))
        number = data.draw(st.integers(0, 15))
        if kind == "stored":
            world.store(number, space)
        elif kind == "used":
            world.use(number, space)
        elif kind == "wait":
            world.now_s += data.draw(st.floats(0.0, 60.0))
        elif kind == "lost" and path(number, space) in world.tiers[0]:
            del world.tiers[0][path(number, space)]
            manager.notice(Notice(NoticeKind.REMOVED, "tier0", path(number, space)), world.now_s)
        else:
            before = [{s: world.bytes_of(tier, s) for s in ("t-a", "t-b")} for tier in range(len(capacities))]
            idle = {
                (tier, name)
                for tier, pages in enumerate(world.tiers)
                for name, used_s in pages.items()
                if world.now_s - used_s >= 100.0
            }
            moves = world.settle()
            for tier, capacity in enumerate(capacities):
                assert SIZE * len(world.tiers[tier]) <= capacity
                assert not [used for used in world.tiers[tier].values() if world.now_s - used >= 100.0]
            for tier in range(len(capacities)):
                for s in ("t-a", "t-b"):
                    promised = manager.pages(tier).hot_bytes(s)
                    taken = [m for m in moves if m.tier == tier and f"/{s}/" in m.path and (tier, m.path) not in idle]
                    if taken and tier == 0:
                        # Pressure took from it: only what it had beyond its hot set, to within a page.
                        kept = before[tier][s] - SIZE * len(taken)
                        assert kept > promised - SIZE, (s, before[tier][s], promised, len(taken))
        for tier in range(len(capacities)):
            assert set(manager.pages(tier).keys()) == set(world.tiers[tier])
        manager.check()


@given(noise=st.integers(1, 400), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_noisy_tenant_cannot_evict_anothers_hot_set(noise: int, seed: int) -> None:
    """Tenant b stores without end and uses its pages all the time; tenant a was there first and is silent."""
    world = World([20.0 * SIZE], hot_keep_s=300.0, evict_if_inactive_s=1e9, hot_bytes={"t-a": 8.0 * SIZE})
    drawn = random.Random(seed)
    for number in range(12):
        world.store(number, "t-a")
    world.now_s += 1000.0
    for number in range(noise):
        world.now_s += drawn.random()
        world.store(100 + number, "t-b")
        world.use(100 + drawn.randrange(number + 1), "t-b")
        world.settle()
    assert world.bytes_of(0, "t-a") >= 8 * SIZE
    assert world.bytes_of(0, "t-a") + world.bytes_of(0, "t-b") <= 20 * SIZE


def test_idle_pages_go_down_tier_by_tier_and_then_away() -> None:
    world = World([1e9, 1e9], evict_if_inactive_s=100.0)
    world.store(1)
    world.now_s += 99.0
    assert world.settle() == []
    world.now_s += 1.0
    assert [(m.kind, m.tier) for m in world.settle()] == [(MoveKind.DEMOTE, 0)]
    world.now_s += 99.0
    assert world.settle() == []
    world.now_s += 1.0
    assert [(m.kind, m.tier) for m in world.settle()] == [(MoveKind.DELETE, 1)]
    assert world.lost == [path(1)]


def test_under_pressure_pages_are_demoted_and_not_lost() -> None:
    world = World([2.0 * SIZE, 1e9], hot_keep_s=0.0, evict_if_inactive_s=1e9)
    for number in range(5):
        world.now_s += 1
        world.store(number)
    world.settle()
    assert set(world.tiers[0]) == {path(3), path(4)}
    assert set(world.tiers[1]) == {path(0), path(1), path(2)}
    assert not world.lost


def test_a_page_that_the_next_tier_has_already_is_only_deleted() -> None:
    world = World([1.0 * SIZE, 1e9], hot_keep_s=0.0, evict_if_inactive_s=1e9)
    world.manager.stored(1, key(1), SIZE, world.now_s)
    world.tiers[1][path(1)] = world.now_s
    world.store(1)
    world.now_s += 1
    world.store(2)
    assert [move.kind for move in world.settle()] == [MoveKind.DELETE]
    assert path(1) in world.tiers[1]


def test_pages_used_just_now_stay_while_colder_ones_can_go() -> None:
    world = World([3.0 * SIZE], hot_keep_s=50.0, evict_if_inactive_s=1e9)
    world.store(1, "t-a")
    world.now_s += 100
    for number in range(3):
        world.store(10 + number, "t-b")
    world.settle()
    # b holds more, but all of its pages are hot.
    assert world.lost == [path(1, "t-a")]


def test_an_order_that_was_not_begun_is_given_again_and_one_under_way_is_not() -> None:
    world = World([0.0], hot_keep_s=0.0)
    world.store(1)
    (move,) = world.manager.due(world.now_s)
    assert world.manager.due(world.now_s) == []
    world.manager.put_back(move)
    assert world.manager.due(world.now_s) == [move]


def test_an_order_that_failed_is_given_again_after_ever_longer_pauses() -> None:
    world = World([0.0], hot_keep_s=0.0)
    world.store(1)
    for pause_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        (move,) = world.manager.due(world.now_s)
        world.manager.failed(move, world.now_s)
        assert world.manager.due(world.now_s + pause_s - 0.01) == []
        world.now_s += pause_s


def test_instead_of_a_page_that_cannot_be_moved_another_one_goes() -> None:
    world = World([2.0 * SIZE], hot_keep_s=0.0, evict_if_inactive_s=1e9)
    for number in range(3):
        world.now_s += 1
        world.store(number)
    (move,) = world.manager.due(world.now_s)
    assert move.path == path(0)
    world.manager.failed(move, world.now_s)
    assert [move.path for move in world.manager.due(world.now_s)] == [path(1)]


def test_a_tier_that_cannot_move_anything_leaves_the_others_their_orders() -> None:
    world = World([0.0, 0.0], hot_keep_s=0.0)
    for number in range(1000):
        world.manager.stored(0, key(number), SIZE, world.now_s)
    world.manager.stored(1, key(5000), SIZE, world.now_s)
    orders = world.manager.due(world.now_s)
    assert path(5000) in [move.path for move in orders if move.tier == 1]
    assert len(orders) < 1000
    assert not [move for move in world.manager.due(world.now_s) if move.tier == 0], "its share is under way"


def test_a_tier_that_is_left_alone_gets_no_orders_and_one_that_is_tried_gets_one() -> None:
    world = World([0.0, 0.0], hot_keep_s=0.0)
    for number in range(10):
        for tier in range(2):
            world.manager.stored(tier, key(10 * tier + number), SIZE, world.now_s)
    assert {move.tier for move in world.manager.due(world.now_s, {0: 0})} == {1}
    assert [move.tier for move in world.manager.due(world.now_s, {0: 1})] == [0]


def test_the_pages_that_follow_one_that_is_read_are_wanted_once() -> None:
    world = World([1e9], prefetch=True)
    for number in range(6):
        world.store(number, parent=number - 1 if number else None)
    world.store(3, "t-b", parent=2)
    world.use(1)
    assert [move.path for move in world.settle()] == [path(2), path(3), path(4), path(5)]
    world.use(2)
    assert world.settle() == []
    world.now_s += 60
    world.use(4)
    assert world.settle() == [Move(MoveKind.PREFETCH, 0, path(5))]


def listed(world: World, found: list[Stored]) -> tuple[list[str], list[str]]:
    """(paths that came, paths that went)."""
    listing = world.manager.listing(0, world.now_s)
    listing.add(found)
    listing.sort()
    came: list[str] = []
    gone: list[str] = []
    for new, old in world.manager.listed(listing):
        came += [page.path for page in new]
        gone += [page.path for page in old]
    world.manager.over(listing)
    return came, gone


def test_without_prefetch_nothing_is_wanted() -> None:
    world = World([1e9])
    world.store(0)
    world.store(1, parent=0)
    world.use(0)
    assert world.settle() == []


def test_a_listing_corrects_what_was_told_and_keeps_the_later_use() -> None:
    world = World([1e9], evict_if_inactive_s=100.0)
    world.store(1)
    world.store(2)
    found = [Stored(path(2), SIZE, 5.0), Stored(path(3), SIZE, world.now_s), Stored("v1/stranger", 1, 0.0)]
    assert listed(world, found) == ([path(3)], [path(1)])
    assert set(world.manager.pages(0).keys()) == {path(2), path(3)}
    assert world.manager.due(world.now_s) == []
    world.manager.check()


@pytest.mark.parametrize(
    "notice", [Notice(NoticeKind.STORED, "tier0", "x", 1), Notice(NoticeKind.USED, "other", path(1))]
)
def test_what_makes_no_sense_is_ignored(notice: Notice) -> None:
    world = World([1e9])
    assert not world.manager.notice(notice, 0.0)
    world.manager.check()
