"""Embeddings, scores and rankings of the real SmolLM2 over HTTP equal what transformers says, however they are made."""

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from support.deployment import DEADLINE_S, Deployment, Served
from support.prompts import excerpts, library_tokens
from support.reference import Reference

from baton.worker.weights.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLOSE = 1e-4
"""Of each element of vectors of length 1, and of cosines: rounding in float32."""
SIZES = ("--max-model-len", "1024", "--served-model-name", "smol")
MODES = {
    "1 prefill + 1 decode, chunks, last": ["--pooling-type", "LAST", "--max-num-batched-tokens", "96"],
    "2 prefill + 1 decode, mean": ["--prefill", "2", "--decode", "1", "--pooling-type", "MEAN"],
    "unified, chunks, mean": ["--unified", "1", "--pooling-type", "mean", "--max-num-batched-tokens", "64"],
    "unified, preempting, mean": ["--unified", "1", "--pooling-type", "MEAN", "--num-blocks", "64"],
    "2 unified, 2 frontends, last": ["--unified", "2", "--frontends", "2", "--no-enable-prefix-caching"],
}
TEXTS = ["The sky is blue.", "A baton is passed on.", "Der Himmel ist blau."]

Expect = Callable[[list[int], str], np.ndarray]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    """Prose and code, some of it twice, and one that fills the context."""
    chosen = excerpts(library_tokens(model_dir), [1, 2, 16, 17, 64, 150, 300, 700, 1024], seed=3)
    return [*chosen, chosen[5], chosen[7][:200]]


@pytest.fixture(scope="module")
def expect(model_dir: Path) -> Expect:
    """The vector of transformers, of length 1."""
    reference = Reference(model_dir)
    known: dict[tuple[tuple[int, ...], str], np.ndarray] = {}

    def vector(prompt: list[int], pooling: str) -> np.ndarray:
        key = tuple(prompt), pooling
        if key not in known:
            hidden = reference.hidden(prompt)
            pooled = hidden[-1] if pooling == "LAST" else hidden.mean(0)
            known[key] = torch.nn.functional.normalize(pooled, dim=0).numpy()
        return known[key]

    return vector


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    flags = ("--prefill", "1", "--decode", "1", "--matryoshka-dimensions", "64", "256", "--max-waiting", "20")
    with Deployment(*flags, *SIZES) as deployment:
        yield deployment


@pytest.fixture
def client(served: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(served: Deployment, **fields: Any) -> dict[str, Any]:
    response = served.client.post("/v1/embeddings", json={"model": "smol", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def post(served: Deployment, path: str, **fields: Any) -> httpx.Response:
    return served.client.post(path, json={"model": "smol", **fields})


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert len(response.content) < 2**14
    return response.json()["error"]


@pytest.mark.parametrize("mode", MODES)
def test_vectors_are_those_of_transformers_beside_running_streams(
    mode: str, prompts: list[list[int]], expect: Expect
) -> None:
    pooling = "MEAN" if "mean" in mode else "LAST"
    growing = [prompt[:16] for prompt in prompts[-5:-1]]
    # Four streams that grow by 400 tokens need 104 blocks; the preempting mode has 64, also for those that begin late.
    fields: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 400 if "preempting" in mode else 100}
    with Deployment(*MODES[mode], *SIZES) as served, ThreadPoolExecutor(1) as pool:
        alone = served.complete_all(growing, **fields) if "preempting" not in mode else None
        beside = pool.submit(served.complete_all, growing, **fields)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            answers = [client.embeddings.create(model="smol", input=prompts, encoding_format="float")]
            # By itself the package asks for base64, and decodes it.
            answers += [client.embeddings.create(model="smol", input=prompts)]
        texts = [answer["choices"][0]["text"] for answer in beside.result()]
        if alone is not None:
            assert texts == [answer["choices"][0]["text"] for answer in alone]
        served.wait_idle()
        made = served.total("baton_embeddings_total")
        preemptions = served.total("baton_preemptions_total")
    for answer in answers:
        assert [item.index for item in answer.data] == list(range(len(prompts)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, prompts))
        vectors = [np.array(item.embedding, dtype=np.float32) for item in answer.data]
        expected = [expect(prompt, pooling) for prompt in prompts]
        worst = max(float(np.abs(a - b).max()) for a, b in zip(vectors, expected, strict=True))
        print(f"{mode}: largest difference {worst:.1e}, {preemptions:.0f} preemptions")
        assert worst < CLOSE
        assert all(abs(float(a @ b) - 1) < CLOSE for a, b in zip(vectors, expected, strict=True))
    assert made == 2 * len(prompts)
    assert ("preempting" in mode) == (preemptions > 0)


def test_inputs_come_in_every_shape_that_openai_has(client: openai.OpenAI, served: Deployment) -> None:
    ids = [served.client.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    whole = [item.embedding for item in client.embeddings.create(model="smol", input=TEXTS).data]
    for given, expected in ((TEXTS[0], whole[:1]), (ids[0], whole[:1]), (ids, whole), ([TEXTS[0], *ids[1:]], whole)):
        answer = embed(served, input=given)
        vectors = [item["embedding"] for item in answer["data"]]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert answer["object"] == "list"
        assert {item["object"] for item in answer["data"]} == {"embedding"}
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids[: len(expected)]))


def test_base64_is_little_endian_float32(served: Deployment) -> None:
    [item] = embed(served, input=TEXTS[0], encoding_format="base64")["data"]
    vector = np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4")
    [plain] = embed(served, input=TEXTS[0], encoding_format="float")["data"]
    np.testing.assert_array_equal(vector, np.array(plain["embedding"], dtype=np.float32))


def test_vectors_are_cut_and_normalised_again(client: openai.OpenAI) -> None:
    [whole] = client.embeddings.create(model="smol", input=TEXTS[0]).data
    [short] = client.embeddings.create(model="smol", input=TEXTS[0], dimensions=64).data
    head = np.array(whole.embedding[:64])
    np.testing.assert_allclose(short.embedding, head / np.linalg.norm(head), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="64, 256"):
        client.embeddings.create(model="smol", input=TEXTS[0], dimensions=65)


def test_a_vector_may_stay_as_long_as_it_is(served: Deployment) -> None:
    raw, same = (
        embed(served, input=TEXTS[0], **off)["data"] for off in ({"normalize": False}, {"use_activation": False})
    )
    assert raw == same
    [unit] = embed(served, input=TEXTS[0])["data"]
    assert np.linalg.norm(unit["embedding"]) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(raw[0]["embedding"]) > 2
    cosine = np.dot(raw[0]["embedding"], unit["embedding"]) / np.linalg.norm(raw[0]["embedding"])
    assert cosine == pytest.approx(1, abs=1e-6)


def test_long_inputs_are_cut_when_the_request_says_so(served: Deployment) -> None:
    ids = list(range(1000, 1100))
    first, last = (embed(served, input=part)["data"] for part in (ids[:10], ids[-10:]))
    assert embed(served, input=ids, truncate_prompt_tokens=10)["data"] == first
    assert embed(served, input=ids, truncate_prompt_tokens=10, truncation_side="left")["data"] == last
    text = "word " * 5000
    answer = embed(served, input=text, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == 1024
    assert error(post(served, "/v1/embeddings", input=text))["code"] == "context_length_exceeded"


def test_a_prefix_that_is_cached_gives_the_same_vector(served: Deployment, prompts: list[list[int]]) -> None:
    prompt = [int(id) + 1 for id in prompts[6]]
    first, second = embed(served, input=prompt), embed(served, input=prompt)
    np.testing.assert_allclose(first["data"][0]["embedding"], second["data"][0]["embedding"], atol=1e-6)
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached == [0, (len(prompt) - 1) // 16 * 16]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents")])
def test_scores_are_cosines(served: Deployment, path: str, names: tuple[str, str]) -> None:
    one, *others = (np.array(item["embedding"]) for item in embed(served, input=TEXTS)["data"])
    answer = post(served, path, **{names[0]: TEXTS[0], names[1]: TEXTS[1:]}).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert [item["score"] for item in answer["data"]] == pytest.approx(
        [float(one @ other) for other in others], abs=1e-5
    )
    pairs = post(served, path, **{names[0]: TEXTS[:2], names[1]: TEXTS[:2]}).json()
    assert [item["score"] for item in pairs["data"]] == pytest.approx([1, 1], abs=1e-5)
    assert pairs["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_ranked_by_their_score(served: Deployment, path: str) -> None:
    documents = [TEXTS[1], TEXTS[2], {"text": TEXTS[0]}]
    answer = post(served, path, query=TEXTS[0], documents=documents).json()
    scores = {item["index"]: item["relevance_score"] for item in answer["results"]}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert next(iter(scores)) == 2
    assert answer["results"][0]["document"] == {"text": TEXTS[0]}
    [best] = post(served, path, query=TEXTS[0], documents=documents, top_n=1, return_documents=False).json()["results"]
    assert best == {"index": 2, "relevance_score": pytest.approx(scores[2], abs=1e-6)}


def test_the_ledger_says_who_made_it_and_that_nothing_was_handed_over(served: Deployment) -> None:
    handed_over = served.total("baton_handoff_seconds_count")
    fields = {"input": ["one two three", "four"], "model": "smol"}
    answer = served.client.post("/v1/embeddings", json=fields, headers={"x-baton-ledger": "1"}).json()
    for ledger in answer["baton_ledger"]:
        assert ledger["prefill_worker"] == "prefill-0"
        assert {"decode_worker", "transport", "moved_blocks"} & set(ledger) == set()
        assert ledger["computed_tokens"] > 0
        assert {"received", "submitted", "started", "scheduled", "sampled", "finished"} == set(ledger["stages"])
    assert served.total("baton_handoff_seconds_count") == handed_over


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({}, "", "input"),
        ({"input": []}, "input", "from 1 to 2048"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["x", ""]}, "input", "input 1"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": [-1]}, "input", "vocabulary"),
        ({"input": [[10**6]]}, "input", "vocabulary"),
        ({"input": [1, "x"]}, "input", "mixes"),
        ({"input": [1, [2]]}, "input", "mixes"),
        ({"input": {"text": "x"}}, "input", "input"),
        ({"input": [1.5]}, "input[0]", "input"),
        ({"input": ["x"] * 2049}, "input", "2048"),
        ({"input": [1] * 1025}, "input", "maximum context length"),
        ({"input": "word " * 100_000}, "input", "maximum context length"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": "x", "embed_dtype": "float16"}, "embed_dtype", "float16"),
        ({"input": "x", "dimensions": 0}, "dimensions", "64, 256"),
        ({"input": "x", "dimensions": -5}, "dimensions", "64, 256"),
        ({"input": "x", "dimensions": 10**30}, "dimensions", "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "from 1 to 1024"),
        ({"input": "x", "truncate_prompt_tokens": 1025}, "truncate_prompt_tokens", "from 1 to 1024"),
        ({"input": "x", "truncation_side": "middle"}, "truncation_side", "middle"),
        ({"input": "x", "priority": 2**40}, "priority", "priority"),
        ({"input": "x", "model": "other"}, "model", "other"),
    ],
)
def test_a_wrong_request_is_told_which_field_is_wrong(
    served: Deployment, fields: dict[str, Any], param: str, word: str
) -> None:
    told = error(post(served, "/v1/embeddings", **fields), 404 if param == "model" else 400)
    assert (told["param"] or "") == param
    assert word in told["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {}, "text_1"),
        ("/v1/score", {"text_1": "x"}, "text_2"),
        ("/v1/score", {"text_1": "x", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": ["x", "y"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "x", "text_2": "y", "data_1": "z"}, "text_1"),
        ("/v1/score", {"text_1": "x", "text_2": ["y", ""]}, "text_2"),
        ("/v1/rerank", {"query": "x", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "", "documents": ["y"]}, "query"),
        ("/v1/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "x", "documents": [3]}, "documents[0]"),
        ("/v1/rerank", {"query": "x", "documents": ["y"] * 2048}, "documents"),
    ],
)
def test_wrong_pairs_and_documents_are_told_apart(
    served: Deployment, path: str, fields: dict[str, Any], param: str
) -> None:
    assert error(post(served, path, **fields))["param"] == param


def test_two_thousand_inputs_come_back_in_their_order(served: Deployment) -> None:
    inputs = [[100 + index % 50] for index in range(2048)]
    data = embed(served, input=inputs, encoding_format="base64")["data"]
    assert [item["index"] for item in data] == list(range(2048))
    assert [item["embedding"] for item in data[:50]] == [item["embedding"] for item in data[50:100]]
    assert len({item["embedding"] for item in data}) == 50
    served.wait_idle()


def test_a_request_does_not_fail_because_its_own_inputs_fill_the_queue(served: Deployment) -> None:
    """No more than 20 may wait at a time."""
    rejected = served.total("baton_requests_total", 'outcome="rejected"')
    inputs = [[1000 + index] * 100 for index in range(100)]
    data = embed(served, input=inputs)["data"]
    assert served.total("baton_requests_total", 'outcome="rejected"') > rejected
    [alone] = embed(served, input=inputs[77])["data"]
    np.testing.assert_allclose(data[77]["embedding"], alone["embedding"], atol=1e-6)


def test_a_client_that_leaves_frees_everything(served: Deployment, prompts: list[list[int]]) -> None:
    aborted = served.total("baton_requests_total", 'outcome="aborted"')
    fields = {"model": "smol", "input": [[id + 1 for id in prompts[7]]] * 64, "truncate_prompt_tokens": 600}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/embeddings", json=fields, timeout=0.7)
    served.wait_idle()
    assert served.total("baton_requests_total", 'outcome="aborted"') > aborted


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_goes_away_changes_no_vector(
    prompts: list[list[int]], expect: Expect, signal_number: signal.Signals
) -> None:
    """The only prefill worker goes in the middle of a request; its launcher starts another one."""
    flags = ("--pooling-type", "MEAN", "--max-num-batched-tokens", "64", *SIZES)
    inputs = prompts * 4
    with Deployment("--prefill", "1", "--decode", "1", *flags) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(embed, served, input=inputs)
        deadline = time.monotonic() + DEADLINE_S
        while served.total("baton_embeddings_total") < 3:
            assert time.monotonic() < deadline
        os.kill(served.pids()["prefill-0"], signal_number)
        data = asked.result()["data"]
        retries = served.total("baton_retries_total")
        served.wait_idle()
    assert retries > 0
    for prompt, item in zip(inputs, data, strict=True):
        assert float(np.abs(np.array(item["embedding"]) - expect(prompt, "MEAN")).max()) < CLOSE


def test_a_checkpoint_without_a_head_makes_embeddings_alone(tmp_path: Path, prompts: list[list[int]]) -> None:
    """As E5-Mistral is saved, with sentence-transformers' files beside it."""
    transformers = pytest.importorskip("transformers")
    demo = resolve("demo")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 49152}
    config = transformers.MistralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2
    )
    model = transformers.MistralModel(config).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo / name).read_bytes())
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    modules = [f'{{"type": "sentence_transformers.models.{kind}", "path": "{path}"}}' for kind, path in kinds]
    (tmp_path / "modules.json").write_text(f"[{', '.join(modules)}]")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    prompt = prompts[5]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).last_hidden_state[0].mean(0).numpy()
    with Deployment("--unified", "1", "--num-blocks", "64", model=str(tmp_path)) as served:
        [item] = served.client.post("/v1/embeddings", json={"input": prompt}).json()["data"]
        np.testing.assert_allclose(item["embedding"], expected, atol=CLOSE)
        for path, fields in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            assert "embeddings alone" in error(served.client.post(path, json=fields))["message"]


def test_a_checkpoint_that_wants_another_pooling_is_refused_at_the_start(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    for file in resolve("demo").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    refused = serve("serve", str(tmp_path), "--unified", "1", "--host", "127.0.0.1", "--port", "0")
    assert refused.wait() == 2
    assert "pooling_mode_cls_token" in refused.lines[-1]
