"""Requests that are wrong in every way, for tests and for measuring what they do to others."""

import json
from collections.abc import Callable
from typing import Any

MIB = 2**20
_DEEP_SCHEMA = json.loads('{"items":' * 900 + "{}" + "}" * 900)


def completion(**fields: Any) -> tuple[str, bytes]:
    return "/v1/completions", json.dumps({"prompt": "one", "max_tokens": 4} | fields).encode()


def chat(**fields: Any) -> tuple[str, bytes]:
    messages = [{"role": "user", "content": "Hello"}]
    return "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 4} | fields).encode()


def embedding(**fields: Any) -> tuple[str, bytes]:
    return "/v1/embeddings", json.dumps({"input": "one"} | fields).encode()


BODIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "nothing": lambda: ("/v1/completions", b""),
    "no JSON at all": lambda: ("/v1/completions", b"nonsense"),
    "no JSON": lambda: ("/v1/completions", b"{" + b"a" * MIB),
    "invalid UTF-8": lambda: ("/v1/completions", b'{"prompt":"\xff\xfe"}'),
    "half a surrogate pair": lambda: completion(model="\ud800"),
    "a list": lambda: ("/v1/completions", b"[1, 2]"),
    "deep nesting": lambda: ("/v1/completions", b'{"prompt":' + b"[" * 10 * MIB),
    "10 MiB of empty lists": lambda: ("/v1/completions", b'{"prompt":[' + b"[]," * (10 * MIB // 3) + b"[]]}"),
    "10 MiB of ids": lambda: ("/v1/completions", b'{"prompt":[' + b"1," * (5 * MIB) + b"1]}"),
    "as many values as may be": lambda: ("/v1/completions", b'{"prompt":[' + b"[]," * (2**18 - 3) + b"[]]}"),
    "10 MiB of text": lambda: completion(prompt="word " * (2 * MIB)),
    "a huge name": lambda: completion(model="m" * (2 * MIB)),
    "a huge number": lambda: ("/v1/completions", b'{"prompt":"a","max_tokens":' + b"9" * MIB + b"}"),
    "an infinite number": lambda: ("/v1/completions", b'{"prompt":"a","temperature":1e999}'),
    "many prompts": lambda: completion(prompt=["a"] * 5000),
    "many lists of ids": lambda: completion(prompt=[[1]] * 5000),
    "enormous n": lambda: completion(n=10**9),
    "prompts times n": lambda: completion(prompt=["a"] * 100, n=100),
    "a long stop list": lambda: completion(stop=["s"] * 100_000),
    "a long stop string": lambda: completion(stop="s" * MIB),
    "many stop ids": lambda: completion(stop_token_ids=list(range(40_000))),
    "many biases": lambda: completion(logit_bias={str(id): 1 for id in range(40_000)}),
    "a wrong id": lambda: completion(prompt=[10**12]),
    "an id of the wrong type": lambda: completion(prompt=[1, "a", 2.5]),
    "wrong types": lambda: completion(temperature="warm", n=[], stop={}),
    "many unknown fields and a wrong one": lambda: completion(n=0, **{f"field{i}" * 20: i for i in range(10_000)}),
    "a long regex": lambda: completion(structured_outputs={"regex": "(a|b)" * 100_000}),
    "a deep regex": lambda: completion(structured_outputs={"regex": "(" * 5000 + ")" * 5000}),
    "a long choice": lambda: completion(structured_outputs={"choice": ["c" * 100] * 10_000}),
    "a large schema": lambda: completion(structured_outputs={"json": {"enum": ["e" * 100] * 10_000}}),
    "a deep schema": lambda: completion(
        structured_outputs={"json": _DEEP_SCHEMA, "disable_additional_properties": True}
    ),
    "a deep tool": lambda: chat(tools=[{"function": {"name": "f", "parameters": _DEEP_SCHEMA}}]),
    "many tools": lambda: chat(tools=[{"function": {"name": "f"}}] * 10_000),
    "many messages": lambda: chat(messages=[{"role": "user", "content": ""}] * 20_000),
    "long messages": lambda: chat(messages=[{"role": "user", "content": "word " * MIB}]),
    "an image": lambda: chat(messages=[{"role": "user", "content": [{"type": "image_url", "text": "x" * MIB}]}]),
    "a role of the wrong type": lambda: chat(messages=[{"role": 1}]),
    "no input": lambda: embedding(input=[]),
    "an empty input": lambda: embedding(input=["a", ""]),
    "many inputs": lambda: embedding(input=["a"] * 5000),
    "many inputs of ids": lambda: embedding(input=[[1]] * 5000),
    "a long input": lambda: embedding(input="word " * (2 * MIB)),
    "an input of everything": lambda: embedding(input=[1, "a", [1], 2.5, None, {}]),
    "enormous dimensions": lambda: embedding(dimensions=10**40),
    "a wrong cut": lambda: embedding(input="word " * MIB, truncate_prompt_tokens=10**9),
    "pairs that do not match": lambda: ("/v1/score", json.dumps({"text_1": ["a"] * 9, "text_2": ["b"] * 8}).encode()),
    "many documents": lambda: ("/v1/rerank", json.dumps({"query": "q", "documents": ["d"] * 5000}).encode()),
    "a long query": lambda: ("/v1/rerank", json.dumps({"query": "q " * MIB, "documents": ["d"]}).encode()),
    "ids of no text": lambda: ("/detokenize", b'{"tokens":[-1]}'),
    "too much": lambda: ("/v1/completions", b" " * (16 * MIB + 1)),
}
"""What is wrong -> path and body, made when they are needed: some are large."""
