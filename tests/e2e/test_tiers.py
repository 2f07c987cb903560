"""``llmserve up`` with a storage class: a prompt that an earlier stack has served is loaded, not computed."""

from __future__ import annotations

from pathlib import Path

from openai import OpenAI

from tests.processes import Stack, manifest_with, metrics, running, total, wait_for

WORDS = " ".join(f"Sentence {number} says little about tiers of memory." for number in range(60))


def answer(stack: Stack) -> tuple[str, int]:
    """(text, prompt tokens that were not computed)."""
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    done = client.completions.create(model=stack.model, prompt=WORDS, max_tokens=8, temperature=0)
    details = done.usage.prompt_tokens_details if done.usage else None
    return done.choices[0].text, (details.cached_tokens or 0) if details else 0


def pages_known(stack: Stack) -> float:
    """To the kv role inside the stack."""
    return total(metrics(stack.metrics_url), "llmserve_storage_pages", tier="disk")


def test_a_stack_that_is_started_again_loads_what_the_last_one_computed(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    changes = {
        "storageClasses": [{"name": "disk", "type": "filesystem", "path": str(pages)}],
        "kv_cache": {"disk_dtype": "zstd", "dram_gb": 0.25},
    }
    texts: list[str] = []
    for start in range(2):
        manifest = manifest_with("local.yaml", tmp_path, changes)
        with running(Stack(manifest, tmp_path / f"up{start}.log")) as stack:
            assert isinstance(stack, Stack)
            stack.ready()
            text, cached = answer(stack)
            texts.append(text)
            assert (cached > 500) == (start == 1), cached
            wait_for(lambda: len(list(pages.rglob("*.kv"))) >= 4, 20, "pages are kept")
            wait_for(lambda stack=stack: pages_known(stack) >= 4, 20, "the kv role knows them")  # type: ignore[misc]
            assert stack.stop() == 0
    assert texts[0] == texts[1]
