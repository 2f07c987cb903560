"""vLLM's OpenAI server without an engine: its serving code on our engine client, with the routes that work so."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from llmserve.manifests.models import resolve_model
from llmserve.manifests.schema import Manifest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel
    from starlette.types import ASGIApp
    from vllm.config import VllmConfig

    from llmserve.gateway.engine_client import BusEngineClient
    from llmserve.gateway.generation import BusLLM

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class VllmApp:
    """The server, and what must be stopped with it."""

    app: FastAPI
    front: ASGIApp
    """What serves HTTP: ``app``, and before it the short way of plain streams."""
    engine: BusLLM

    def close(self) -> None:
        self.engine.shutdown()


def prepare_environment() -> None:
    """Settings that vLLM and its libraries read from the environment; what the user has set stays.

    To be called before vllm is imported.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Without this an early import of vLLM takes over the process's logging.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")


def served_name(manifest: Manifest) -> str:
    """The model name that clients use."""
    model = manifest.spec.models.primary
    return model.served_name or model.id


async def build_vllm_app(manifest: Manifest, client: BusEngineClient, *, fast_lane: bool = True) -> VllmApp:
    """vLLM's server for the manifest's model on ``client``. Raises ``ModelError``.

    ``fast_lane`` needs a client that hands tokens to ``TextStream``; without it every token takes vLLM's own path.
    """
    args = _arguments(manifest)
    engine = _engine(_config(args), client)
    client.attach(engine.output_processor)
    app = await _application(args, engine, simulated=manifest.spec.engine.kind == "simulated")
    return VllmApp(app, _fast(app, engine, client) if fast_lane else app, engine)


def _arguments(manifest: Manifest) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model, gateway = manifest.spec.models.primary, manifest.spec.gateway
    line = ["--model", resolve_model(model.id).path, "--served-model-name", served_name(manifest)]
    line += ["--dtype", _DTYPES[model.dtype], "--enable-prompt-tokens-details", "--disable-log-stats"]
    if model.max_model_len is not None:
        line += ["--max-model-len", str(model.max_model_len)]
    if gateway.tool_call_parser is not None:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", gateway.tool_call_parser]
    if gateway.reasoning_parser is not None:
        line += ["--reasoning-parser", gateway.reasoning_parser]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    validate_parsed_serve_args(args)
    return args


def _config(args: Namespace) -> VllmConfig:
    """As vLLM's own engineless renderer does it (``launchers/render/entry.py``)."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    # Only kernels need it, and there are none here.
    model_config.quantization = None
    return VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )


def _engine(config: VllmConfig, client: BusEngineClient) -> BusLLM:
    from llmserve.gateway.generation import BusLLM

    with _engine_core_client(client):
        engine = BusLLM(config, executor_class=None, log_stats=False, log_requests=False)
    engine.generations = WeakValueDictionary()
    return engine


@contextmanager
def _engine_core_client(client: BusEngineClient) -> Iterator[None]:
    """Have ``AsyncLLM``'s constructor take ``client``, which it has no argument for.

    Only the name that the module of ``AsyncLLM`` looks up is exchanged, not the class, so that an engine which
    starts meanwhile in another thread of this process gets what it asked for.
    """
    from vllm.v1.engine import async_llm

    class Factory:
        @staticmethod
        def make_async_mp_client(**_: object) -> BusEngineClient:
            return client

    original = async_llm.EngineCoreClient
    async_llm.EngineCoreClient = Factory
    try:
        yield
    finally:
        async_llm.EngineCoreClient = original


async def _application(args: Namespace, engine: BusLLM, simulated: bool) -> FastAPI:
    from fastapi import FastAPI
    from vllm.entrypoints.anthropic import api_router as messages
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.openai.chat_completion import api_router as chat
    from vllm.entrypoints.openai.completion import api_router as completion
    from vllm.entrypoints.openai.models import api_router as models
    from vllm.entrypoints.openai.responses import api_router as responses
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.tokenize import api_router as tokenize

    from llmserve.gateway.adjust import install_adjustments
    from llmserve.gateway.errors import install_error_handlers
    from llmserve.gateway.model_route import install_model_route
    from llmserve.gateway.unreadable import refuse_unreadable

    app = FastAPI(title="LLMServe", docs_url=None, redoc_url=None)
    app.state.args = args
    for module in (chat, completion, responses, messages, models, tokenize):
        module.attach_router(app)
    install_model_route(app)
    # Its engine core would be needed; a route left in place answers 500.
    unsupported = {"/v1/chat/completions/batch"}
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in unsupported]
    init_exception_handler(app)
    install_error_handlers(app)
    await init_app_state(engine, app.state, args, ("generate",))
    refuse_unreadable(app.state.online_renderer)
    install_adjustments(app, simulated)
    return app


def _fast(app: FastAPI, engine: BusLLM, client: BusEngineClient) -> ASGIApp:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from llmserve.gateway.fast_lane import install_fast_lane
    from llmserve.gateway.fast_route import fast_routes
    from llmserve.gateway.inline import render_small_inline
    from llmserve.gateway.patterns import ChatPatterns
    from llmserve.gateway.plain_prompts import plain_prompts

    chat = app.state.openai_serving_chat
    lane = install_fast_lane(chat, app.state.openai_serving_completion, engine)
    renderer = engine.renderer
    if not engine.model_config.is_multimodal_model:  # whose prompts may have pictures to fetch
        render_small_inline(renderer)
    # Asked for each request, and slow to say.
    eos_token_id = renderer.get_eos_token_id()
    renderer.get_eos_token_id = lambda: eos_token_id
    _read_without_warnings(ChatCompletionRequest)
    prompts = plain_prompts(chat)
    return fast_routes(app, None if prompts is None else ChatPatterns(chat, lane, client, prompts))


def _read_without_warnings(model: type[BaseModel]) -> None:
    """Have deprecated fields read as all others are: vLLM does so at each request; no one sees the warnings."""
    for name, field in model.model_fields.items():
        if field.deprecated and name in vars(model):
            delattr(model, name)
