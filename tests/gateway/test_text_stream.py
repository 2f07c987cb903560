"""A stream whose client keeps up, falls behind, catches up and leaves: nothing is lost, repeated or out of order."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from llmserve.bus.messages import Reason
from llmserve.gateway.chunks import Chunk, Chunks, completion_chunks
from llmserve.gateway.text_stream import TextStream


class Words:
    """A detokenizer whose every token is a word."""

    stop: list[str] = []
    stream = None
    include_stop_str_in_output = True

    def decode_next(self, token: int) -> str:
        return f"{token} "


class Client:
    """Takes what is written at once while it keeps up, and what is sent after a while."""

    def __init__(self, chance: random.Random, keeps_up: float) -> None:
        self._chance = chance
        self._keeps_up = keeps_up
        self._sending = False
        self.data = b""
        self.written = self.sent = 0

    def write(self, data: bytes) -> bool:
        assert not self._sending, "written past what is being sent"
        if self._chance.random() > self._keeps_up:
            return False
        self.data += data
        self.written += 1
        return True

    async def send(self, data: bytes) -> None:
        self._sending = True
        await asyncio.sleep(self._chance.choice([0, 0, 0.001]))
        self.data += data
        self.sent += 1
        self._sending = False

    def text(self) -> str:
        events = [part[6:] for part in self.data.split(b"\n\n") if part.startswith(b"data: {")]
        return "".join(msgspec.json.decode(event)["choices"][0]["text"] for event in events)


def stream_of(chunks: Chunks | None = None) -> TextStream:
    made = (chunks or completion_chunks("m", None)).of_stream("id", 1)
    stream = TextStream(made, usage=lambda _: b"", error=lambda error: f"error {error}".encode())
    stream.attach(cast(Any, SimpleNamespace(prompt_token_ids=[1, 2, 3])), cast(Any, Words()))
    return stream


@pytest.mark.parametrize("keeps_up", [1.0, 0.8, 0.3, 0.0])
@pytest.mark.parametrize("seed", range(5))
async def test_every_token_comes_once_and_in_order(seed: int, keeps_up: float) -> None:
    chance = random.Random(seed)
    stream, client = stream_of(), Client(chance, keeps_up)
    serving = asyncio.create_task(stream.serve(client.send, client.write))
    for token in range(200):
        stream.arrive([token], Reason.LENGTH if token == 199 else None, None, None)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if token % 20 == 0:
            await asyncio.sleep(0.003)
    last = await asyncio.wait_for(serving, 5)
    assert last is not None
    client.data += last
    assert client.text() == "".join(f"{token} " for token in range(200))
    assert client.data.endswith(b"data: [DONE]\n\n")
    assert (client.written > 0) == (keeps_up > 0)
    assert stream.output_tokens == 200


async def test_a_client_that_keeps_up_costs_no_task_switch_after_the_start() -> None:
    stream, client = stream_of(), Client(random.Random(0), 1.0)
    serving = asyncio.create_task(stream.serve(client.send, client.write))
    await asyncio.sleep(0)
    for token in range(50):
        stream.arrive([token], None, None, None)
    assert (client.written, client.sent) == (50, 0)
    stream.leave()
    assert await serving is None


async def test_a_client_that_leaves_ends_it_and_a_failure_comes_behind_the_tokens() -> None:
    stream, client = stream_of(), Client(random.Random(0), 0.0)
    serving = asyncio.create_task(stream.serve(client.send, client.write))
    stream.arrive([1, 2], None, None, 7)
    stream.fail(ValueError("broke"))
    last = await serving
    assert last is not None
    assert last.endswith(b"error brokedata: [DONE]\n\n")
    assert b"1 2 " in client.data + last
    assert stream.cached_tokens == 7


def test_marks_of_the_template_in_a_text_are_text() -> None:
    chunks = completion_chunks("m", "print")
    stream = chunks.of_stream("id", 1)
    for text in ("\ue000text", "\ue000finish", "\ue000stop", "\ue000id", "7700000077"):
        for data in (stream.text(text), stream.last(text, "stop", text)):
            choice = msgspec.json.decode(data[6:])["choices"][0]
            assert choice["text"] == text
        assert choice["stop_reason"] == text


def test_a_template_is_filled_for_one_stream() -> None:
    assert Chunk(b'"\xee\x80\x80id" 7700000077').of_stream("a", 5) == b'"a" 5'
