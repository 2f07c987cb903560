"""The part of JetStream's JSON API that the bus needs, each operation retried until the settings' patience ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from llmserve.bus.base import BusError, BusUnavailable
from llmserve.bus.connection import Connection
from llmserve.bus.inbox import NO_RESPONDERS, Disconnected, Reply

Config: TypeAlias = dict[str, object]
"""A stream's or consumer's configuration as the API spells it."""

QUEUE_FULL = 10077
WRONG_LAST_SEQUENCE = 10071
STREAM_NOT_FOUND = 10059
STREAM_NAME_IN_USE = 10058
_DELETE_FAILED = 10057
_GONE = frozenset({10037, 10043})
"""No message found; sequence not found."""
_PAUSE_MAX_S = 1.0
GAPS_PER_READ = 5000
"""Deleted sequences whose list costs as much as one message that is read."""


class ApiFailure(msgspec.Struct, frozen=True):
    """The API's error object."""

    code: int
    err_code: int = 0
    description: str = ""


class StreamState(msgspec.Struct, frozen=True):
    messages: int
    first_seq: int
    last_seq: int
    deleted: list[int] = []
    """Gaps between the first and the last, if asked for."""
    subjects: dict[str, int] | None = None
    """Messages by subject, if asked for: a page of them."""


class StoredRow(msgspec.Struct, frozen=True):
    """A message as the stream's leader gives it out."""

    subject: str
    seq: int
    data: bytes = b""


class Delivered(msgspec.Struct, frozen=True):
    consumer_seq: int


class Answer(msgspec.Struct, frozen=True):
    """The fields of all the answers in use: each has some of them."""

    error: ApiFailure | None = None
    seq: int = 0
    name: str = ""
    duplicate: bool = False
    success: bool = False
    num_pending: int = 0
    total: int = 0
    """Of what is given in pages."""
    delivered: Delivered | None = None
    config: Config = {}
    state: StreamState | None = None
    message: StoredRow | None = None


class ApiError(BusError):
    """The server understood and refused."""

    def __init__(self, what: str, failure: ApiFailure) -> None:
        super().__init__(f"{what}: {failure.description or failure.code} ({failure.err_code})")
        self.failure = failure


class StoredMessage(msgspec.Struct, frozen=True):
    """A message read from a stream."""

    seq: int
    subject: str
    data: bytes


_answers = msgspec.json.Decoder(Answer)


class JetStream:
    """Operations on streams over one connection; every one raises ``BusUnavailable`` when patience ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> int:
        """Store a message, return its sequence. ``headers`` must make a repetition harmless. Raises ``ApiError``."""
        answer = await self._ask(f"publish to {subject}", subject, data, headers)
        return answer.seq

    async def get(self, stream: str, seq: int) -> StoredMessage | None:
        """The message with that sequence, None if there is none."""
        body = f'{{"seq":{seq}}}'.encode()
        found = await self._direct_get(stream, body)
        # On a cluster any replica answers a direct read, and one that lags does not have the latest messages yet.
        if found is None and self._connection.settings.replicas > 1:
            return await self._leader_get(stream, body)
        return found

    async def get_last(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message of a subject, None if there is none."""
        body = msgspec.json.encode({"last_by_subj": subject})
        if self._connection.settings.replicas > 1:
            return await self._leader_get(stream, body)
        return await self._direct_get(stream, body)

    async def contents(self, stream: str) -> tuple[int, frozenset[int]]:
        """(last sequence ever given, sequences of all messages that are there).

        The server lists what is deleted, not what is there: behind one old message that is everything that was
        stored since, so where few messages are there they are read instead.
        """
        state = (await self.call(f"STREAM.INFO.{stream}")).state
        if state is None or not state.messages:
            return (0 if state is None else state.last_seq), frozenset()
        gaps = state.last_seq + 1 - state.first_seq - state.messages
        if gaps > GAPS_PER_READ * state.messages:
            return state.last_seq, await self._walk(stream, state.first_seq, state.last_seq)
        if gaps:
            state = (await self.call(f"STREAM.INFO.{stream}", {"deleted_details": True})).state or state
        return state.last_seq, frozenset(between(state.first_seq, state.last_seq, state.deleted))

    async def _walk(self, stream: str, first_seq: int, last_seq: int) -> frozenset[int]:
        """Sequences of all messages up to ``last_seq``, from one to the next."""
        # On a cluster the leader alone is certain to have all of them.
        read = self._leader_get if self._connection.settings.replicas > 1 else self._direct_get
        seqs: set[int] = set()
        seq = first_seq
        while seq <= last_seq:
            message = await read(stream, msgspec.json.encode({"seq": seq, "next_by_subj": ">"}))
            if message is None or message.seq > last_seq:
                break
            seqs.add(message.seq)
            seq = message.seq + 1
        return frozenset(seqs)

    async def next_of(self, stream: str, subject: str, seq: int) -> StoredMessage | None:
        """The first message of a subject with at least that sequence, None if there is none."""
        return await self._direct_get(stream, msgspec.json.encode({"seq": seq, "next_by_subj": subject}))

    async def purge(self, stream: str, subject: str) -> None:
        """Delete every message of a subject, which may have wildcards."""
        await self.call(f"STREAM.PURGE.{stream}", {"filter": subject})

    async def subjects(self, stream: str, subject: str) -> list[str]:
        """The subjects of a stream's messages that match ``subject``, in no order."""
        found: list[str] = []
        while True:
            asked = {"subjects_filter": subject, "offset": len(found)}
            answer = await self.call(f"STREAM.INFO.{stream}", asked)
            page = list((answer.state.subjects or {}) if answer.state is not None else {})
            found += page
            if not page or len(found) >= answer.total:
                return found

    async def delete(self, stream: str, seq: int) -> bool:
        """Delete a message; False if there is none of that sequence."""
        body = f'{{"seq":{seq},"no_erase":true}}'.encode()
        try:
            await self._ask(f"delete {seq} of {stream}", f"$JS.API.STREAM.MSG.DELETE.{stream}", body)
        except ApiError as error:
            # It fails if there is no such message, and if the disk is full.
            if error.failure.err_code == _DELETE_FAILED and await self.get(stream, seq) is not None:
                raise BusUnavailable(str(error)) from error
            if error.failure.err_code in _GONE or error.failure.err_code == _DELETE_FAILED:
                return False
            raise
        return True

    async def call(self, what: str, body: object = None) -> Answer:
        """An operation by its API subject below ``$JS.API.``. Raises ``ApiError``."""
        return await self._ask(what, f"$JS.API.{what}", b"" if body is None else msgspec.json.encode(body))

    async def _ask(self, what: str, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Answer:
        reply = await self._persist(what, subject, data, headers)
        answer = _answers.decode(reply.data)
        if answer.error is not None:
            raise ApiError(what, answer.error)
        return answer

    async def _direct_get(self, stream: str, body: bytes) -> StoredMessage | None:
        reply = await self._persist(f"read {stream}", f"$JS.API.DIRECT.GET.{stream}", body)
        headers = reply.headers or {}
        code = reply.status
        if code == "404":
            return None
        if code:
            raise BusError(f"read {stream}: {code} {headers.get('Description', '')}")
        return StoredMessage(int(headers["Nats-Sequence"]), headers["Nats-Subject"], reply.data)

    async def _leader_get(self, stream: str, body: bytes) -> StoredMessage | None:
        try:
            answer = await self._ask(f"read {stream}", f"$JS.API.STREAM.MSG.GET.{stream}", body)
        except ApiError as error:
            if error.failure.err_code in _GONE:
                return None
            raise
        row = answer.message
        if row is None:
            raise BusError(f"read {stream}: an answer without a message")
        return StoredMessage(row.seq, row.subject, row.data)

    async def _persist(self, what: str, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Ask until there is an answer of a server that can serve."""
        settings = self._connection.settings
        deadline = time.monotonic() + settings.publish_patience_s
        pause_s = 0.05
        while True:
            try:
                reply = await self._connection.request(subject, data, settings.try_timeout_s, headers)
                problem = _passing_problem(reply)
                if problem is None:
                    return reply
            except (TimeoutError, Disconnected) as error:
                problem = "no answer" if isinstance(error, TimeoutError) else "disconnected"
            if time.monotonic() > deadline:
                raise BusUnavailable(f"{what}: {problem} for {math.ceil(settings.publish_patience_s)} s")
            await asyncio.sleep(pause_s)
            pause_s = min(_PAUSE_MAX_S, pause_s * 1.5)


def between(first_seq: int, last_seq: int, deleted: Iterable[int]) -> set[int]:
    """The sequences from the first to the last that are not deleted."""
    seqs: set[int] = set()
    seq = first_seq
    for gone in sorted(deleted):
        if gone != seq:
            seqs.update(range(seq, gone))
        seq = gone + 1
    seqs.update(range(seq, last_seq + 1))
    return seqs


def _passing_problem(reply: Reply) -> str | None:
    """What keeps the server from serving for now, None if the reply is an answer."""
    code = reply.status
    if code == NO_RESPONDERS:
        return "JetStream is not ready"
    if code or reply.data[:1] != b"{" or b'"error"' not in reply.data[:256]:
        return None
    try:
        failure = _answers.decode(reply.data).error
    except msgspec.MsgspecError:
        return None
    if failure is not None and failure.code == 503 and failure.err_code != QUEUE_FULL:
        return failure.description
    return None
