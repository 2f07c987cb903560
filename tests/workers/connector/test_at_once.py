"""When pages may be loaded in the step that computes with them, and who may not use them yet."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from llmserve.kvstore.transfer import SAME_HOST, open_engine
from llmserve.kvstore.transfer.base import EngineOptions, Place, Region
from llmserve.kvstore.transfer.orders import Ends
from llmserve.workers.connector.at_once import AtOnce, Load
from llmserve.workers.connector.lease_check import LeaseCheck
from llmserve.workers.connector.leases import LeaseTable
from llmserve.workers.connector.meta import Said
from llmserve.workers.connector.wire import Handoff, RankPages, encode

HANDOFF = Handoff(
    engine_id="p",
    fingerprint="f",
    request="r",
    slot=1,
    token=9,
    tokens=64,
    lease_s=30.0,
    tp=2,
    pp=1,
    pages=[],
    ranks={},
)


def both_ranks(decisions: AtOnce) -> AtOnce:
    decisions.heard(Said(near={("p", "0/0"), ("p", "0/1")}))
    return decisions


def test_only_from_a_producer_that_all_ranks_have_met_on_this_host() -> None:
    decisions = AtOnce(100, 2, lambda _: True)
    assert not decisions.may(HANDOFF, 64)
    decisions.heard(Said(near={("p", "0/1")}))
    assert not decisions.may(HANDOFF, 64)
    decisions.heard(Said(near={("p", "0/0")}))
    assert decisions.may(HANDOFF, 64)
    assert not decisions.may(msgspec.structs.replace(HANDOFF, engine_id="another"), 64)


def test_not_too_many_tokens_not_ahead_and_only_under_a_lease_that_stands() -> None:
    decisions = both_ranks(AtOnce(100, 2, lambda handoff: handoff.token == 9))
    assert decisions.may(HANDOFF, 100)
    assert not decisions.may(HANDOFF, 101)
    assert not decisions.may(msgspec.structs.replace(HANDOFF, ahead=True), 64)
    assert not decisions.may(msgspec.structs.replace(HANDOFF, token=8), 64)


def test_prefixes_that_reach_into_a_load_are_in_doubt_until_it_is_known_to_be_good() -> None:
    decisions = both_ranks(AtOnce(100, 2, lambda _: True))
    decisions.begun("r", Load("p", 32, (5, 6)))
    assert [decisions.doubts(tokens) for tokens in (0, 32, 33, 48)] == [False, False, True, True]
    assert decisions.heard(Said(loaded={"r": True})) == []
    assert not decisions.doubts(48)
    assert decisions.may(HANDOFF, 64)


def test_after_a_load_that_was_not_good_the_next_one_is_none() -> None:
    decisions = both_ranks(AtOnce(100, 2, lambda _: True))
    decisions.begun("r", Load("p", 32, (5, 6)))
    assert decisions.heard(Said(loaded={"r": False})) == [("r", Load("p", 32, (5, 6)))]
    assert not decisions.doubts(48)
    assert not decisions.may(HANDOFF, 64)


def test_a_load_is_good_if_it_is_on_all_ranks() -> None:
    one, other = Said({"p": 3}, {"a": True, "b": True}, {("p", "0/0")}), Said({"p": 3}, {"a": True, "b": False})
    assert one.aggregate(other) == Said({"p": 3}, {"a": True, "b": False}, {("p", "0/0")})


class Producer:
    """The lease table of an engine, and how it is reached."""

    def __init__(self) -> None:
        self.table = LeaseTable(4)
        self.engine = open_engine(SAME_HOST, EngineOptions(fingerprint="f"))
        self.engine.register([Region(self.table.address, self.table.size_bytes, Place())])

    def handoff(self) -> Handoff:
        ends = Ends("m", {SAME_HOST: self.engine.describe()})
        rank = encode(RankPages(ends, None, [], self.table.address))
        return msgspec.structs.replace(HANDOFF, ranks={"0/0": rank})


@pytest.fixture
def producer() -> Iterator[Producer]:
    producer = Producer()
    yield producer
    producer.engine.close()


def test_a_lease_stands_as_long_as_its_slot_holds_the_token(producer: Producer) -> None:
    check = LeaseCheck("f")
    assert not check.stands(producer.handoff())
    producer.table.arm(1, 9)
    assert check.stands(producer.handoff())
    producer.table.clear(1)
    assert not check.stands(producer.handoff())
    producer.table.arm(1, 10)
    assert not check.stands(producer.handoff())
    check.close()


def test_a_lease_that_cannot_be_looked_at_does_not_stand(producer: Producer) -> None:
    producer.table.arm(1, 9)
    check = LeaseCheck("f")
    elsewhere = msgspec.structs.replace(
        HANDOFF, ranks={"0/0": encode(RankPages(Ends("m", {}), None, [], producer.table.address))}
    )
    assert not check.stands(elsewhere)
    assert not check.stands(msgspec.structs.replace(HANDOFF, ranks={"0/0": b"nonsense"}))
    check.close()
    other = LeaseCheck("another kind")
    assert not other.stands(producer.handoff())
    other.close()
