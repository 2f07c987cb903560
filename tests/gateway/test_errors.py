"""Everything wrong has OpenAI's shape and the right status, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmserve.bus.base import BusUnavailable, QueueFull, StoredRequest
from llmserve.bus.messages import Rejected, Role
from tests.gateway.conftest import KEYS, World
from tests.gateway.test_api import CHAT, TEXT, until

CHAT_URL = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT_URL: CHAT,
    "/v1/completions": {"model": "smol", "prompt": "x"},
    "/v1/responses": {"model": "smol", "input": "x"},
}


async def post(
    world: World, json: Any = None, url: str = CHAT_URL, **options: Any
) -> tuple[int, dict[str, Any], Any]:
    response = await world.client.post(url, json=json, **options)
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    words = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}
    assert error["code"] == words.get(response.status_code, response.status_code)
    assert "Traceback" not in response.text
    return response.status_code, error, response.headers


async def test_malformed_json_is_400(world: World) -> None:
    status, _, _ = await post(world, content=b"{oops", headers={"content-type": "application/json"})
    assert status == 400


async def test_a_prompt_longer_than_the_model_takes_is_400(world: World) -> None:
    status, error, _ = await post(world, {**CHAT, "messages": [{"role": "user", "content": "hello " * 600}]})
    assert (status, "512" in error["message"]) == (400, True)


@pytest.mark.parametrize("url", BODIES)
async def test_an_unknown_model_is_404(world: World, url: str) -> None:
    status, error, _ = await post(world, {**BODIES[url], "model": "gpt-9"}, url)
    assert (status, "gpt-9" in error["message"]) == (404, True)


async def test_showing_an_unknown_model_is_404(world: World) -> None:
    response = await world.client.get("/v1/models/gpt-9")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    "url", ["/nope", "/metrics", "/v1/embeddings", "/pooling", "/sleep", "/v1/load_lora_adapter"]
)
async def test_an_unknown_route_is_404(world: World, url: str) -> None:
    status, error, _ = await post(world, {}, url)
    assert (status, url in error["message"]) == (404, True)


async def test_a_wrong_method_is_405(world: World) -> None:
    response = await world.client.get(CHAT_URL)
    assert (response.status_code, response.json()["error"]["code"]) == (405, 405)


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Basic key-of-acme", "Bearer "])
async def test_a_missing_or_unknown_key_is_401(world: World, header: str) -> None:
    status, error, _ = await post(world, CHAT, headers={"authorization": header})
    assert (status, error["type"]) == (401, "AuthenticationError")
    assert world.bus.accepted == []


async def test_a_body_over_the_limit_is_413(world: World) -> None:
    status, _, _ = await post(world, content=b"x" * 70_000, headers={"content-type": "application/json"})
    assert status == 413


async def test_a_body_of_unknown_length_over_the_limit_is_413(world: World) -> None:
    async def chunks() -> Any:
        for _ in range(70):
            yield b"x" * 1000

    status, _, _ = await post(world, content=chunks(), headers={"content-type": "application/json"})
    assert status == 413


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", BODIES)
async def test_a_full_queue_is_429_with_retry_after(world: World, url: str, stream: bool) -> None:
    world.bus.refuse.append(QueueFull("tenant acme has 2000 requests queued"))
    status, error, headers = await post(world, {**BODIES[url], "stream": stream}, url)
    assert (status, error["type"], headers["retry-after"]) == (429, "RateLimitError", "1")
    assert world.gateway.engine.output_processor.request_states == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unavailable_bus_is_503(world: World, stream: bool) -> None:
    world.bus.refuse.append(BusUnavailable("no answer in 10 s"))
    status, error, _ = await post(world, {**CHAT, "stream": stream})
    assert (status, error["type"]) == (503, "ServiceUnavailableError")


async def test_a_choice_that_finds_the_queue_full_takes_the_others_with_it(world: World) -> None:
    def fill(_: Any) -> None:
        world.bus.refuse.append(QueueFull("full"))

    world.bus.on_accept = fill
    status, _, _ = await post(world, {**CHAT, "n": 3, "temperature": 1})
    await asyncio.sleep(0.05)
    assert status == 429
    assert world.bus.stored == {}
    assert len(world.gateway.channel) == 0


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
async def test_what_does_not_work_over_the_bus_is_refused_by_name(world: World, field: str) -> None:
    status, error, _ = await post(world, {**CHAT, field: {"a": 1}})
    assert (status, field in error["message"]) == (400, True)


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
async def test_a_streamed_response_refuses_it_before_it_begins(world: World, field: str) -> None:
    asked = {"model": CHAT["model"], "input": "Hello", "stream": True, field: {"a": 1}}
    status, error, _ = await post(world, asked, "/v1/responses")
    assert (status, field in error["message"]) == (400, True)


async def test_no_token_within_the_deadline_is_504(world: World) -> None:
    status, error, _ = await post(world, CHAT)
    await asyncio.sleep(0.05)
    assert (status, "no token" in error["message"]) == (504, True)
    assert world.bus.cancelled() == [world.bus.accepted[0].request.request_id]
    assert world.bus.stored == {}


async def test_a_request_that_loses_all_its_attempts_is_500(world: World) -> None:
    def lose(stored: StoredRequest) -> None:
        asyncio.get_running_loop().call_soon(world.bus.lose, stored)

    world.bus.on_accept = lose
    status, error, _ = await post(world, CHAT)
    assert (status, "5 attempts" in error["message"]) == (500, True)
    assert len(world.bus.accepted) == 5


async def test_a_request_that_did_not_begin_in_time_is_503_with_a_time_to_come_back(world: World) -> None:
    def reject(stored: Any) -> None:
        no = Rejected(request_id=stored.request.request_id, attempt=0, code="overdue", message="queued for too long")
        asyncio.get_running_loop().call_later(0.02, world.bus.publish, world.bus.subjects.gateway("gw"), no)

    world.bus.on_accept = reject
    status, error, headers = await post(world, CHAT)
    assert (status, error["type"], headers["retry-after"]) == (503, "ServiceUnavailableError", "1")


async def test_a_failure_in_one_choice_stops_the_others(world: World) -> None:
    def reject_first(stored: Any) -> None:
        if stored.seq == 2:
            request = world.bus.accepted[0].request
            no = Rejected(request_id=request.request_id, attempt=0, code="unservable", message="does not fit")
            subject = world.bus.subjects.gateway("gw")
            asyncio.get_running_loop().call_later(0.05, world.bus.publish, subject, no)

    world.bus.on_accept = reject_first
    status, error, _ = await post(world, {**CHAT, "n": 2, "temperature": 1})
    assert (status, "does not fit" in error["message"]) == (400, True)
    assert set(world.bus.cancelled()) == {stored.request.request_id for stored in world.bus.accepted}


@pytest.mark.parametrize("url", BODIES)
async def test_a_failure_after_the_first_token_ends_the_stream_with_an_error_event(world: World, url: str) -> None:
    script = world.yields(TEXT, stop_after=3)
    asking = asyncio.create_task(world.client.post(url, json={**BODIES[url], "stream": True}))
    await until(lambda: script.tasks and all(task.done() for task in script.tasks))
    script.stop_after = 0
    request = world.bus.accepted[0].request
    no = Rejected(request_id=request.request_id, attempt=0, code="internal", message="broke")
    world.bus.publish(world.bus.subjects.gateway("gw"), no)
    lines = [line for line in (await asking).text.splitlines() if line.startswith("data: {")]
    assert "broke" in json.loads(lines[-1][6:])["error"]["message"]


async def test_a_bug_is_500_with_the_request_id_and_nothing_else(world: World) -> None:
    def break_down(_: Any) -> None:
        raise KeyError("secret detail")

    world.bus.on_accept = break_down
    response = await world.client.post(CHAT_URL, json=CHAT, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert "secret" not in response.text


async def test_the_clients_request_id_comes_back(world: World) -> None:
    for url in ("/v1/models", "/nope"):
        response = await world.client.get(url, headers={"x-request-id": "my-id"})
        assert response.headers["x-request-id"] == "my-id"
    assert (await world.client.get("/v1/models", headers={"x-request-id": "no\tgood"})).headers["x-request-id"] != ""


async def test_tenants_have_their_own_subject_and_cache_salt(world: World) -> None:
    world.yields(TEXT)
    for key in KEYS.values():
        await world.client.post(CHAT_URL, json=CHAT, headers={"authorization": f"Bearer {key}"})
    await world.client.post(CHAT_URL, json={**CHAT, "cache_salt": "mine"})
    assert [stored.tenant for stored in world.bus.accepted] == [*KEYS, "acme"]
    assert len({salt(stored.request.body) for stored in world.bus.accepted}) == len(KEYS) + 1


async def test_the_body_tells_a_worker_nothing_about_the_caller(world: World) -> None:
    world.yields(TEXT)
    await world.client.post(CHAT_URL, json=CHAT, headers={"x-request-id": "from-client"})
    stored = world.bus.accepted[0]
    assert b"from-client" not in stored.data
    assert KEYS["acme"].encode() not in stored.data


async def test_ready_needs_a_live_member_of_every_role(world: World) -> None:
    assert (await world.client.get("/health/live", headers={"authorization": ""})).status_code == 200
    for role in (Role.ROUTER, Role.PREFILL):
        world.beat(role)
    response = await world.client.get("/health/ready", headers={"authorization": ""})
    assert (response.status_code, response.text) == (503, "not ready: no live member of role decode\n")
    world.beat(Role.DECODE)
    assert (await world.client.get("/health/ready")).status_code == 200
    world.beat(Role.DECODE, leaving=True)
    assert (await world.client.get("/health/ready")).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_cancels_its_request(world: World, stream: bool) -> None:
    world.yields(TEXT, stop_after=2 if stream else 0)
    gone = asyncio.Event()
    task = asyncio.create_task(_call(world, {**CHAT, "stream": stream}, gone))
    await until(lambda: world.bus.accepted)
    gone.set()
    await asyncio.wait_for(task, 10)
    await until(lambda: world.bus.cancelled())
    assert world.bus.cancelled() == [world.bus.accepted[0].request.request_id]
    assert world.bus.stored == {}
    assert len(world.gateway.channel) == 0


async def test_a_client_that_disconnects_while_its_request_is_stored_leaves_nothing(world: World) -> None:
    world.bus.delay_s = 0.5
    gone = asyncio.Event()
    task = asyncio.create_task(_call(world, CHAT, gone))
    await until(lambda: len(world.gateway.channel) == 1)
    gone.set()
    await asyncio.wait_for(task, 10)
    await until(lambda: world.bus.accepted and not world.bus.stored)
    assert world.gateway.engine.output_processor.request_states == {}


async def test_answers_are_counted_by_tenant_and_outcome(world: World) -> None:
    world.yields(TEXT)
    labels = {"tenant": "zeta", "outcome": "ok", "status": "200"}
    before = world.metric("llmserve_requests_total", **labels)
    await world.client.post(CHAT_URL, json=CHAT, headers={"authorization": f"Bearer {KEYS['zeta']}"})
    assert world.metric("llmserve_requests_total", **labels) == before + 1
    assert world.metric("llmserve_time_to_first_token_seconds_count", tenant="zeta") >= 1
    assert world.metric("llmserve_output_tokens_total", tenant="zeta") >= len(world.encode(TEXT))


async def _call(world: World, request: dict[str, Any], gone: asyncio.Event) -> None:
    """A client that hangs up when ``gone`` is set; httpx's transport cannot."""
    body = [{"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEYS['acme']}".encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT_URL,
        "raw_path": CHAT_URL.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("gw", 80),
        "client": ("c", 1),
        "headers": headers,
    }
    await world.app(scope, receive, send)


def salt(body: bytes) -> str | None:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    value: str | None = MsgpackDecoder(EngineCoreRequest).decode(body).cache_salt
    return value


@pytest.mark.parametrize(
    "error", [AssertionError(), AttributeError("text"), IndexError(), KeyError("x"), TypeError()]
)
async def test_what_vllms_renderer_stumbles_over_is_the_clients_error(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def stumble(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(world.state.online_renderer.renderer, "render_chat_async", stumble)
    for url in (CHAT_URL, "/v1/responses"):
        status, told, _ = await post(world, {**BODIES[url], "stream": True, "top_k": 3}, url)
        assert (status, told["param"]) == (400, "input")
    assert world.bus.accepted == []
