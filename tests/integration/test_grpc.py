"""The gRPC services of a real deployment, called by clients that protoc has made from the .proto files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.deployment import DEADLINE_S, Deployment
from support.rpc import Generated, generate

pytestmark = pytest.mark.slow

MAX_WAITING = 64
WORKERS = ("prefill-0", "decode-0", "decode-1")
PROMPT = list(range(100, 180))
KEY = "a-key"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    return generate(tmp_path_factory.mktemp("stubs"))


class Cluster(Deployment):
    """A deployment with both services and a channel to each."""

    def __init__(self, made: Generated, *flags: str, model: str, credentials: grpc.ChannelCredentials | None = None):
        super().__init__("--grpc-port", "0", "--admin-port", "0", *flags, model=model)
        self.made = made
        self._credentials = credentials

    def __enter__(self) -> "Cluster":
        super().__enter__()
        self.inference_channel, self.inference_address = self._connect("gRPC Inference at")
        self.admin_channel, self.admin_address = self._connect("gRPC Admin at")
        self.inference = self.made.inference_stub(self.inference_channel)
        self.admin = self.made.admin_stub(self.admin_channel)
        return self

    def __exit__(self, *exc: object) -> None:
        self.inference_channel.close()
        self.admin_channel.close()
        super().__exit__(*exc)

    def _connect(self, line: str) -> tuple[grpc.Channel, str]:
        address = self.wait_for(line).split()[-1].replace("0.0.0.0", "127.0.0.1")
        if self._credentials is None:
            return grpc.insecure_channel(address), address
        return grpc.secure_channel(address, self._credentials), address

    def generate(self, prompt: list[int] | str = PROMPT, *, timeout: float = DEADLINE_S, **fields: Any) -> Any:
        """The stream of responses; fields of SamplingParams beside those of GenerateRequest."""
        m = self.made.inference
        sampling = m.SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | fields.pop("sampling", {}))
        what = {"text": prompt} if isinstance(prompt, str) else {"token_ids": m.TokenIds(ids=prompt)}
        return self.inference.Generate(m.GenerateRequest(sampling=sampling, **what, **fields), timeout=timeout)

    def tokens(self, prompt: list[int] | str = PROMPT, **fields: Any) -> list[int]:
        """All output tokens of one stream."""
        return [id for piece in self.generate(prompt, **fields) for id in piece.token_ids]

    def drain(self, name: str, **fields: bool) -> Any:
        return self.admin.Drain(self.made.admin.DrainRequest(name=name, **fields), timeout=DEADLINE_S)

    def resume(self, name: str) -> Any:
        return self.admin.Resume(self.made.admin.ResumeRequest(name=name))

    def workers(self) -> dict[str, Any]:
        answer = self.admin.ListWorkers(self.made.admin.ListWorkersRequest(), wait_for_ready=True, timeout=DEADLINE_S)
        return {worker.name: worker for worker in answer.workers}

    def requests(self) -> list[Any]:
        return list(self.admin.ListRequests(self.made.admin.ListRequestsRequest()).requests)


@pytest.fixture(scope="module")
def cluster(made: Generated, tiny_model: Path) -> Iterator[Cluster]:
    flags = ("--load-format", "dummy", "--num-blocks", "2000", "--decode", "2", "--max-waiting", str(MAX_WAITING))
    flags += ("--served-model-name", "tiny", "alias")
    with Cluster(made, *flags, model=str(tiny_model)) as cluster:
        yield cluster


@pytest.fixture
def drained(cluster: Cluster) -> Iterator[Callable[..., None]]:
    """Drain workers for the length of a test."""
    names: list[str] = []

    def drain(*workers: str) -> None:
        for name in workers:
            names.append(name)
            cluster.drain(name)

    yield drain
    for name in names:
        cluster.resume(name)


def status_of(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_deltas_add_up_to_what_http_answers(cluster: Cluster) -> None:
    pieces = list(cluster.generate(sampling={"max_tokens": 24}))
    over_http = cluster.complete(PROMPT, model="tiny", max_tokens=24, temperature=0, ignore_eos=True)
    assert "".join(piece.text for piece in pieces) == over_http["choices"][0]["text"]
    assert sum(len(piece.token_ids) for piece in pieces) == 24
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [
        cluster.made.inference.FINISH_REASON_LENGTH
    ]
    assert pieces[-1].usage.prompt_tokens == len(PROMPT)
    assert pieces[-1].usage.completion_tokens == 24


def test_prompt_logprobs_and_beams_are_those_of_http(cluster: Cluster) -> None:
    first, *_ = cluster.generate(sampling={"max_tokens": 2, "prompt_logprobs": 1})
    over_http = cluster.complete(PROMPT, model="tiny", max_tokens=2, temperature=0, prompt_logprobs=1)
    found = over_http["choices"][0]["prompt_logprobs"]
    assert len(first.prompt_logprobs) == len(found) - 1 == len(PROMPT) - 1
    for entry, told, id in zip(first.prompt_logprobs, found[1:], PROMPT[1:], strict=True):
        assert (entry.logprob, entry.rank) == (told[str(id)]["logprob"], told[str(id)]["rank"])
    beams = {"n": 3, "use_beam_search": True, "max_tokens": 5}
    pieces = list(cluster.generate(sampling=beams))
    choices = cluster.complete(PROMPT, model="tiny", ignore_eos=True, return_token_ids=True, **beams)["choices"]
    assert [list(piece.token_ids) for piece in pieces[:-1]] == [choice["token_ids"] for choice in choices]
    assert pieces[-1].usage.completion_tokens == 15


def test_text_in_and_every_sampling_parameter(cluster: Cluster) -> None:
    sampling = {
        "max_tokens": 6,
        "min_tokens": 2,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "n": 2,
        "stop": ["never to be seen"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logit_bias": {5: -100.0},
        "logprobs": 2,
        "return_token_ids": True,
    }
    pieces = list(cluster.generate("Once upon a time", sampling=sampling, priority=-1, ledger=True, model="alias"))
    assert {piece.index for piece in pieces[:-1]} == {0, 1}
    assert all(len(piece.logprobs) == len(piece.token_ids) for piece in pieces)
    assert all(len(entry.top) == 2 for piece in pieces for entry in piece.logprobs)
    prompts = [list(piece.prompt_token_ids) for piece in pieces if piece.prompt_token_ids]
    tokenized = cluster.inference.Tokenize(cluster.made.inference.TokenizeRequest(text="Once upon a time"))
    assert prompts == [list(tokenized.token_ids)] * 2
    assert len(pieces[-1].ledgers) == 2
    assert "prefill-0" in pieces[-1].ledgers[0]


def test_output_is_held_to_its_form(cluster: Cluster) -> None:
    sampling = {"max_tokens": 40, "ignore_eos": False, "structured_outputs": {"choice": ["red", "green", "blue"]}}
    assert "".join(piece.text for piece in cluster.generate("My hat is", sampling=sampling)) in ("red", "green", "blue")
    error = status_of(lambda: list(cluster.generate(sampling={"structured_outputs": {"json": "{"}})))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "structured_outputs" in error.details()


def test_a_stop_token_is_named(cluster: Cluster) -> None:
    first = cluster.tokens(sampling={"max_tokens": 1})
    pieces = list(cluster.generate(sampling={"max_tokens": 9, "stop_token_ids": first}))
    ended = next(piece for piece in pieces if piece.finish_reason)
    assert ended.finish_reason == cluster.made.inference.FINISH_REASON_STOP
    assert ended.stop_token_id == first[0]


def test_vectors_are_those_of_http(cluster: Cluster) -> None:
    m = cluster.made.inference
    inputs = [m.EmbedInput(text="hello world"), m.EmbedInput(token_ids=m.TokenIds(ids=PROMPT))]
    answer = cluster.inference.Embed(m.EmbedRequest(model="alias", inputs=inputs, ledger=True), timeout=DEADLINE_S)
    fields = {"model": "tiny", "input": ["hello world", PROMPT]}
    over_http = cluster.client.post("/v1/embeddings", json=fields).json()
    for ours, theirs in zip(answer.embeddings, over_http["data"], strict=True):
        assert list(ours.values) == pytest.approx(theirs["embedding"], abs=1e-6)
    assert answer.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == 0
    assert [json.loads(ledger)["prefill_worker"] for ledger in answer.ledgers] == ["prefill-0"] * 2
    cut = m.EmbedRequest(inputs=inputs[1:], truncate_prompt_tokens=7, truncation_side="left", normalize=False)
    assert cluster.inference.Embed(cut, timeout=DEADLINE_S).usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({}, "INVALID_ARGUMENT", "from 1 to 2048"),
        ({"texts": [""]}, "INVALID_ARGUMENT", "input 0 is empty"),
        ({"texts": ["x"], "dimensions": 3}, "INVALID_ARGUMENT", "dimensions"),
        ({"texts": ["x"], "truncation_side": "middle"}, "INVALID_ARGUMENT", "truncation_side"),
        ({"texts": ["x"], "model": "other"}, "NOT_FOUND", "other"),
    ],
)
def test_a_wrong_embed_request_is_told_what_is_wrong(
    cluster: Cluster, fields: dict[str, Any], code: str, words: str
) -> None:
    m = cluster.made.inference
    inputs = [m.EmbedInput(text=text) for text in fields.pop("texts", [])]
    error = status_of(lambda: cluster.inference.Embed(m.EmbedRequest(inputs=inputs, **fields), timeout=DEADLINE_S))
    assert error.code().name == code
    assert words in error.details()


def test_a_deadline_ends_an_embed_call_at_the_workers_too(cluster: Cluster) -> None:
    m = cluster.made.inference
    inputs = [m.EmbedInput(token_ids=m.TokenIds(ids=[index % 50 + 3] * 1000)) for index in range(500)]
    error = status_of(lambda: cluster.inference.Embed(m.EmbedRequest(inputs=inputs), timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_idle()


def test_tokens_text_and_models(cluster: Cluster) -> None:
    m = cluster.made.inference
    tokens = cluster.inference.Tokenize(m.TokenizeRequest(text="hello world", return_token_strs=True))
    assert len(tokens.token_ids) == len(tokens.token_strs) > 0
    assert cluster.inference.Detokenize(m.DetokenizeRequest(token_ids=tokens.token_ids)).text == "hello world"
    models = cluster.inference.ListModels(m.ListModelsRequest()).models
    assert [(model.id, model.root) for model in models] == [("tiny", "tiny"), ("alias", "tiny")]
    assert models[0].max_model_len == tokens.max_model_len > 0


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"sampling": {"temperature": -1.0}}, "INVALID_ARGUMENT", "temperature"),
        ({"sampling": {"n": 1000}}, "INVALID_ARGUMENT", "n must be"),
        ({"prompt": []}, "INVALID_ARGUMENT", "prompt is empty"),
        ({"prompt": [10**9]}, "INVALID_ARGUMENT", "vocabulary"),
        ({"prompt": [5] * 5000}, "INVALID_ARGUMENT", "maximum context length"),
        ({"model": "nobody"}, "NOT_FOUND", "nobody"),
        ({"model": "\N{FAMILY}" * 100_000}, "NOT_FOUND", "\N{FAMILY}"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(cluster: Cluster, fields: dict[str, Any], code: str, words: str) -> None:
    error = status_of(lambda: list(cluster.generate(**fields)))
    assert error.code().name == code
    assert words in error.details()


def test_bytes_that_are_no_message_are_refused(cluster: Cluster) -> None:
    for make, rpc in (
        (cluster.inference_channel.unary_unary, "Inference/Tokenize"),
        (cluster.admin_channel.unary_unary, "Admin/Drain"),
    ):
        error = status_of(lambda make=make, rpc=rpc: make(f"/baton.v1.{rpc}")(b"\xff\xff", timeout=DEADLINE_S))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert f"no baton.v1.{rpc.partition('/')[2]}Request" in error.details()


def test_a_message_beyond_the_limit_is_refused(cluster: Cluster) -> None:
    error = status_of(lambda: list(cluster.generate("x" * 17 * 2**20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_queue_says_when_to_come_back(cluster: Cluster, drained: Callable[..., None]) -> None:
    drained(*WORKERS)
    error = status_of(lambda: list(cluster.generate(sampling={"n": MAX_WAITING + 1, "max_tokens": 1})))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


def test_a_deadline_ends_the_request_at_the_workers_too(cluster: Cluster) -> None:
    error = status_of(lambda: list(cluster.generate(sampling={"max_tokens": 3000}, timeout=0.5)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_idle()


def test_a_deadline_holds_in_the_queue(cluster: Cluster, drained: Callable[..., None]) -> None:
    drained(*WORKERS)
    error = status_of(lambda: list(cluster.generate(timeout=0.3)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_idle()


def test_cancelling_a_call_frees_its_blocks(cluster: Cluster) -> None:
    call = cluster.generate(sampling={"max_tokens": 3000})
    next(call)
    (request,) = cluster.requests()
    assert request.prompt_tokens == len(PROMPT)
    call.cancel()
    cluster.wait_idle()
    assert cluster.requests() == []


def test_an_operator_cancels_a_request(cluster: Cluster) -> None:
    call = cluster.generate(sampling={"max_tokens": 3000})
    next(call)
    (request,) = cluster.requests()
    cluster.admin.Cancel(cluster.made.admin.CancelRequest(id=request.id))
    error = status_of(lambda: list(call))
    assert error.code() is grpc.StatusCode.CANCELLED
    assert "operator" in error.details()
    cluster.wait_idle()
    again = status_of(lambda: cluster.admin.Cancel(cluster.made.admin.CancelRequest(id=request.id)))
    assert again.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("move", [False, True])
def test_draining_under_load_loses_nothing(cluster: Cluster, move: bool) -> None:
    prompts = [[id, *PROMPT] for id in range(200, 212)]
    sampling = {"max_tokens": 160, "temperature": 0.9, "seed": 11}
    with ThreadPoolExecutor(len(prompts)) as pool:
        undisturbed = list(pool.map(lambda prompt: cluster.tokens(prompt, sampling=sampling), prompts))
        begun = threading.Semaphore(0)

        def stream(prompt: list[int]) -> list[int]:
            call = cluster.generate(prompt, sampling=sampling)
            first = list(next(call).token_ids)
            begun.release()
            return first + [id for piece in call for id in piece.token_ids]

        running = [pool.submit(stream, prompt) for prompt in prompts]
        for _ in prompts[: len(prompts) // 2]:
            assert begun.acquire(timeout=DEADLINE_S)
        drained = cluster.drain("decode-0", move_streams=move, wait=True)
        assert drained.state == cluster.made.admin.WORKER_STATE_DRAINED
        assert [future.result() for future in running] == undisturbed
    # By now it has also reported the step that was under way when its streams left.
    before = cluster.workers()["decode-0"].generated_tokens
    assert cluster.tokens(sampling=sampling)
    assert cluster.workers()["decode-0"].generated_tokens == before
    cluster.resume("decode-0")


def test_a_drained_worker_takes_another_role(cluster: Cluster, drained: Callable[..., None]) -> None:
    m = cluster.made.admin
    drained("decode-1")
    cluster.drain("decode-1", wait=True)
    assert cluster.admin.SetRole(m.SetRoleRequest(name="decode-1", role=m.ROLE_PREFILL)).role == m.ROLE_PREFILL
    cluster.resume("decode-1")
    cluster.drain("prefill-0", wait=True)
    ledger = list(cluster.generate(sampling={"max_tokens": 4}, ledger=True))[-1].ledgers[0]
    assert '"prefill_worker":"decode-1"' in ledger
    assert '"decode_worker":"decode-0"' in ledger
    cluster.resume("prefill-0")
    cluster.drain("decode-1", wait=True)
    assert cluster.admin.SetRole(m.SetRoleRequest(name="decode-1", role=m.ROLE_DECODE)).role == m.ROLE_DECODE


@pytest.mark.parametrize(("gone", "left"), [(("prefill-0",), "decode-"), (("decode-0", "decode-1"), "prefill-0")])
def test_a_role_that_nobody_is_left_for_is_stood_in_for(
    cluster: Cluster, drained: Callable[..., None], gone: tuple[str, ...], left: str
) -> None:
    before = cluster.tokens()
    drained(*gone)
    *_, last = pieces = list(cluster.generate(ledger=True))
    assert [id for piece in pieces for id in piece.token_ids] == before
    ledger = json.loads(last.ledgers[0])
    assert ledger["prefill_worker"] == ledger["decode_worker"]
    assert ledger["decode_worker"].startswith(left)
    cluster.wait_for("does both until then")


def test_a_worker_with_streams_keeps_its_role(cluster: Cluster) -> None:
    m = cluster.made.admin
    call = cluster.generate(sampling={"max_tokens": 3000})
    for _ in range(3):
        next(call)
    busy = next(worker for worker in cluster.workers().values() if worker.role == m.ROLE_DECODE and worker.streams)
    error = status_of(lambda: cluster.admin.SetRole(m.SetRoleRequest(name=busy.name, role=m.ROLE_PREFILL)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "drain it" in error.details()
    call.cancel()
    cluster.wait_idle()


def test_flushed_caches_are_empty(cluster: Cluster) -> None:
    def cached() -> int:
        return list(cluster.generate(list(range(300, 380)), sampling={"max_tokens": 1}))[-1].usage.cached_tokens

    cached()
    assert cached() > 0
    flushed = cluster.admin.FlushPrefixCaches(cluster.made.admin.FlushPrefixCachesRequest())
    assert sorted(flushed.workers) == sorted(cluster.workers())
    assert cached() == 0


def test_events_tell_what_happens(cluster: Cluster, drained: Callable[..., None]) -> None:
    m = cluster.made.admin
    events = cluster.admin.WatchEvents(m.WatchEventsRequest(), timeout=DEADLINE_S)
    events.initial_metadata()
    drained(*WORKERS)
    *changed, not_ready = (next(events) for _ in range(4))
    assert [each.kind for each in changed] == [m.EVENT_KIND_WORKER_CHANGED] * 3
    assert [each.subject for each in changed] == [*WORKERS]
    assert not_ready.kind == m.EVENT_KIND_NOT_READY
    assert "prefill-0 is draining" in not_ready.text
    events.cancel()


def test_log_levels(cluster: Cluster) -> None:
    m = cluster.made.admin
    everybody = cluster.admin.SetLogLevel(m.SetLogLevelRequest(level="warning")).processes
    assert sorted(everybody) == ["decode-0", "decode-1", "frontend-0", "prefill-0", "scheduler"]
    assert list(cluster.admin.SetLogLevel(m.SetLogLevelRequest(level="INFO", process="decode-0")).processes) == [
        "decode-0"
    ]
    cluster.wait_for("[decode-0] now decode, active")
    error = status_of(lambda: cluster.admin.SetLogLevel(m.SetLogLevelRequest(level="loud")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    cluster.admin.SetLogLevel(m.SetLogLevelRequest(level="info"))


def wait_healthy(channel: grpc.Channel, service: str, wanted: int = health_pb2.HealthCheckResponse.SERVING) -> None:
    """Or until another health."""
    request = health_pb2.HealthCheckRequest(service=service)
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=DEADLINE_S)
    assert any(answer.status == wanted for answer in watch)
    watch.cancel()


def test_health_and_reflection(cluster: Cluster) -> None:
    for channel, service in ((cluster.inference_channel, "Inference"), (cluster.admin_channel, "Admin")):
        wait_healthy(channel, f"baton.v1.{service}")
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"baton.v1.{service}")]
        (answer,) = reflection.ServerReflectionInfo(iter(asked), timeout=DEADLINE_S)
        assert len(answer.file_descriptor_response.file_descriptor_proto) == 1


@pytest.mark.parametrize("by", ["stream", "request", "answer"])
def test_an_operator_cancels_a_request_of_http(cluster: Cluster, by: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True, "n": 1 if by == "stream" else 2}
        headers = {"x-request-id": "mine-7"}
        answer = pool.submit(cluster.client.post, "/v1/completions", json=body, headers=headers)
        events = cluster.admin.WatchEvents(cluster.made.admin.WatchEventsRequest(), timeout=DEADLINE_S)
        events.initial_metadata()
        while len(requests := cluster.requests()) < body["n"]:
            assert not answer.done()
        assert {request.request_id for request in requests} == {"mine-7"}
        id = {"stream": requests[0].id, "request": "mine-7", "answer": "cmpl-mine-7"}[by]
        cluster.admin.Cancel(cluster.made.admin.CancelRequest(id=id))
        assert next(events).kind == cluster.made.admin.EVENT_KIND_REQUEST_CANCELLED
        events.cancel()
    assert answer.result().status_code == 503
    assert answer.result().json()["error"]["code"] == "cancelled"
    assert answer.result().headers["x-should-retry"] == "false"


def ctl(cluster: Cluster, *words: str, code: int = 0) -> str:
    """What `baton ctl` prints."""
    command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "ctl", words[0]]
    command += ["--address", cluster.admin_address, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


def test_every_rpc_has_a_subcommand(cluster: Cluster) -> None:
    assert [json.loads(line)["name"] for line in ctl(cluster, "workers", "--json").splitlines()] == list(
        cluster.workers()
    )
    call = cluster.generate(sampling={"max_tokens": 3000})
    next(call), next(call)  # the second comes from the decode worker
    _titles, request = ctl(cluster, "requests", "--limit", "1").splitlines()
    ctl(cluster, "cancel", request.split()[0])
    assert ctl(cluster, "requests", "--json") == ""
    assert status_of(lambda: list(call)).code() is grpc.StatusCode.CANCELLED
    deadline = time.monotonic() + DEADLINE_S
    while not (links := ctl(cluster, "links", "--json")):  # workers report them once a second
        assert time.monotonic() < deadline
    (link,) = [json.loads(line) for line in links.splitlines()][:1]
    assert (link["owner"], link["transport"], link["reason"]) == ("prefill-0", "shm", "")
    assert ctl(cluster, "links", "--worker", "prefill-0").split() == ["reader", "owner", "transport", "reason"]
    assert "drained" in ctl(cluster, "drain", "decode-1", "--move", "--wait")
    assert "unified" in ctl(cluster, "role", "decode-1", "unified")
    assert "decode" in ctl(cluster, "role", "decode-1", "decode")
    assert "active" in ctl(cluster, "resume", "decode-1")
    assert "prefill-0" in ctl(cluster, "flush")
    assert ctl(cluster, "log-level", "info", "scheduler") == "info: scheduler\n"
    assert "drain it first" in ctl(cluster, "remove", "decode-1", code=2)
    assert "nobody" in ctl(cluster, "drain", "nobody", code=2)
    assert "did not answer in time" in ctl(cluster, "events", "--timeout", "0.2", code=2)


def test_ctl_says_where_it_found_nothing() -> None:
    command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "ctl", "workers", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert "no Admin service at 127.0.0.1:1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def locked(made: Generated, tiny_model: Path, certificate: tuple[Path, Path]) -> Iterator[Cluster]:
    """Two workers and two frontends behind TLS and a key."""
    cert, key = certificate
    flags = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "2", "--frontends", "2", "--api-key", KEY)
    flags += ("--grpc-host", "0.0.0.0", "--grpc-tls-cert", str(cert), "--grpc-tls-key", str(key))
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    with Cluster(made, *flags, model=str(tiny_model), credentials=credentials) as cluster:
        yield cluster


def test_tls_keys_removal_and_a_stream_that_outlives_sigterm(locked: Cluster, certificate: tuple[Path, Path]) -> None:
    m = locked.made.inference
    assert status_of(lambda: list(locked.generate())).code() is grpc.StatusCode.UNAUTHENTICATED
    wrong = [("authorization", "Bearer no-key")]
    error = status_of(lambda: locked.inference.ListModels(m.ListModelsRequest(), metadata=wrong))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "API key" in error.details()
    wait_healthy(locked.inference_channel, "")

    secure = ("--api-key", KEY, "--tls-ca", str(certificate[0]))
    assert "unified-1" in ctl(locked, "workers", *secure)
    ctl(locked, "drain", "unified-1", "--wait", *secure)
    assert ctl(locked, "remove", "unified-1", *secure) == "unified-1 has left\n"
    locked.wait_for("unified-1 was removed by an operator")
    assert "unified-1" not in ctl(locked, "workers", *secure)

    request = m.GenerateRequest(text="Once", sampling=m.SamplingParams(max_tokens=1500, ignore_eos=True))
    key = [("authorization", f"Bearer {KEY}")]
    call = locked.inference.Generate(request, metadata=key, timeout=DEADLINE_S)
    next(call)
    locked.process.terminate()
    wait_healthy(locked.inference_channel, "", health_pb2.HealthCheckResponse.NOT_SERVING)
    error = status_of(lambda: list(locked.inference.Generate(request, metadata=key, timeout=DEADLINE_S)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert list(call)[-1].usage.completion_tokens == 1500
    assert locked.wait() == 0


def test_sigterm_lets_a_call_finish_that_has_no_stream_just_then(made: Generated, tiny_model: Path) -> None:
    """A beam search is one stream after the other."""
    flags = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1", "--shutdown-timeout", "60")
    with Cluster(made, *flags, model=str(tiny_model)) as cluster:
        beams = {"n": 2, "use_beam_search": True, "max_tokens": 1500}
        call = cluster.generate(prompt=[1, 2, 3], sampling=beams)
        while not cluster.requests():
            assert call.is_active()
        cluster.process.terminate()
        assert list(call)[-1].usage.completion_tokens == 3000
        assert cluster.wait() == 0


def test_a_drained_worker_stays_so_when_the_scheduler_is_restarted(
    cluster: Cluster, drained: Callable[..., None]
) -> None:
    drained("decode-0")
    os.kill(cluster.pids()["scheduler"], signal.SIGKILL)
    cluster.wait_for("scheduler is ready again")
    with contextlib.suppress(grpc.RpcError):
        cluster.workers()
    cluster.wait_for("[scheduler] decode-0 joined", 2)
    assert cluster.workers()["decode-0"].state == cluster.made.admin.WORKER_STATE_DRAINED
