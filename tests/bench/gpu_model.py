"""The models of the benchmarks on GPUs: made-up weights in the shape of Llama-3.1-8B, or a real model's."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
TINY = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class BenchModel:
    """``real``: a folder with weights and a tokenizer; else only ``config.json`` lies there."""

    folder: str
    config: dict[str, Any]
    dtype: str
    real: bool

    def arguments(self) -> dict[str, Any]:
        """For vLLM."""
        load = {} if self.real else {"load_format": "dummy"}
        return {"model": self.folder, "dtype": self.dtype, "skip_tokenizer_init": True, **load}

    def prompt(self, tokens: int, number: int) -> list[int]:
        """Another one for each ``number``, from its first token on: text for a real model."""
        vocabulary = self.config["vocab_size"]
        if not self.real:
            return [2 + (7919 * i * i + 104729 * i + 31 * number * (i + 1)) % (vocabulary - 2) for i in range(tokens)]
        from tokenizers import Tokenizer

        text = "\n\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
        ids: list[int] = Tokenizer.from_file(f"{self.folder}/tokenizer.json").encode(text).ids
        first = number * 997 % max(1, len(ids) - tokens)
        return ids[first : first + tokens]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="for a try on any device")
    parser.add_argument("--model", help="folder of a model with weights, of Llama's kind")
    parser.add_argument("--dtype", default="bfloat16")


@contextlib.contextmanager
def chosen(options: argparse.Namespace) -> Iterator[BenchModel]:
    """The model that the options name."""
    if options.model:
        config = json.loads((Path(options.model) / "config.json").read_text())
        yield BenchModel(options.model, config, options.dtype, real=True)
        return
    config = TINY if options.tiny else LLAMA
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield BenchModel(folder, config, options.dtype, real=False)
