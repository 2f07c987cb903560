"""vLLM's own OpenAI server on the simulated engine in one process: what the bus and the router cost is the rest."""

from __future__ import annotations

from pathlib import Path

import uvicorn
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.serial_utils import MsgpackEncoder

from llmserve.bus.messages import Reason, Stage
from llmserve.gateway.vllm_app import build_vllm_app, prepare_environment
from llmserve.manifests.loader import load
from llmserve.workers.engine import make_engine
from llmserve.workers.engine.base import Engine, EngineOutput, Work

REASONS = {
    Reason.STOP: FinishReason.STOP,
    Reason.LENGTH: FinishReason.LENGTH,
    Reason.CANCELLED: FinishReason.ABORT,
    Reason.ERROR: FinishReason.ERROR,
}


class DirectClient(EngineCoreClient):  # type: ignore[misc]
    """An engine of this process as vLLM's front end wants it."""

    engine_ranks_managed = [0]

    class resources:
        engine_dead = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._encoder = MsgpackEncoder()

    def attach(self, processor: object) -> None:
        """The gateway's client needs it, this one does not."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        (body,) = self._encoder.encode(request)
        self._engine.submit(Work(work_id=request.request_id, stage=Stage.WHOLE, body=bytes(body)))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._engine.abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        step = await self._engine.step()
        return EngineCoreOutputs(outputs=[self._output(output) for output in step.outputs])

    def _output(self, output: EngineOutput) -> EngineCoreOutput:
        return EngineCoreOutput(
            request_id=output.work_id,
            new_token_ids=output.tokens,
            finish_reason=REASONS[output.reason] if output.reason else None,
        )

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """The process ends with it."""


async def serve(port: int, manifest_path: str) -> None:
    prepare_environment()
    manifest = load(Path(manifest_path))
    engine = make_engine(manifest, "both")
    await engine.start()
    app = await build_vllm_app(manifest, DirectClient(engine))  # type: ignore[arg-type]
    config = uvicorn.Config(app.app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    await uvicorn.Server(config).serve()
