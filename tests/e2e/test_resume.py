"""One of two decode workers is killed in the middle of every kind of stream, and the kv role with it: what goes on
cannot be told from an undisturbed stream, and what cannot go on ends with the reason."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import httpx
import pytest

from tests.bench.load import prompt_bodies
from tests.e2e.conftest import LEASE_S
from tests.processes import BIN, Process, free_port, metrics, total, wait_for
from tests.services import Services

pytestmark = [pytest.mark.vllm, pytest.mark.faults]

TOKENS = 56
LOAD = 4
SILENCE_S = 4.0
"""After three of which a worker is gone."""
PROMPT = "The quick history of computing begins with"
WORDS = r"([a-z]{4} ){14}"
LIST = {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "minItems": 14, "maxItems": 14}
JSON = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": LIST}}

LONG: dict[str, object] = {"max_tokens": 90}
"""Random words take more tokens."""
CONTINUED: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "log probabilities": {"temperature": 0, "logprobs": 3},
    "banned tokens and a bias": {"temperature": 0, "logit_bias": {"29": -100}, "min_p": 0.1},
}
"""Each token depends on those before it: the next attempt goes on behind them."""
REPLAYED: dict[str, dict[str, object]] = {
    "seed": {"temperature": 1, "seed": 7},
    "seed and log probabilities": {"temperature": 1, "seed": 8, "logprobs": 2},
    "two choices": {"temperature": 1, "seed": 9, "n": 2},
    "penalties": {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    "least length": {"temperature": 0, "min_tokens": TOKENS - 1},
    "pattern": {"temperature": 0, "structured_outputs": {"regex": WORDS}, "ignore_eos": False},
    "schema": {"temperature": 0, "response_format": JSON, "ignore_eos": False, "max_tokens": 120},
}
"""Sampling has state that can be built up again: the next attempt yields the same tokens again."""
RANDOM: dict[str, dict[str, object]] = {
    "random": {"temperature": 1},
    "random with penalties": {"temperature": 1, "frequency_penalty": 0.5},
    "random in a pattern": {"temperature": 1, "structured_outputs": {"regex": WORDS}, "ignore_eos": False, **LONG},
}
"""Continued or replayed as well, but no two requests are alike."""
ENDED: dict[str, dict[str, object]] = {"unknown processor": {"temperature": 1, "vllm_xargs": {"mine": 1}}}
"""Random sampling of which nobody knows the state."""


@dataclass
class Heard:
    """What a client got, by choice."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    tokens: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[int, str] = field(default_factory=dict)
    output_tokens: int = 0
    error: str = ""
    chunks: int = 0

    def take(self, event: dict[str, object]) -> None:
        if "error" in event:
            self.error = json.dumps(event["error"])
            return
        self.chunks += 1
        usage, choices = event.get("usage"), event["choices"]
        if isinstance(usage, dict):
            self.output_tokens = usage["completion_tokens"]
        assert isinstance(choices, list)
        for choice in choices:
            index = choice["index"]
            self.texts[index] += choice["text"]
            if said := choice.get("logprobs"):
                self.tokens[index] += said["tokens"]
                self.logprobs[index] += said["token_logprobs"]
            if choice["finish_reason"]:
                self.finished[index] = choice["finish_reason"]


class Clients:
    """Streams of named requests, all at once."""

    def __init__(self, services: Services, bodies: dict[str, dict[str, object]]) -> None:
        self.services = services
        self.bodies = bodies
        self.heard = {name: Heard() for name in bodies}

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=150)
        async with aiohttp.ClientSession(headers=self.services.headers, timeout=timeout) as session:
            await asyncio.gather(*(self._one(session, name) for name in self.bodies))

    async def _one(self, session: aiohttp.ClientSession, name: str) -> None:
        body = {
            "model": self.services.model,
            "prompt": f"{PROMPT} {name}",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.bodies[name],
        }
        async with session.post(f"{self.services.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self.heard[name].take(json.loads(line[6:]))

    async def amid(self, chunks: int, running: asyncio.Task[None]) -> None:
        """Return when every stream has so many events and none has ended."""
        while min(heard.chunks for heard in self.heard.values()) < chunks:
            assert not running.done()
            await asyncio.sleep(0.02)
        assert not [name for name, heard in self.heard.items() if heard.finished or heard.error]


@pytest.fixture(scope="module")
def by_hand(services: Services) -> Iterator[Process]:
    """A second decode worker, which is starting."""
    port = services.metrics_ports["by-hand"] = free_port()
    command = [str(BIN / "llmserve-worker"), "--role", "decode", "--manifest", str(services.manifest)]
    command += ["--nats", services.nats_url, "--metrics-port", str(port), "--name", "by-hand"]
    env = {"API_KEY": services.key, "NATS_URL": services.nats_url}
    process = services.processes["by-hand"] = Process("by hand", command, services.folder / "by-hand.log", env)
    yield process
    process.end()
    del services.processes["by-hand"]


def late_in(text: str) -> str:
    """A piece of a text that is late in it, and nowhere before."""
    pieces = [text[at : at + 8] for at in range(len(text) * 3 // 5, len(text) - 10)]
    return next(piece for piece in pieces if text.find(piece) > len(text) // 2)


def resubmissions(services: Services) -> dict[str, float]:
    figures = metrics(services.metrics_url("gateway"))
    return {mode: total(figures, "llmserve_attempts_repeated_total", mode=mode) for mode in ("resume", "replay")}


async def test_no_stream_of_any_kind_shows_that_its_decode_worker_was_killed(
    services: Services, by_hand: Process
) -> None:
    load = {f"load {k}": body for k, body in enumerate(prompt_bodies(services.model, LOAD, 120, TOKENS))}
    same = {**CONTINUED, **REPLAYED, **load}
    calm = Clients(services, same)
    await calm.run()
    assert not [heard.error for heard in calm.heard.values() if heard.error]
    whole = calm.heard["greedy"].texts[0]
    stop = late_in(whole)
    stopped = {"stop": {**CONTINUED["greedy"], "prompt": f"{PROMPT} greedy", "stop": stop}}
    before = resubmissions(services)
    await asyncio.to_thread(by_hand.wait_for_line, "ready after", 120)

    # The second worker is away for as long as it takes to be forgotten, so that everything begins on the first.
    by_hand.child.send_signal(signal.SIGSTOP)
    await asyncio.sleep(SILENCE_S)
    clients = Clients(services, {**same, **stopped, **RANDOM, **ENDED})
    running = asyncio.create_task(clients.run())
    await clients.amid(6, running)
    for name in ("decode", "kv"):
        services.processes[name].kill()
        services.start(name)
    by_hand.child.send_signal(signal.SIGCONT)
    await running

    for name, reference in calm.heard.items():
        heard = clients.heard[name]
        assert not heard.error, name
        assert heard.texts == reference.texts, name
        assert heard.finished == reference.finished, name
        assert heard.output_tokens == reference.output_tokens, name
        assert heard.tokens == reference.tokens, name
        for index, said in reference.logprobs.items():
            assert all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-3), heard.logprobs[index], said)), name
    assert clients.heard["stop"].finished == {0: "stop"}
    assert clients.heard["stop"].texts[0] == whole[: whole.index(stop)]
    for name in RANDOM:
        assert not clients.heard[name].error, name
    assert clients.heard["random"].output_tokens == clients.heard["random with penalties"].output_tokens == TOKENS
    for name in ("pattern", "random in a pattern"):
        assert re.fullmatch(WORDS, clients.heard[name].texts[0]), name
    # White space, which JSON allows, may take all its tokens.
    assert re.fullmatch(r"\[[\s\d,]*\]?", clients.heard["schema"].texts[0])
    for name in ENDED:
        assert "its sampling is random and has state" in clients.heard[name].error, name
        assert not clients.heard[name].finished
    after = resubmissions(services)
    assert after["resume"] - before["resume"] == len(CONTINUED) + len(stopped) + 1 + LOAD
    assert after["replay"] - before["replay"] == len(REPLAYED) + 1 + 2  # one of them has two choices


async def test_all_pages_are_free_afterwards_and_a_worker_by_hand_leaves_on_sigterm(
    services: Services, by_hand: Process
) -> None:
    await asyncio.to_thread(services.processes["decode"].wait_for_line, "ready after", 120)

    def used() -> float:
        workers = ("prefill", "decode", "by-hand")
        pages = [
            total(metrics(services.metrics_url(name)), "llmserve_worker_kv_pages", state="used") for name in workers
        ]
        router = metrics(services.metrics_url("router"))
        return sum(pages) + total(router, "llmserve_tokens_in_flight") + total(router, "llmserve_queue_depth")

    await asyncio.to_thread(wait_for, lambda: not used(), LEASE_S + 2, "all pages to be free")
    assert await asyncio.to_thread(by_hand.stop, 40) == 0
    body = {"model": services.model, "prompt": PROMPT, "max_tokens": 4}
    async with httpx.AsyncClient(headers=services.headers, timeout=60) as client:
        answer = await client.post(f"{services.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
