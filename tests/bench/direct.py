"""vLLM's own OpenAI server on a simulated engine, in the two processes and over the sockets that vLLM uses.

What the bus, the router and the gateway's middleware cost is the rest.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, cast

import uvicorn
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from llmserve.bus.messages import Reason, Stage
from llmserve.gateway.vllm_app import build_vllm_app, prepare_environment
from llmserve.manifests.loader import load
from llmserve.workers.engine import make_engine
from llmserve.workers.engine.base import Engine, EngineOutput, Work

ABORT = b"abort"
REASONS = {
    Reason.STOP: FinishReason.STOP,
    Reason.LENGTH: FinishReason.LENGTH,
    Reason.CANCELLED: FinishReason.ABORT,
    Reason.ERROR: FinishReason.ERROR,
}


class DirectClient(EngineCoreClient):  # type: ignore[misc]
    """An engine in another process as vLLM's front end wants it: msgpack on ZeroMQ, as vLLM's ``AsyncMPClient``."""

    engine_ranks_managed = (0,)

    class resources:
        engine_dead = False

    def __init__(self, folder: str) -> None:
        context = zmq.asyncio.Context.instance()
        self._requests = context.socket(zmq.PUSH)
        self._requests.bind(f"ipc://{folder}/requests")
        self._outputs = context.socket(zmq.PULL)
        self._outputs.bind(f"ipc://{folder}/outputs")
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    def attach(self, processor: object) -> None:
        """The gateway's client needs it, this one does not."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        await cast(Awaitable[Any], self._requests.send_multipart([request.request_id.encode(), *self._body(request)]))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        frames = [ABORT, *(request_id.encode() for request_id in request_ids)]
        await cast(Awaitable[Any], self._requests.send_multipart(frames))

    async def get_output_async(self) -> EngineCoreOutputs:
        frames = await self._outputs.recv_multipart()
        outputs: EngineCoreOutputs = self._decoder.decode(frames)
        return outputs

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """The process ends with it."""

    def _body(self, request: EngineCoreRequest) -> list[bytes]:
        frames: list[bytes] = self._encoder.encode(request)
        return frames


class EngineEnd:
    """The engine's process."""

    def __init__(self, engine: Engine, folder: str) -> None:
        context = zmq.asyncio.Context.instance()
        self._engine = engine
        self._requests = context.socket(zmq.PULL)
        self._requests.connect(f"ipc://{folder}/requests")
        self._outputs = context.socket(zmq.PUSH)
        self._outputs.connect(f"ipc://{folder}/outputs")
        self._encoder = MsgpackEncoder()

    async def run(self) -> None:
        await asyncio.gather(self._take(), self._give())

    async def _take(self) -> None:
        while True:
            head, *frames = await self._requests.recv_multipart()
            if head == ABORT:
                self._engine.abort([frame.decode() for frame in frames])
            else:
                (body,) = frames
                self._engine.submit(Work(work_id=head.decode(), stage=Stage.WHOLE, body=body))

    async def _give(self) -> None:
        while True:
            step = await self._engine.step()
            outputs = EngineCoreOutputs(outputs=[self._output(output) for output in step.outputs])
            await cast(Awaitable[Any], self._outputs.send_multipart(self._encoder.encode(outputs)))

    @staticmethod
    def _output(output: EngineOutput) -> EngineCoreOutput:
        return EngineCoreOutput(
            request_id=output.work_id,
            new_token_ids=output.tokens,
            finish_reason=REASONS[output.reason] if output.reason else None,
        )


async def serve(port: int, manifest_path: str) -> None:
    """vLLM's server here, its engine in a child."""
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="llmserve-direct-") as folder:
        command = [sys.executable, "-m", "tests.bench.direct", folder, manifest_path]
        engine = await asyncio.create_subprocess_exec(*command)
        try:
            manifest, client = load(Path(manifest_path)), DirectClient(folder)
            app = await build_vllm_app(manifest, client, fast_lane=False)
            config = uvicorn.Config(app.app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
            await uvicorn.Server(config).serve()
        finally:
            engine.kill()
            await engine.wait()


async def run_engine(folder: str, manifest_path: str) -> None:
    engine = make_engine(load(Path(manifest_path)), "both")
    await engine.start()
    await EngineEnd(engine, folder).run()


if __name__ == "__main__":
    asyncio.run(run_engine(*sys.argv[1:]))
