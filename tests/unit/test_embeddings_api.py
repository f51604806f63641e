"""Requests for vectors, scores and rankings, read and answered without a cluster."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from baton.frontend.api.embedding_requests import EmbeddingRequest, RerankRequest, ScoreRequest
from baton.frontend.api.embeddings import (
    PoolingWishes,
    check_answer_size,
    pair_scores,
    read_inputs,
    read_pairs,
    read_wishes,
    take_vector,
)
from baton.frontend.api.errors import ApiError
from baton.frontend.api.inputs import prompts_of, read_cut
from baton.frontend.api.requests import read
from baton.frontend.api.vectors import cosine, finish_vector
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.pooling import PoolingInfo, load_pooling_info
from baton.frontend.tokenizer import Tokenizer, load_tokenizer
from baton.proto.config import ModelConfig, PoolerConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Outcome, Pooling
from baton.proto.messages import Ledger
from baton.worker.weights.resolve import resolve

INFO = ModelInfo(("m",), 64, 49152, (2,), SamplingDefaults())
POOLING = PoolingInfo(Pooling.LAST, True, 8, None)


def pooling(**fields: Any) -> PoolingInfo:
    return msgspec.structs.replace(POOLING, **fields)


def refused(call: Any, *args: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*args)
    assert caught.value.status == 400
    return caught.value


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ModelConfig(str(resolve("demo")), ("m",)))


def with_ends(tokenizer: Tokenizer) -> Tokenizer:
    """Adds <|im_start|> before and <|im_end|> behind a text, as embedding models do."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    ids = {text: backend.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>")}
    template = tokenizers.processors.TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=list(ids.items()))
    backend.post_processor = template
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
        ([], []),
    ],
)
def test_inputs_become_a_list_of_texts_and_lists_of_ids(given: Any, inputs: list[Any]) -> None:
    request, unknown = read({"input": given}, EmbeddingRequest)
    assert (read_inputs(request.input), unknown) == (inputs, [])


def test_names_that_other_endpoints_refuse_are_fields_here() -> None:
    assert read({"query": "q", "documents": ["a"], "truncate_prompt_tokens": 3}, RerankRequest)[1] == []
    assert refused(read, {"input": "a", "suffix": "x"}, EmbeddingRequest).body.error.param == "suffix"


def test_a_text_is_cut_between_its_special_tokens(tokenizer: Tokenizer) -> None:
    text = "one two three four five six seven eight"
    plain = tokenizer.encode(text)
    for side, kept in (("right", plain[:4]), ("left", plain[-4:])):
        assert tokenizer.encode_truncated(text, True, 4, side) == kept
        first, *inner, last = with_ends(tokenizer).encode_truncated(text, True, 6, side)
        assert inner == kept
        assert [first, last] == [tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")]
        assert with_ends(tokenizer).encode_truncated(text, False, 4, side) == kept
    assert tokenizer.encode_truncated("one", True, 99, "right") == tokenizer.encode("one")


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_that_is_cut_is_not_tokenised_as_a_whole(tokenizer: Tokenizer, side: str) -> None:
    """16 MB of text would take seconds."""
    request = EmbeddingRequest(input="", truncate_prompt_tokens=5, truncation_side=side)  # type: ignore[arg-type]
    cut = read_cut(request, INFO)
    words = [f"w{index} " for index in range(200)]
    text = "".join(words) + "x " * 10_000_000 + "".join(words)
    [prompt] = prompts_of([text], cut, tokenizer, INFO, "input")
    [short] = prompts_of(["".join(words)], cut, tokenizer, INFO, "input")
    assert prompt.ids.tolist() == short.ids.tolist()


def test_a_salt_keeps_inputs_apart_in_the_prefix_cache(tokenizer: Tokenizer) -> None:
    def hashes(**fields: Any) -> bytes:
        cut = read_cut(read({"input": "", **fields}, EmbeddingRequest)[0], INFO)
        return prompts_of([[5] * 40], cut, tokenizer, INFO, "input")[0].hashes

    assert hashes() == hashes() != hashes(cache_salt="one") == hashes(cache_salt="one") != hashes(cache_salt="other")
    with pytest.raises(ApiError, match="cache_salt"):
        hashes(cache_salt="")


def test_a_prompt_may_fill_the_context(tokenizer: Tokenizer) -> None:
    cut = read_cut(EmbeddingRequest(input=""), INFO)
    assert len(prompts_of([[5] * 64], cut, tokenizer, INFO, "input")[0].ids) == 64
    error = refused(prompts_of, [[1], [5] * 65], cut, tokenizer, INFO, "input")
    assert (error.body.error.param, error.body.error.code) == ("input", "context_length_exceeded")
    assert "input 1" in str(error)


@pytest.mark.parametrize(
    ("dimensions", "matryoshka", "expected"),
    [(None, None, None), (8, None, None), (3, (), 3), (4, (2, 4), 4), (8, (2, 4), None)],
)
def test_dimensions_that_are_possible(dimensions: int | None, matryoshka: Any, expected: int | None) -> None:
    wishes = read_wishes(EmbeddingRequest(input="", dimensions=dimensions), pooling(matryoshka=matryoshka))
    assert wishes.dimensions == expected


@pytest.mark.parametrize(
    ("dimensions", "matryoshka", "word"),
    [(4, None, "--matryoshka-dimensions"), (3, (2, 4), "2, 4"), (9, (), "from 1 to 8"), (0, (), "from 1 to 8")],
)
def test_dimensions_that_are_not(dimensions: int, matryoshka: Any, word: str) -> None:
    request = EmbeddingRequest(input="", dimensions=dimensions)
    error = refused(read_wishes, request, pooling(matryoshka=matryoshka))
    assert error.body.error.param == "dimensions"
    assert word in str(error)


def test_pairs_are_read_under_each_pair_of_names() -> None:
    for names in (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents")):
        request = ScoreRequest(**dict(zip(names, ("a", ["b", "c"]), strict=True)))  # type: ignore[arg-type]
        assert read_pairs(request) == (["a"], ["b", "c"], names)


def test_scores_go_pair_by_pair_or_from_one_to_all() -> None:
    vectors = [np.array(v, dtype=np.float32) for v in ([1, 0], [0, 2], [3, 0], [1, 1])]
    assert pair_scores(vectors, 2) == pytest.approx([1, 0.5**0.5])
    assert pair_scores(vectors, 1) == pytest.approx([0, 1, 0.5**0.5])
    assert cosine(np.zeros(2, np.float32), vectors[0]) == 0


def test_an_answer_is_bounded_before_it_is_made() -> None:
    check_answer_size(2048 * 4096, in_base64=True)
    check_answer_size(700 * 4096, in_base64=False)
    assert "base64" in str(refused(check_answer_size, 2048 * 4096, False))


def test_a_vector_is_cut_then_normalised() -> None:
    pooled = np.array([3, 4, 12, 0], dtype="<f4").tobytes()
    np.testing.assert_allclose(finish_vector(pooled, None, normalize=True), np.array([3, 4, 12, 0]) / 13, rtol=1e-6)
    np.testing.assert_allclose(finish_vector(pooled, 2, normalize=True), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(finish_vector(pooled, 3, normalize=False), [3, 4, 12])
    assert finish_vector(bytes(8), None, normalize=True).tolist() == [0, 0]


@pytest.mark.parametrize("vector", [b"", np.array([1, np.nan], dtype="<f4").tobytes()])
def test_a_stream_that_ends_without_a_finite_vector_is_the_servers_fault(vector: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        take_vector(Finished((1, 1), Outcome.STOP, Ledger(), 0, vector=vector), PoolingWishes())
    assert caught.value.status == 500


def checkpoint(path: Path, modules: list[str] | None, pooler: dict[str, Any] | None, **config: Any) -> str:
    """A model directory with sentence-transformers' files."""
    (path / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    folders = {"Transformer": "", "Pooling": "1_Pooling"}
    if modules is not None:
        kinds = [{"type": f"sentence_transformers.models.{kind}", "path": folders.get(kind, "2")} for kind in modules]
        (path / "modules.json").write_text(json.dumps(kinds))
    if pooler is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **pooler}))
    return str(path)


LAST_TOKEN = {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
MEAN_TOKENS = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}


@pytest.mark.parametrize(
    ("modules", "pooler", "config", "flags", "expected"),
    [
        (None, None, {}, PoolerConfig(), pooling()),
        (["Transformer", "Pooling", "Normalize"], LAST_TOKEN, {}, PoolerConfig(), pooling()),
        (["Transformer", "Pooling"], MEAN_TOKENS, {}, PoolerConfig(), pooling(pooling=Pooling.MEAN, normalize=False)),
        (["Pooling"], {"pooling_mode": "mean"}, {}, PoolerConfig(normalize=True), pooling(pooling=Pooling.MEAN)),
        (["Pooling", "Normalize"], MEAN_TOKENS, {}, PoolerConfig("LAST", False), pooling(normalize=False)),
        (["Pooling", "Normalize"], {"pooling_mode_cls_token": True}, {}, PoolerConfig("LAST"), pooling()),
        (None, None, {"is_matryoshka": True}, PoolerConfig(), pooling(matryoshka=())),
        (None, None, {"matryoshka_dimensions": [2, 4]}, PoolerConfig(), pooling(matryoshka=(2, 4))),
        (None, None, {}, PoolerConfig(matryoshka_dimensions=(4,)), pooling(matryoshka=(4,))),
    ],
)
def test_the_checkpoint_says_how_and_flags_go_first(
    tmp_path: Path, modules: Any, pooler: Any, config: Any, flags: PoolerConfig, expected: PoolingInfo
) -> None:
    assert load_pooling_info(checkpoint(tmp_path, modules, pooler, **config), flags) == expected


@pytest.mark.parametrize(
    ("modules", "pooler", "word"),
    [
        (["Pooling"], {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        (["Pooling"], {**MEAN_TOKENS, "pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (["Transformer", "Pooling", "Dense"], MEAN_TOKENS, "Dense"),
    ],
)
def test_what_a_checkpoint_wants_and_this_server_can_not_do_is_said(
    tmp_path: Path, modules: Any, pooler: Any, word: str
) -> None:
    with pytest.raises(UserError, match=word):
        load_pooling_info(checkpoint(tmp_path, modules, pooler), PoolerConfig())
