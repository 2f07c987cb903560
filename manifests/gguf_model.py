"""A llama-family GGUF file with a GPT-2 tokenizer, converted to what Hugging Face and vLLM load.

The inverse of llama.cpp's ``convert_hf_to_gguf.py``. Quantized weights are dequantized to bf16: the model is the
quantized one, served at full width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import gguf
import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
_T = TypeVar("_T")

_OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
"""``tokenizer.ggml.token_type`` of tokens that no text may spell."""


class GgufError(ValueError):
    """The file is none that this module can convert."""


def convert(source: Path, folder: Path) -> None:
    """Write the model in ``source`` into the existing, empty ``folder``. Raises ``GgufError``."""
    reader = gguf.GGUFReader(source)
    metadata = _Metadata(reader)
    for key, known in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
        if metadata.text(key) != known:
            raise GgufError(f"{source.name}: {key} is {metadata.text(key)!r}, only {known!r} can be converted")
    names = [str(tensor.name) for tensor in reader.tensors]
    for name, content in {
        "config.json": _config(metadata, tied="output.weight" not in names),
        "generation_config.json": _special_ids(metadata),
        "tokenizer.json": _tokenizer(metadata),
        "tokenizer_config.json": _tokenizer_config(metadata),
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _write_weights(reader, metadata, folder / "model.safetensors")


class _Metadata:
    """Typed reading of a GGUF file's key-value pairs."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._values: dict[str, object] = {name: field.contents() for name, field in reader.fields.items()}

    def text(self, key: str) -> str:
        return self._read(key, str)

    def number(self, key: str) -> int:
        return self._read(key, int)

    def real(self, key: str) -> float:
        return self._read(key, float)

    def texts(self, key: str) -> list[str]:
        return self._read(key, list[str])

    def numbers(self, key: str) -> list[int]:
        return self._read(key, list[int])

    def token(self, which: str) -> str:
        """The special token that the file calls ``which``."""
        return self.texts("tokenizer.ggml.tokens")[self.number(f"tokenizer.ggml.{which}_token_id")]

    def _read(self, key: str, kind: type[_T]) -> _T:
        if key not in self._values:
            raise GgufError(f"no {key} in the GGUF file")
        try:
            return msgspec.convert(self._values[key], kind)
        except msgspec.ValidationError as error:
            raise GgufError(f"{key} in the GGUF file: {error}") from error


def _special_ids(metadata: _Metadata) -> dict[str, Json]:
    return {
        "bos_token_id": metadata.number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.number("tokenizer.ggml.padding_token_id"),
    }


def _config(metadata: _Metadata, tied: bool) -> dict[str, Json]:
    heads = metadata.number("llama.attention.head_count")
    hidden = metadata.number("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.number("llama.feed_forward_length"),
        "num_hidden_layers": metadata.number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": metadata.number("llama.context_length"),
        # float32 in the file: 1e-5 reads as 9.999999747e-06 unless the digits beyond its precision are cut.
        "rms_norm_eps": float(f"{metadata.real('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": metadata.real("llama.rope.freq_base"),
        "rope_scaling": None,
        "vocab_size": len(metadata.texts("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **_special_ids(metadata),
    }


def _tokenizer(metadata: _Metadata) -> dict[str, Json]:
    """``tokenizer.json``. SmolLM's pre-tokenizer splits digits, then runs GPT-2's regular expression."""
    if metadata.text("tokenizer.ggml.pre") != "smollm":
        raise GgufError(f"pre-tokenizer {metadata.text('tokenizer.ggml.pre')!r}, only 'smollm' can be converted")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    byte_level: dict[str, Json] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    merges: list[Json] = [list(merge.split(" ")) for merge in metadata.texts("tokenizer.ggml.merges")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _special_token(token_id, tokens[token_id])
            for token_id, kind in enumerate(metadata.numbers("tokenizer.ggml.token_type"))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _special_token(token_id: int, content: str) -> dict[str, Json]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _tokenizer_config(metadata: _Metadata) -> dict[str, Json]:
    return {
        # Not GPT2Tokenizer: transformers 5 would build that one's own pre-tokenizer, which keeps digits together.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": metadata.token("bos"),
        "eos_token": metadata.token("eos"),
        "pad_token": metadata.token("padding"),
        "unk_token": metadata.token("unknown"),
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.number("llama.context_length"),
        "chat_template": metadata.text("tokenizer.chat_template"),
    }


def _write_weights(reader: gguf.GGUFReader, metadata: _Metadata, path: Path) -> None:
    """Write bf16 safetensors: the header's length, the header as JSON, the values.

    By hand, since safetensors saves bf16 only from torch, which takes seconds to import.
    """
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes] = []
    end = 0
    for name, weight in _weights(reader, metadata):
        data: bytes = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.BF16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
        pieces.append(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(pieces)


def _weights(reader: gguf.GGUFReader, metadata: _Metadata) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Hugging Face name and float32 values, shape (out, in) or (out,), of every weight."""
    heads = {
        "attn_q": metadata.number("llama.attention.head_count"),
        "attn_k": metadata.number("llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = str(tensor.name)
        if name in _OUTER_TENSORS:
            yield _OUTER_TENSORS[name], values
            continue
        block, layer, kind, suffix = (name.split(".") + [""] * 4)[:4]
        if block != "blk" or suffix != "weight" or kind not in _LAYER_TENSORS:
            raise GgufError(f"tensor {name!r} has no place in a llama model")
        if kind in heads:
            values = _split_halves(values, heads[kind])
        yield f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight", values


def _split_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's order of a head's rows: rotary pairs stand side by side there, in halves at Hugging Face."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))
