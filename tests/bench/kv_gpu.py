"""The tiers below a CUDA engine: DRAM, and a folder after the engine was restarted, beside computing again.

A model of Llama-3.1-8B's shape; its weights are made up, but large enough for each token to depend on all before it.
Whether tokens are those of computing again can be told with a real model only (``--model``): made-up weights make all
tokens about as likely. Writes ``build/bench/kv_gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.gpu_model import BenchModel, add_options, chosen

NEW_TOKENS = 8
PROMPTS = 3
"""Of each length; medians of them are shown."""


def transfer_config(folder: str, disk: str, dram_gb: float) -> dict[str, Any]:
    """As a worker makes it from its manifest."""
    from llmserve.bus.messages import Role
    from llmserve.manifests.schema import KVCache, Manifest, Metadata, Models, PrimaryModel, Spec, StorageClass
    from llmserve.workers.engine.vllm_tiers import with_tiers

    manifest = Manifest(
        metadata=Metadata(name="bench"),
        spec=Spec(
            models=Models(primary=PrimaryModel(id="bench")),
            kv_cache=KVCache(dram_gb=dram_gb, disk_dtype=disk),  # type: ignore[arg-type]
            storageClasses=(StorageClass(name="disk", type="filesystem", path=folder),),
        ),
    )
    made = with_tiers(manifest, Role.PREFILL, f"bench-{time.time_ns()}", "bench", None)
    assert made is not None
    return made


class Engine:
    """One vLLM engine, stepped by hand."""

    def __init__(self, model: BenchModel, longest: int, transfer: dict[str, Any], kv_gb: float) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            **model.arguments(),
            max_model_len=longest + 64,
            max_num_seqs=4,
            gpu_memory_utilization=0.4,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            prefix_caching_hash_algo="sha256_cbor",
            kv_cache_memory_bytes=int(kv_gb * 2**30),
            disable_log_stats=True,
            # Compilation and graphs take a minute and change little about a prefill.
            enforce_eager=True,
            kv_transfer_config=KVTransferConfig(**transfer),
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        if not model.real:
            self.engine.apply_model(weigh)

    def run(self, name: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        from vllm import SamplingParams

        from llmserve.workers.offload.params import tier_params

        extra = {"kv_transfer_params": tier_params("t-bench")}
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=extra, detokenize=False
        )
        begun_s = time.perf_counter()
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        first_s = 0.0
        while True:
            for output in self.engine.step():
                first_s = first_s or time.perf_counter() - begun_s
                if output.finished:
                    ids = list(output.outputs[0].token_ids)
                    return {"ttft_s": first_s, "tokens": ids, "cached": output.num_cached_tokens or 0}

    def serve(self, pipe: Connection) -> None:
        pipe.send("ready")
        while True:
            while not pipe.poll(0):
                # What is written behind needs steps to be told of.
                self.engine.engine_core.get_output()
                time.sleep(0.0005)
            if (order := pipe.recv()) is None:
                break
            pipe.send(self.run(*order))
        self.engine.engine_core.shutdown()


def weigh(model: Any) -> None:
    """Weights that make tokens depend on the whole context, the same in every process."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for weight in model.parameters():
            generator = generators.setdefault(weight.device, torch.Generator(weight.device).manual_seed(1))
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(1)


def child(pipe: Connection, *arguments: Any) -> None:
    logging.basicConfig(level=logging.INFO)
    try:
        Engine(*arguments).serve(pipe)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        pipe.send(repr(error))
        raise


class Child:
    """An engine in a process of its own, which ends with the block."""

    def __init__(self, *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=child, args=(theirs, *arguments), daemon=True)
        self._runs = 0

    def __enter__(self) -> Child:
        self._process.start()
        assert (said := self._pipe.recv()) == "ready", said
        return self

    def __exit__(self, *exc: object) -> None:
        self._pipe.send(None)
        self._process.join(20)
        self._process.kill()

    def ask(self, prompt: list[int], tokens: int = NEW_TOKENS) -> dict[str, Any]:
        self._runs += 1
        self._pipe.send((f"r{self._runs}", prompt, tokens))
        answer = self._pipe.recv()
        assert isinstance(answer, dict), answer
        return answer


def prompts_of(model: BenchModel, length: int, first: int) -> list[list[int]]:
    return [model.prompt(length, number) for number in range(first, first + PROMPTS)]


def written(folder: Path) -> tuple[int, int]:
    """(pages, bytes) once no more come."""
    known, since_s = (-1, 0), time.monotonic()
    while time.monotonic() - since_s < 1.5:
        sizes = [path.stat().st_size for path in folder.rglob("*.kv")]
        if (len(sizes), sum(sizes)) != known:
            known, since_s = (len(sizes), sum(sizes)), time.monotonic()
        time.sleep(0.2)
    return known


def leading(one: list[int], other: list[int]) -> int:
    """Tokens until the first difference."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def measure(disk: str, model: BenchModel, options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    folder = Path(options.folder) / disk
    folder.mkdir(parents=True)
    lengths, config = options.lengths, model.config
    known = {length: prompts_of(model, length, 1) for length in lengths}
    new = {length: prompts_of(model, length, 20) for length in lengths}
    warm = model.prompt(lengths[0], 40)
    computed: dict[int, list[dict[str, Any]]] = {}
    loaded: dict[str, dict[int, list[dict[str, Any]]]] = {"dram": {}, "disk": {}}

    def arguments() -> tuple[Any, ...]:
        return model, max(lengths), transfer_config(str(folder), disk, options.dram_gb), options.kv_gb

    with Child(*arguments()) as first:
        for _ in range(2):
            first.ask(warm)
        for length in lengths:
            computed[length] = []
            for prompt in known[length]:
                computed[length].append(first.ask(prompt))
                pages, stored = written(folder)
            loaded["dram"][length] = [first.ask(prompt) for prompt in known[length]]
            print(f"{disk}, up to {length} tokens: {pages} pages of {stored} bytes are kept", flush=True)
    with Child(*arguments()) as second:
        second.ask(warm)
        for length in lengths:
            loaded["disk"][length] = [second.ask(prompt) for prompt in known[length]]
            computed[length] += [second.ask(prompt) for prompt in new[length]]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    page_bytes = 2 * config["num_key_value_heads"] * head_dim * config["num_hidden_layers"]
    page_bytes *= 4 if model.dtype == "float32" else 2
    kept_tokens = sum(one["cached"] for one in loaded["disk"][lengths[-1]]) / PROMPTS
    figures |= {f"{disk}_pages": float(pages), f"{disk}_stored_bytes": float(stored)}
    print(f"{disk}: {page_bytes} bytes a token; {kept_tokens:g} tokens of {lengths[-1]} came from the folder")
    for length in lengths:
        compute_s = statistics.median(one["ttft_s"] for one in computed[length])
        figures[f"{disk}_{length}_recompute_ttft_s"] = compute_s
        for source, name in (("dram", f"{disk}_{length}_dram"), ("disk", f"{disk}_{length}_restarted")):
            found = loaded[source][length]
            seconds = [one["ttft_s"] for one in found]
            figures |= {
                f"{name}_ttft_s": statistics.median(seconds),
                f"{name}_ttft_ratio": statistics.median(seconds) / compute_s,
                f"{name}_cached_tokens": statistics.fmean(one["cached"] for one in found),
                f"{name}_agreement": statistics.fmean(
                    leading(one["tokens"], computed[length][n]["tokens"]) / NEW_TOKENS for n, one in enumerate(found)
                ),
            }
        same = [a["tokens"] == b["tokens"] for a, b in zip(*(loaded[s][length] for s in loaded), strict=True)]
        figures[f"{disk}_{length}_restarted_same_as_dram"] = statistics.fmean(same)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--disks", nargs="+", default=["raw", "int8"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--dram-gb", type=float, default=12.0)
    parser.add_argument("--kv-gb", type=float, default=6.0)
    parser.add_argument("--folder", help="for the pages; a temporary one by default")
    parser.add_argument("--out", default="build/bench/kv_gpu.json")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, chosen(options) as model:
        options.folder = options.folder or f"{scratch}/pages"
        for disk in options.disks:
            try:
                figures |= measure(disk, model, options)
            except (AssertionError, EOFError, OSError) as error:
                print(f"{disk}: {error}", flush=True)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
