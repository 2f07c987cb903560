"""Random bodies that no one should send to a deployment of the model ``smol``, and what their answers must be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MESSAGE = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "smol", "messages": [MESSAGE]},
    "/v1/completions": {"model": "smol", "prompt": "x"},
    "/v1/responses": {"model": "smol", "input": "x"},
    "/v1/messages": {"model": "smol", "messages": [MESSAGE], "max_tokens": 9},
    "/tokenize": {"model": "smol", "prompt": "x"},
    "/detokenize": {"model": "smol", "tokens": [1]},
}
REQUIRED = {
    "/v1/chat/completions": ["messages"],
    "/v1/completions": ["prompt"],
    "/v1/responses": ["input"],
    "/v1/messages": ["messages", "max_tokens", "model"],
    "/tokenize": ["prompt"],
    "/detokenize": ["tokens"],
}
NO_NUMBER: list[Any] = ["hot", {}, [], {"a": 1}, [1], "1e", "\x00"]
SAMPLING: dict[str, list[Any]] = {
    "temperature": [*NO_NUMBER, -1],
    "top_p": [*NO_NUMBER, -0.5, 2, 0],
    "max_tokens": [*NO_NUMBER, -1, 1.5],
    "n": [*NO_NUMBER, 0, -3],
    "seed": [*NO_NUMBER, 10**30, 1.5],
    "presence_penalty": [*NO_NUMBER, 7, -7],
    "frequency_penalty": [*NO_NUMBER, 7, -7],
    "min_tokens": [*NO_NUMBER, -1],
    "top_k": [*NO_NUMBER, -7],
    "stop": [7, {}, [[]], [7]],
    "stop_token_ids": [["a"], "a", {}, [-1.5]],
    "logit_bias": [[], "x", {"a": "b"}, {"99999999": 1}, {"-5": 1}],
    "stream": ["maybe", {}, 7],
    "model": [7, {}, [], "no such model"],
    "guided_regex": ["a+"],
    "service_tier": ["gold"],
    "structured_outputs": [
        7,
        {"regex": "("},
        {"grammar": "root ::= ("},
        {"choice": []},
        {"json": "{"},
        {"json": {"type": "object"}, "regex": "a"},
    ],
    "response_format": [7, {"type": "no"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 7}],
    "kv_transfer_params": [{"do_remote_prefill": True}],
}
OWN: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": {
        **SAMPLING,
        "messages": [7, "x", {}, [7], [{}], [{"role": 7}], [{"role": "user", "content": 7}], [["role"]]],
        "tools": [7, "x", [7], [{}], [{"type": "function"}]],
        "tool_choice": ["required", 7, {"type": "function", "function": {"name": "f"}}, "never"],
        "top_logprobs": [*NO_NUMBER, -7, 10**9],
        "stream_options": [7, "x", {"include_usage": True}],
    },
    "/v1/completions": {
        **SAMPLING,
        "prompt": [{}, [{}], ["x", 1], [[1], "x"], [-1], [10**7], 1.5, [1.5]],
        "logprobs": [*NO_NUMBER, -7],
        "suffix": ["x"],
    },
    "/v1/responses": {
        "input": [7, {}, [7], [{"type": "no such type", "x": 1}]],
        "max_output_tokens": NO_NUMBER,
        "temperature": NO_NUMBER,
        "tools": [7, "x", [7]],
        "stream": ["maybe", {}],
        "service_tier": ["gold"],
        "model": ["no such model"],
    },
    "/v1/messages": {
        "messages": [7, "x", {}, [7], [{}], [{"role": "user", "content": 7}]],
        "max_tokens": [*NO_NUMBER, -1, 0],
        "temperature": NO_NUMBER,
        "model": [7, {}],
    },
    "/tokenize": {"prompt": [7, {}, [1]], "model": ["no such model"]},
    "/detokenize": {"tokens": ["x", {}, ["a"], [-1], 7], "model": ["no such model"]},
}


def wrong_field(chance: random.Random, url: str) -> bytes:
    field = chance.choice(list(OWN[url]))
    streams = (
        {"stream": True} if chance.random() < 0.5 and "tokenize" not in url and field != "stream_options" else {}
    )
    return json.dumps({**VALID[url], **streams, field: chance.choice(OWN[url][field])}).encode()


def missing_field(chance: random.Random, url: str) -> bytes:
    gone = chance.choice(REQUIRED[url])
    return json.dumps({name: value for name, value in VALID[url].items() if name != gone}).encode()


def cut_short(chance: random.Random, url: str) -> bytes:
    whole = json.dumps(VALID[url]).encode()
    return whole[: chance.randrange(len(whole))]


def garbled(chance: random.Random, url: str) -> bytes:
    """Valid until a run of bytes that is neither JSON nor, mostly, UTF-8."""
    whole = json.dumps(VALID[url]).encode()
    place = chance.randrange(1, len(whole))
    return whole[:place] + b"\xff" + chance.randbytes(chance.randrange(9)) + whole[place:]


def noise(chance: random.Random, url: str) -> bytes:
    return b"\x80" + chance.randbytes(chance.randrange(200))


def no_object(chance: random.Random, url: str) -> bytes:
    return json.dumps(chance.choice([None, True, 7, -1.5, "x", [], [VALID[url]], [[[]]]])).encode()


def nested(chance: random.Random, url: str) -> bytes:
    depth = chance.choice([50, 1000, 20_000])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * depth + b"1" + closing * depth
    field = REQUIRED[url][0]
    stream = chance.choice([b"", b'"stream": true, '])
    return chance.choice([value, b'{"model": "smol", %s"%s": %s}' % (stream, field.encode(), value)])


def odd_numbers(chance: random.Random, url: str) -> bytes:
    number = chance.choice([b"NaN", b"-Infinity", b"1" * 5000, b"1e999", b"0x10", b"01", b"1."])
    field = {"/detokenize": b"tokens", "/tokenize": b"prompt"}.get(url, b"temperature")
    whole = json.dumps({name: value for name, value in VALID[url].items() if name.encode() != field}).encode()
    return whole[:-1] + b', "%s": %s}' % (field, number)


KINDS: list[Callable[[random.Random, str], bytes]] = [
    wrong_field,
    wrong_field,
    wrong_field,
    missing_field,
    cut_short,
    garbled,
    noise,
    no_object,
    nested,
    odd_numbers,
]


@dataclass(frozen=True)
class Malformed:
    """One request."""

    url: str
    kind: str
    body: bytes


def malformed(chance: random.Random) -> Malformed:
    url, kind = chance.choice(list(VALID)), chance.choice(KINDS)
    return Malformed(url, kind.__name__, kind(chance, url))


def fault_of(asked: Malformed, status: int, text: str) -> str:
    """What is wrong with an answer that should say what is wrong; empty if nothing."""
    fault = _fault(status, text)
    return f"{asked.url} {asked.kind} {asked.body[:200]!r}: {status} {fault}" if fault else ""


def _fault(status: int, text: str) -> str:
    if not 400 <= status < 500:
        return f"is no 4xx: {text[:200]}"
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"has no error object: {text[:200]}"
    if not isinstance(error.get("message"), str) or "type" not in error or "Traceback" in text:
        return f"is not in OpenAI's shape: {text[:200]}"
    return ""
