"""A small Llama of random weights, for tests to which it does not matter whether the text makes sense.

Its weights are so large that every token of a prompt counts for every token of the output: a wrong page shows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llmserve.manifests.models import PACKAGED_ID, default_cache_dir, make_once, resolve_model

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
SERVED = "made-up"


def made_up_model() -> Path:
    """Its folder, with the packaged model's tokenizer; made at the first use."""
    target = default_cache_dir() / "made-up-1"
    make_once(target, _write)
    return target


def made_up() -> dict[str, object]:
    """Changes to a manifest; in fp32, whose greedy output does not depend on which requests share a batch."""
    return {
        "models.primary.id": str(made_up_model()),
        "models.primary.served_name": SERVED,
        "models.primary.dtype": "fp32",
    }


def made_up_answer(prompt: list[int], tokens: int) -> list[int]:
    """Greedy output of the model without vLLM, the end of the text ignored."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(made_up_model())
    made = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return [int(token) for token in made[0][len(prompt) :]]


def _write(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve_model(PACKAGED_ID).path) / name, folder)
