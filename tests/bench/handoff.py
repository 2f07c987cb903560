"""A prompt's pages from one vLLM engine to another on one GPU, by our connector and by vLLM's own.

Two processes with a model of Llama-3.1-8B's shape and made-up weights share the GPU. The decode engine steps all the
time, as a busy one does. Kind ``llmserve`` loads the pages in the step that computes with them, ``polled`` moves them
before that and looks for the end from step to step, both by the same-host engine; ``nixl`` does the latter by NIXL
alone, ``chunks`` and ``ahead`` after and during a prefill in chunks of 2,048 tokens. ``--engine`` has another carry
the pages of all of ours, as between two hosts. Writes ``build/bench/handoff.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing as mp
import os
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmserve.workers.connector.wire import decode_handoff
from tests.bench.gpu_model import BenchModel, add_options, chosen

NEW_TOKENS = 16
REPEATS = 4
"""The first one connects and is not counted."""
KINDS = ["llmserve", "polled", "nixl", "chunks", "ahead", "nixl_connector"]
CHUNKED, CHUNK = ("chunks", "ahead"), 2048


def transfer_config(setup: Setup, *, producer: bool) -> dict[str, Any]:
    kind = setup.kind
    role = "kv_producer" if producer else "kv_consumer"
    if kind == "nixl_connector":
        return {"kv_connector": "NixlConnector", "kv_role": role, "engine_id": role}
    return {
        "kv_connector": "LLMServeConnector",
        "kv_connector_module_path": "llmserve.workers.connector.connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "engine_id": f"{role}-{time.time_ns()}",
        "kv_connector_extra_config": {
            "lease_s": 60.0,
            "timeout_s": 20.0,
            "engine_order": [setup.engine or "nixl"],
            "same_host": kind != "nixl" and not setup.engine,
            "nixl_backend_policy": "auto",
            "ucx_rdma": True,
            "host": "127.0.0.1",
            "model_id": "bench",
            "io_bytes_s": None,
            "ahead": kind == "ahead",
            "join_layers": True,
            "held_poll_s": 0.0,
        },
    }


def params_of(kind: str) -> dict[str, Any]:
    if kind == "nixl_connector":
        return {"do_remote_decode": True, "do_remote_prefill": False}
    return {"llmserve_hold": True}


@dataclass(frozen=True)
class Setup:
    """What both engines have in common."""

    kind: str
    model: BenchModel
    lengths: list[int]
    page_tokens: int | None
    tp: int
    gpus: list[str]
    """The prefill engine's and the decode engine's, as ``CUDA_VISIBLE_DEVICES`` names them; none: both see all."""
    engine: str | None = None
    """The only transfer engine; None: as the kind has it."""


class Engine:
    """One vLLM engine, stepped by hand."""

    def __init__(self, setup: Setup, *, producer: bool) -> None:
        kind = setup.kind
        if setup.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = setup.gpus[0 if producer else 1]
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
            VLLM_NIXL_SIDE_CHANNEL_PORT="5600" if producer else "5610",
        )
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from llmserve.workers.connector import connector

        if kind == "polled":
            connector._AT_ONCE_BYTES.clear()
        arguments = EngineArgs(
            **setup.model.arguments(),
            max_model_len=max(setup.lengths) + 64,
            block_size=setup.page_tokens,
            tensor_parallel_size=setup.tp,
            max_num_seqs=8,
            max_num_batched_tokens=CHUNK if kind in CHUNKED else 8192,
            enable_prefix_caching=kind in CHUNKED,
            gpu_memory_utilization=0.45,
            kv_cache_memory_bytes=10 << 30,
            disable_log_stats=True,
            cudagraph_capture_sizes=[1, 2, 4],
            kv_transfer_config=KVTransferConfig(**transfer_config(setup, producer=producer)),
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.kind = kind
        self.connector: Any = self.engine.engine_core.engine_core.scheduler.connector

    def run(self, name: str, prompt: list[int], tokens: int, params: dict[str, Any] | None) -> dict[str, Any]:
        """Times are of the monotonic clock, which processes of one machine share."""
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=extra, detokenize=False
        )
        begun_s = time.monotonic()
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        times: list[float] = []
        marks = [time.monotonic() - begun_s]
        seen = 0
        while True:
            outputs = self.engine.step()
            self.offer()
            if not times:
                marks.append(time.monotonic() - begun_s)
            for output in outputs:
                if output.request_id.startswith(name) and len(output.outputs[0].token_ids) > seen:
                    seen = len(output.outputs[0].token_ids)
                    times.append(time.monotonic())
                if output.finished:
                    ids = list(output.outputs[0].token_ids)
                    params = output.kv_transfer_params
                    return {"begun": begun_s, "times": times, "tokens": ids, "params": params, "marks": marks}

    def offer(self) -> None:
        """Pass on what the prefill has on offer."""
        if self.kind == "ahead" and (stats := self.connector.scheduler_side.take_stats()) is not None:
            for _, handoff in stats.data["ahead"]:
                self.pipe.send(handoff)

    def serve(self, pipe: Connection) -> None:
        self.pipe = pipe
        pipe.send("ready")
        while True:
            while not pipe.poll(0):
                self.engine.engine_core.get_output()
                time.sleep(0.0002)
            order = pipe.recv()
            if order is None:
                return
            pipe.send(self.run(*order))


def child(setup: Setup, producer: bool, pipe: Connection) -> None:
    logging.basicConfig(level=logging.INFO)
    try:
        Engine(setup, producer=producer).serve(pipe)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        pipe.send(repr(error))
        raise


def ask(pipe: Connection, *order: Any) -> dict[str, Any]:
    pipe.send(order)
    answer = pipe.recv()
    assert isinstance(answer, dict), answer
    return answer


def prefilled(prefill: Connection, decode: Connection, name: str, prompt: list[int], params: dict[str, Any]) -> Any:
    """Ask for a prefill; what it has on offer meanwhile goes to the decode engine."""
    prefill.send((name, prompt, 1, params))
    while not isinstance(answer := prefill.recv(), dict):
        pages = decode_handoff(answer).tokens
        ask(decode, f"a{name}-{pages}", prompt[: pages + 1], 1, {"llmserve_handoff": answer})
    return answer


def handoffs(setup: Setup) -> dict[str, float]:
    kind, model, lengths = setup.kind, setup.model, setup.lengths
    context = mp.get_context("spawn")
    figures: dict[str, float] = {}
    ends = [context.Pipe() for _ in range(2)]
    children = [
        # Not daemons: those may have no children, and with tensor parallelism each rank is one.
        context.Process(target=child, args=(setup, producer, theirs))
        for producer, (_, theirs) in zip((True, False), ends, strict=True)
    ]
    prefill, decode = (mine for mine, _ in ends)
    for process in children:
        process.start()
    for pipe in (prefill, decode):
        assert (said := pipe.recv()) == "ready", said
    try:
        for tokens in lengths:
            found: list[tuple[float, float, bool]] = []
            started_s: list[float] = []
            steps_s: list[float] = []
            for repeat in range(REPEATS):
                prompt = model.prompt(tokens, repeat)
                first = prefilled(prefill, decode, f"p{tokens}-{repeat}", prompt, params_of(kind))
                assert first["params"], "the prefill engine hands nothing over"
                # vLLM's own computes the last token of the prompt again and samples the first one anew.
                known = [] if kind == "nixl_connector" else first["tokens"]
                name, params = f"d{tokens}-{repeat}", dict(first["params"])
                rest = ask(decode, name, prompt + known, NEW_TOKENS - len(known), params)
                # After the handoff, so that the decode engine cannot have its pages yet.
                whole = ask(decode, f"w{tokens}-{repeat}", prompt, NEW_TOKENS, None)
                steps_s += [b - a for a, b in zip(whole["times"], whole["times"][1:], strict=False)]
                step_s = statistics.median(steps_s)
                gap_s = rest["times"][0] - first["times"][0]
                prefill_s = first["times"][0] - first["begun"]
                equal = known + rest["tokens"] == whole["tokens"]
                # Scheduling is asynchronous: a step returns the tokens of the one before.
                started_s.append(rest["begun"] + rest["marks"][-3] - first["times"][0])
                marks = [round(mark * 1e3, 2) for mark in rest["marks"]]
                way_ms = (rest["begun"] - first["times"][0]) * 1e3
                print(
                    f"  to the engine {way_ms:.2f} ms; queued, then each step until {marks[:3]} ... {marks[-4:]} ms"
                )
                found.append((gap_s, prefill_s, equal))
                print(f"{kind} {tokens}: {gap_s * 1e3:.2f} ms, step {step_s * 1e3:.2f} ms, equal {equal}", flush=True)
            counted = found[1:]
            gap_s = statistics.median(gap for gap, _, _ in counted)
            figures |= {
                f"{kind}_{tokens}_second_token_ms": round(gap_s * 1e3, 2),
                f"{kind}_{tokens}_handoff_ms": round((gap_s - step_s) * 1e3, 2),
                f"{kind}_{tokens}_decode_started_ms": round(statistics.median(started_s[1:]) * 1e3, 2),
                f"{kind}_{tokens}_step_ms": round(step_s * 1e3, 2),
                f"{kind}_{tokens}_second_token_over_step": round(gap_s / step_s, 2),
                f"{kind}_{tokens}_prefill_ms": round(statistics.median(p for _, p, _ in counted) * 1e3, 2),
                f"{kind}_{tokens}_equal": float(all(equal for _, _, equal in found)),
            }
    finally:
        for pipe in (prefill, decode):
            pipe.send(None)
        for process in children:
            process.join(15)
            process.kill()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--page-tokens", type=int, help="vLLM's own choice by default")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--gpus", nargs=2, default=[], help="the prefill and the decode engine's: 0 1, say")
    parser.add_argument("--engine", choices=["nixl", "ucx", "nccl"])
    parser.add_argument("--out", default="build/bench/handoff.json")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with chosen(options) as model:
        for kind in options.kinds:
            try:
                setup = Setup(
                    kind, model, options.lengths, options.page_tokens, options.tp, options.gpus, options.engine
                )
                figures |= handoffs(setup)
            except (AssertionError, EOFError, OSError) as error:
                print(f"{kind}: {error}", flush=True)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    for tokens in options.lengths:
        ours, theirs = (figures.get(f"{kind}_{tokens}_handoff_ms") for kind in ("llmserve", "nixl_connector"))
        if ours and theirs:
            figures[f"handoff_{tokens}_times_faster"] = round(theirs / ours, 1)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
