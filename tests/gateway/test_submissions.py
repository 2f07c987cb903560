"""Requests that tenants publish themselves, as tenants, on a real nats-server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import nats
import nats.errors
import pytest

from llmserve.bus import work
from llmserve.bus.base import BusError
from llmserve.bus.client import Publisher
from llmserve.bus.messages import Heartbeat, Role
from llmserve.bus.server import EmbeddedServer
from llmserve.bus.statedir import StateDir
from llmserve.bus.tenants import new_seed, with_key
from tests.gateway.batching import Model, gateway

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
SUBMIT, RESULT = "llm.d.submit.acme", "llm.d.result.acme"


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir(tmp_path / "state")


@pytest.fixture
def server(state: StateDir) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(state.root)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def seed(server: EmbeddedServer, state: StateDir) -> str:
    """Of a user of the tenant acme, added while the server runs."""
    seed, public = new_seed()
    state.write_accounts(with_key(state.accounts(), "d", "acme", public))
    assert state.reconfigure()
    return seed


def answer(result: dict[str, object]) -> object:
    response = result["response"]
    assert isinstance(response, dict)
    assert response["status_code"] == 200
    return response["body"]["choices"][0]["message"]["content"]


async def opened(server: EmbeddedServer, seed: str) -> Publisher:
    """The server needs a moment to know a new user."""
    publisher = Publisher(server.url, "d", "acme", seed=seed, patience_s=5)
    async with asyncio.timeout(5):
        while True:
            try:
                await publisher.open()
                return publisher
            except BusError:
                await asyncio.sleep(0.05)


async def test_a_tenant_publishes_and_gets_its_result_and_the_same_id_is_the_same_request(
    server: EmbeddedServer, seed: str
) -> None:
    model = Model()
    async with gateway(server, "g", model):
        publisher = await opened(server, seed)
        message_id = await publisher.submit(BODY, custom_id="mine")
        result = await publisher.result(message_id, timeout_s=10)
        assert (result["id"], result["custom_id"], answer(result)) == (message_id, "mine", "HELLO")
        assert await publisher.submit(BODY, message_id=message_id) == message_id
        # A result is there for a day, for whoever asks later.
        later = await opened(server, seed)
        assert await later.result(message_id, timeout_s=10) == result
        assert model.answered == [("g", "acme", "hello")]
        await publisher.close()
        await later.close()


async def test_an_id_that_has_its_result_is_not_run_again_when_the_stream_has_forgotten_it(
    server: EmbeddedServer, seed: str
) -> None:
    model = Model()
    async with gateway(server, "g", model) as gw:
        publisher = await opened(server, seed)
        await publisher.result(await publisher.submit(BODY, message_id="once"), timeout_s=10)
        # After a restart a stream knows the ids of the messages that it still holds.
        server.restart()
        await publisher.submit(BODY, message_id="once")
        await publisher.result(await publisher.submit(BODY, message_id="twice"), timeout_s=10)
        async with asyncio.timeout(5):
            while (await gw.bus.jetstream.call("STREAM.INFO.LLM_d_SUBMIT_acme")).state.messages:  # type: ignore[union-attr]
                await asyncio.sleep(0.05)
        assert len(model.answered) == 2
        await publisher.close()


async def test_json_and_msgpack_without_an_id_go_in_and_come_out(server: EmbeddedServer, seed: str) -> None:
    async with gateway(server, "g", Model()):
        await (await opened(server, seed)).close()
        client = await nats.connect(server.url, nkeys_seed_str=seed)
        results = await client.subscribe(f"{RESULT}.>")
        for encode, decode in ((msgspec.json.encode, json.loads), (msgspec.msgpack.encode, msgspec.msgpack.decode)):
            acknowledged = json.loads((await client.request(SUBMIT, encode({"body": BODY}), timeout=5)).data)
            message = await results.next_msg(10)
            assert message.subject == f"{RESULT}.{acknowledged['seq']}"
            assert answer(decode(message.data)) == "HELLO"
        await client.close()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"not json", "invalid_request"),
        (b'{"body": 7}', "invalid_request"),
        (b'{"body": {}, "url": "/tokenize"}', "invalid_url"),
        (b"", "invalid_request"),
    ],
)
async def test_what_is_no_request_is_answered_with_an_error(
    server: EmbeddedServer, seed: str, data: bytes, code: str
) -> None:
    async with gateway(server, "g", Model()):
        publisher = await opened(server, seed)
        assert publisher._client is not None
        await publisher._client.request(SUBMIT, data, timeout=5, headers={"Nats-Msg-Id": "bad"})
        result = await publisher.result("bad", timeout_s=10)
        assert result["error"]["code"] == code  # type: ignore[index]
        await publisher.close()


async def test_a_tenant_reaches_nothing_but_its_own_requests_and_results(server: EmbeddedServer, seed: str) -> None:
    async with gateway(server, "g", Model()) as gw:
        await (await opened(server, seed)).close()
        client = await nats.connect(server.url, nkeys_seed_str=seed)
        heard = []

        async def hear(message: object) -> None:
            heard.append(message)

        for subject in ("llm.>", "$JS.>", "$KV.>", "_INBOX.>"):
            await client.subscribe(subject, cb=hear)
        await client.flush()
        gw.bus.publish(gw.bus.subjects.heartbeats, Heartbeat(member="x", role=Role.KV, host="h", pid=1))
        await gw.bus.jetstream.publish("llm.d.result.zeta.1", b"{}", {})
        await gw.bus.flush()
        await client.flush()
        assert heard == []
        for subject in (
            "llm.d.submit.zeta",
            "llm.d.req.interactive.acme",
            "$JS.API.DIRECT.GET.LLM_d_OUT.llm.d.result.zeta.1",
            "$JS.API.DIRECT.GET.LLM_d_REQ",
            "$KV.LLM_d_BATCH.x",
        ):
            with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
                await client.request(subject, b"{}", timeout=0.3)
        # Not even through the subject that its acknowledgement is to go to.
        before = (await gw.bus.jetstream.call("STREAM.INFO.LLM_d_REQ")).state
        await client.publish(SUBMIT, b"{}", reply="llm.d.req.interactive.zeta")
        await client.flush()
        await asyncio.sleep(0.2)
        assert (await gw.bus.jetstream.call("STREAM.INFO.LLM_d_REQ")).state == before
        await client.close()


async def test_another_gateway_answers_what_a_dead_one_had(
    server: EmbeddedServer, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "ACK_WAIT_S", 1.0)
    monkeypatch.setattr("llmserve.gateway.submissions.ACK_WAIT_S", 1.0)
    model = Model()
    model.delay_s = 0.5
    async with gateway(server, "first", model) as first:
        publisher = await opened(server, seed)
        ids = [await publisher.submit({**BODY, "n": i}) for i in range(20)]
        await asyncio.sleep(0.2)
        await first.kill()
        async with gateway(server, "second", model):
            results = await asyncio.gather(*(publisher.result(i, timeout_s=20) for i in ids))
    assert [answer(result) for result in results] == ["HELLO"] * 20
    assert {name for name, _, _ in model.answered} == {"second"}
    await publisher.close()


SCRIPT = """
import { connect, headers, nkeyAuthenticator, StringCodec } from "nats";
const [url, seed, body] = process.argv.slice(2);
const text = StringCodec();
const nc = await connect({ servers: url, authenticator: nkeyAuthenticator(text.encode(seed)) });
const results = nc.subscribe("llm.d.result.acme.>", { max: 1 });
const h = headers();
h.set("Nats-Msg-Id", "from-node");
const ack = await nc.request("llm.d.submit.acme", text.encode(body), { headers: h, timeout: 5000 });
const again = await nc.request("llm.d.submit.acme", text.encode(body), { headers: h, timeout: 5000 });
const got = [];
for await (const m of results) got.push({ subject: m.subject, data: JSON.parse(text.decode(m.data)) });
const late = await nc.request("$JS.API.DIRECT.GET.LLM_d_OUT.llm.d.result.acme.from-node");
console.log(JSON.stringify({
  ack: JSON.parse(text.decode(ack.data)), again: JSON.parse(text.decode(again.data)), got,
  late: JSON.parse(text.decode(late.data)),
}));
await nc.close();
"""


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which node finds the plain client of NATS for it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "nats@2.29.3"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install the package nats: {installed.stderr[-200:]}")
    (folder / "publish.mjs").write_text(SCRIPT)
    return folder


async def test_a_plain_client_in_another_language_does_it_by_the_documentation_alone(
    server: EmbeddedServer, seed: str, node_project: Path
) -> None:
    async with gateway(server, "g", Model()):
        await (await opened(server, seed)).close()
        url = server.url.removeprefix("nats://")
        command = ["node", "publish.mjs", url, seed, json.dumps({"body": BODY, "custom_id": "c"})]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=node_project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err.decode()
    said = json.loads(out)
    assert said["again"]["duplicate"] is True
    assert said["got"][0]["subject"] == f"{RESULT}.from-node"
    assert answer(said["got"][0]["data"]) == "HELLO"
    assert said["late"] == said["got"][0]["data"]
