"""Files and batches, through OpenAI's own client, on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from msgspec.structs import replace

from llmserve.bus.server import EmbeddedServer
from llmserve.gateway import batch_lease, batch_run, batch_runner
from llmserve.gateway.batch_records import Status
from llmserve.gateway.batch_store import BatchStore, new_batch
from tests.gateway.batching import Model, begin, ended, gateway, jsonl, request, results


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "state")
    server.start()
    yield server
    server.stop()


async def test_files_come_back_as_they_were_and_can_be_removed(server: EmbeddedServer) -> None:
    content = bytes(range(256)) * 4000  # several pieces of the store
    async with gateway(server, "g", Model()) as gw:
        client = gw.client("k-acme")
        file = await client.files.create(file=("data.jsonl", content), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.object) == (len(content), "data.jsonl", "batch", "file")
        assert (await client.files.content(file.id)).content == content
        assert (await client.files.retrieve(file.id)) == file
        assert [found.id for found in (await client.files.list()).data] == [file.id]
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        stream = await gw.bus.jetstream.subjects("OBJ_LLM_d_FILES", "$O.>")
        assert stream == []


async def test_another_purpose_is_refused(server: EmbeddedServer) -> None:
    async with gateway(server, "g", Model()) as gw:
        with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
            await gw.client("k-acme").files.create(file=("x", b"x"), purpose="assistants")


async def test_a_batch_runs_and_its_files_say_what_became_of_each_line(server: EmbeddedServer) -> None:
    lines = [request(f"r{i}", f"prompt {i}") for i in range(30)]
    lines[7] = request("wrong", "x", model="other")
    lines[8] = request("streamed", "x", stream=True)
    async with gateway(server, "g", Model()) as gw:
        client = gw.client("k-acme")
        batch = await begin(client, jsonl(lines))
        assert (batch.object, batch.endpoint, batch.metadata) == ("batch", "/v1/chat/completions", {"job": "7"})
        assert batch.expires_at == batch.created_at + 86400
        done = await ended(client, batch.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (30, 28, 2)
        assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
        output = await results(client, done.output_file_id)
        assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(30) if i not in (7, 8)]
        first = output[0]["response"]
        assert first["status_code"] == 200  # type: ignore[index]
        assert first["body"]["choices"][0]["message"]["content"] == "PROMPT 0"  # type: ignore[index]
        errors = {line["custom_id"]: line for line in await results(client, done.error_file_id)}
        assert errors["wrong"]["response"]["status_code"] == 404  # type: ignore[index]
        assert errors["streamed"]["response"]["status_code"] == 400  # type: ignore[index]
        assert [found.id for found in (await client.batches.list()).data] == [batch.id]
        assert await gw.bus.jetstream.subjects("LLM_d_LINES", "llm.>") == []


async def test_a_full_queue_makes_a_batch_wait_not_fail(server: EmbeddedServer) -> None:
    model = Model()
    model.busy = 12
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        done = await ended(client, (await begin(client, jsonl([request(f"r{i}", "x") for i in range(5)]))).id)
        assert done.request_counts is not None
        assert done.request_counts.completed == 5


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b'{"custom_id": "a"', "invalid_json_line", 1),
        (jsonl([request("a", "x"), request("a", "y")]), "duplicate_custom_id", 2),
        (jsonl([{**request("a", "x"), "url": "/v1/completions"}]), "mismatched_endpoint", 1),
        (jsonl([{**request("a", "x"), "method": "GET"}]), "invalid_method", 1),
        (jsonl([{"custom_id": "a"}]), "missing_required_parameter", 1),
        (b"\n\n", "empty_file", None),
    ],
)
async def test_a_file_that_is_no_list_of_requests_fails_and_says_where(
    server: EmbeddedServer, content: bytes, code: str, line: int | None
) -> None:
    model = Model()
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        failed = await ended(client, (await begin(client, content)).id)
        assert failed.status == "failed"
        assert failed.errors is not None
        assert failed.errors.data is not None
        assert [(error.code, error.line) for error in failed.errors.data] == [(code, line)]
        assert model.answered == []


async def test_a_tenants_files_and_batches_are_not_there_for_another(server: EmbeddedServer) -> None:
    async with gateway(server, "g", Model()) as gw:
        mine, other = gw.client("k-acme"), gw.client("k-zeta")
        batch = await begin(mine, jsonl([request("a", "x")]))
        done = await ended(mine, batch.id)
        assert (await other.files.list()).data == []
        assert (await other.batches.list()).data == []
        for attempt in (
            lambda: other.files.retrieve(batch.input_file_id),
            lambda: other.files.content(str(done.output_file_id)),
            lambda: other.files.delete(batch.input_file_id),
            lambda: other.batches.retrieve(batch.id),
            lambda: other.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt()
        with pytest.raises(openai.BadRequestError, match="No such file"):
            await other.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )


async def test_a_cancelled_batch_stops_and_keeps_what_is_done(server: EmbeddedServer) -> None:
    model = Model()
    model.delay_s = 0.2
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        batch = await begin(client, jsonl([request(f"r{i}", "x") for i in range(200)]))
        while len(model.answered) < 8:
            await asyncio.sleep(0.02)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(client, batch.id)
        assert done.status == "cancelled"
        assert done.request_counts is not None
        assert 8 <= done.request_counts.completed < 200
        assert len(await results(client, done.output_file_id)) == done.request_counts.completed
        with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
            await client.batches.cancel(batch.id)


async def test_what_is_not_done_when_the_window_ends_expires(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.gateway.batch_store.WINDOW_S", 1)
    model = Model()
    model.delay_s = 0.4
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        batch = await begin(client, jsonl([request(f"r{i}", "x") for i in range(50)]))
        done = await ended(client, batch.id)
        assert done.status == "expired"
        output, errors = await results(client, done.output_file_id), await results(client, done.error_file_id)
        assert len(output) + len(errors) == 50
        assert errors[-1]["custom_id"] == "r49"
        assert errors[-1]["error"]["code"] == "batch_expired"  # type: ignore[index]


async def test_files_of_an_expired_batch_are_whole_if_their_gateway_died_while_it_wrote_them(
    server: EmbeddedServer,
) -> None:
    async with gateway(server, "g", Model()) as gw:
        client = gw.client("k-acme")
        file = await client.files.create(file=("in.jsonl", jsonl([request("a", "x")])), purpose="batch")
        batch = new_batch(file.id, "/v1/chat/completions", "24h", None)
        store = BatchStore(gw.bus.jetstream, gw.bus.subjects)
        await store.add_batch("acme", replace(batch, status=Status.FINALIZING))
        done = await ended(client, batch.id)
        assert done.status == "expired"
        (error,) = await results(client, done.error_file_id)
        assert (error["custom_id"], error["error"]["code"]) == ("a", "batch_expired")  # type: ignore[index]


async def test_two_batches_run_at_once_and_each_has_its_own_lines_and_errors(server: EmbeddedServer) -> None:
    model = Model()
    model.delay_s = 0.05
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        names = ("a", "b")
        begun = [
            await begin(
                client, jsonl([request(f"{name}{i}", name, model="m" if i % 4 else "other") for i in range(40)])
            )
            for name in names
        ]
        done = await asyncio.gather(*(ended(client, batch.id) for batch in begun))
        for name, batch in zip(names, done, strict=True):
            counts = batch.request_counts
            assert counts is not None
            assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 40, 30, 10)
            output, errors = await results(client, batch.output_file_id), await results(client, batch.error_file_id)
            assert [line["custom_id"] for line in output] == [f"{name}{i}" for i in range(40) if i % 4]
            assert [line["custom_id"] for line in errors] == [f"{name}{i}" for i in range(0, 40, 4)]
        # Neither waited for the other.
        asked = "".join(prompt for _, _, prompt in model.answered)
        assert asked.index("b") < asked.rindex("a")


async def test_progress_is_told_while_a_batch_runs(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "TELL_S", 0.1)
    model = Model()
    model.delay_s = 0.1
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        batch = await begin(client, jsonl([request(f"r{i}", "x") for i in range(60)]))
        seen = set()
        while (now := await client.batches.retrieve(batch.id)).status != "completed":
            assert now.request_counts is not None
            seen.add(now.request_counts.completed)
            await asyncio.sleep(0.05)
        assert len(seen) > 2
        assert sorted(seen)[-1] <= 60


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
async def test_another_gateway_goes_on_with_a_batch_and_no_line_has_two_results(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(batch_lease, "LOST_AFTER_S", 1.0)
    monkeypatch.setattr(batch_lease, "RENEW_S", 0.2)
    monkeypatch.setattr(batch_runner, "LOOK_S", 0.2)
    model = Model()
    model.delay_s = 0.05
    lines = [request(f"r{i}", f"p{i}") for i in range(100)]
    async with gateway(server, "first", model) as first:
        batch = await begin(first.client("k-acme"), jsonl(lines))
        while len(model.answered) < 30:
            await asyncio.sleep(0.01)
        if killed:
            await first.kill()
        else:
            await first.service.stop()
        async with gateway(server, "second", model) as second:
            client = second.client("k-acme")
            done = await ended(client, batch.id)
            assert done.status == "completed"
            output = await results(client, done.output_file_id)
            taken = second.registry.get_sample_value("llmserve_batch_takeovers_total")
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(100)]
    gateways = {name for name, _, _ in model.answered}
    assert gateways == {"first", "second"}
    # Only what was being answered when the first one went is asked again.
    assert len(model.answered) <= 100 + 8
    assert taken == (1.0 if killed else 0.0)


async def test_a_batch_outlives_the_servers_restart(server: EmbeddedServer) -> None:
    model = Model()
    model.delay_s = 0.05
    async with gateway(server, "g", model) as gw:
        client = gw.client("k-acme")
        batch = await begin(client, jsonl([request(f"r{i}", f"p{i}") for i in range(100)]))
        while len(model.answered) < 20:
            await asyncio.sleep(0.01)
        server._process.kill()  # type: ignore[union-attr]
        server.restart()
        done = await ended(client, batch.id)
        assert done.status == "completed"
        assert len(await results(client, done.output_file_id)) == 100
        assert len(model.answered) <= 100 + 8


@pytest.mark.parametrize(
    "body",
    [
        {"input_file_id": "nope", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
        {"input_file_id": "a.b.>", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
        {"input_file_id": "nope", "endpoint": "/v1/images", "completion_window": "24h"},
        {"input_file_id": "nope", "endpoint": "/v1/chat/completions", "completion_window": "1h"},
        {},
    ],
)
async def test_a_wrong_batch_is_a_client_error(server: EmbeddedServer, body: dict[str, str]) -> None:
    async with gateway(server, "g", Model()) as gw:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(gw.app), base_url="http://gw")
        response = await http.post("/v1/batches", json=body, headers={"x-api-key": "k-acme"})
        assert response.status_code in (400, 422)
