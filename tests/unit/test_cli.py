"""The command line: what is checked before any process starts, and how it is said."""

import argparse
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from baton.frontend import processes
from baton.frontend.cli import bench_serve, engine_args, network_args, rpc_args, serve, sizing
from baton.frontend.cli.main import COMMANDS, OneLineParser, main
from baton.frontend.run_dir import RunDir
from baton.proto import __version__
from baton.proto import config as config_tree
from baton.proto.config import BatchConfig, ModelConfig, NetworkConfig, RpcConfig, ServeConfig, WorkerConfig
from baton.proto.curve import load_key
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role
from baton.worker.backend import fill_batch, open_backend
from baton.worker.cpu_backend import OWN as CPU_OWN

LOCAL_DECODE = "--role decode --scheduler ipc:///s --kv-transfer local --no-enable-prefix-caching"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with a config alone, for --load-format dummy."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return directory


def parse(*words: str) -> argparse.Namespace:
    parser = OneLineParser("baton serve", "")
    serve.add_arguments(parser)
    return parser.parse(list(words))


def plan(model: Path, *words: str) -> sizing.Plan:
    args = parse(str(model), "--load-format", "dummy", *words)
    return sizing.plan(args, sizing.read_model_size(model, args.dtype, args.load_format), num_workers=2)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"baton {__version__}\n"


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"baton {name}" in usage for name in COMMANDS)


GRPC = ("--grpc-port", "0", "--api-key", "k")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*GRPC, "--grpc-host", "0.0.0.0"), "beyond loopback needs --grpc-tls-cert"),
        (("--admin-port", "0", "--admin-host", "::"), "--admin-host ::: gRPC beyond loopback"),
        ((*GRPC, "--grpc-tls-cert", "cert.pem"), "belong together"),
        ((*GRPC, "--grpc-tls-cert", "no-cert.pem", "--grpc-tls-key", "no-key.pem"), "no-cert.pem: no such file"),
        (("--grpc-port", "80000"), "a port is at most 65535"),
    ],
)
def test_grpc_flags_that_can_not_be_are_one_line(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as caught:
        rpc_args.configs(parse("demo", *words), serve.claim_port)
    assert line in str(caught.value)


def test_what_is_no_certificate_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.write_text("nothing")
    words = (*GRPC, "--grpc-tls-cert", str(file), "--grpc-tls-key", str(file))
    with pytest.raises(UserError, match=r"--grpc-tls-cert or --grpc-tls-key can't be used: .*; expected are files in"):
        rpc_args.configs(parse("demo", *words), serve.claim_port)


def test_grpc_is_off_unless_a_port_is_given_and_shares_the_keys() -> None:
    assert rpc_args.configs(parse("demo"), serve.claim_port) == (RpcConfig(), RpcConfig())
    inference, admin = rpc_args.configs(parse("demo", *GRPC, "--frontends", "2"), serve.claim_port)
    assert (inference.host, inference.api_keys, inference.shares_port) == ("127.0.0.1", ("k",), True)
    assert inference.port > 0
    assert admin == RpcConfig()
    words = ("--grpc-port", "0", "--admin-port", "0", "--api-key-file", "/keys")
    for config in rpc_args.configs(parse("demo", *words), serve.claim_port):
        assert (config.api_keys, config.api_key_file) == ((), "/keys")


def test_plaintext_beyond_loopback_is_possible_on_request() -> None:
    words = (*GRPC, "--grpc-host", "0.0.0.0", "--grpc-allow-plaintext")
    assert rpc_args.configs(parse("demo", *words), serve.claim_port)[0].host == "0.0.0.0"


def test_without_the_extra_grpc_the_flags_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.delitem(sys.modules, "baton.proto.rpc", raising=False)
    with pytest.raises(UserError, match=r"baton-serve\[grpc\]"):
        rpc_args.configs(parse("demo", *GRPC), serve.claim_port)


def test_without_the_flags_nothing_imports_grpc() -> None:
    modules = "baton.frontend.main, baton.scheduler_proc.main, baton.worker.main, baton.frontend.cli.serve"
    code = f"import sys, {modules}; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_what_cuda_needs(model: Path) -> None:
    described = ModelConfig(path=str(model), served_names=("tiny",), load_format="dummy")
    with pytest.raises(UserError, match="--device cuda"):
        open_backend(WorkerConfig(name="unified-0", role=Role.UNIFIED, model=described, device="cuda"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fly"], "no command 'baton fly'"),
        (["serve", "--port", "0"], "MODEL is missing"),
        (["serve", "demo", "--wings"], "unrecognized arguments: --wings"),
        (["serve", "demo", "--block-size", "24"], "expected a multiple of 16, got 24"),
        (["serve", "demo", "--port", "70000"], "a port is at most 65535"),
        (["serve", "demo", "--kv-cache-memory-bytes", "lots"], "expected a size such as 512M"),
        (["serve", "demo", "--prefill", "1", "--decode", "0"], "the two roles need each other"),
        (["serve", "demo", "--prefill", "0", "--decode", "0"], "no worker"),
        (["serve", "/does/not/exist", "--port", "0"], "model not found"),
        (["serve", "demo", "--uds", "/does/not/exist/socket"], "is not a directory"),
        (["serve", "demo", "--config", "/does/not/exist.yaml"], "can't read --config"),
        (["serve", "demo", "--api-key", ""], "argument --api-key: expected a value, got ''"),
        (["serve", "demo", "--served-model-name", "a", " "], "argument --served-model-name: expected a value"),
        (["serve", "demo", "--max-num-batched-tokens", "9" * 20], "at most 2147483647 is possible"),
        (["serve", "demo", "--threads", "100000"], f"this machine has {os.cpu_count()} cores"),
        (["serve", "demo", "--decode", "-1"], "expected a whole number from 0, got '-1'"),
        (["serve", "demo", "--max-waiting", "0"], "expected a whole number above 0, got '0'"),
        (["serve", "demo", "--shutdown-timeout", "soon"], "expected seconds from 0, for example 2.5, got 'soon'"),
        (["serve", "demo", "--kv-transfer", "pigeon"], "argument --kv-transfer: invalid choice: 'pigeon'"),
        (["serve", "demo", "--kv-transfer", "local"], "add --no-enable-prefix-caching"),
        (
            ["worker", "demo", *LOCAL_DECODE.split()],
            "one that joins has a pool of its own",
        ),
        (["serve", "demo", "--mps"], "--mps is for workers that share a GPU"),
        (["serve", "demo", "--mps-prefill-percentage", "101"], "expected a percentage up to 100, got '101'"),
        (["serve", "demo", "--kv-transfer", "nccl"], "--device cpu has no --kv-transfer nccl, only shm, tcp, gloo"),
        (["serve", "demo", "--device", "cuda", "--kv-transfer", "shm"], "only cuda_ipc, tcp, nccl, gloo"),
        (["worker", "demo"], "--role and --scheduler are needed"),
        (["worker", "demo", "--name", "../../evil"], "argument --name: expected 1 to 48 letters, digits"),
        (["serve", "demo", "--port", "7001", "--grpc-port", "7001"], "--port and --grpc-port are both 7001"),
        (["serve", "demo", "--grpc-port", "7001", "--admin-port", "7001"], "--grpc-port and --admin-port are both"),
        (["serve", "demo", "--tool-parser-plugin", "/nope.py"], "--tool-parser-plugin needs --tool-call-parser or"),
        (["serve", "demo", "--config"], "argument --config: expected one argument"),
        (["ctl", "workers", "--timeout", "inf"], "expected seconds, above 0 and up to 86400, got 'inf'"),
        (["ctl", "requests", "--limit", "3000000000"], "at most 2147483647 is possible"),
        (["worker", "demo", "--role", "unified", "--scheduler", "foo"], "expected an endpoint such as ipc://"),
        (["worker", "demo", "--role", "unified", "--scheduler", "ipc://"], "expected an endpoint such as ipc://"),
        (["worker", "demo", "--role", "unified", "--scheduler", "tcp://h"], "expected an endpoint such as tcp://"),
        (["worker", "demo", "--role", "unified", "--scheduler", "tcp://127.0.0.1:1"], "nobody answers within"),
        (["worker", "demo", "--role", "unified", "--scheduler", "tcp://10.0.0.5:1"], "beyond loopback a key is needed"),
        (
            ["worker", "demo", "--role", "decode", "--scheduler", "tcp://127.0.0.1:1", "--kv-transfer", "shm"],
            "--kv-transfer shm works within one host",
        ),
        (["serve", "demo", "--listen", "10.0.0.5:5555"], "expected an endpoint such as tcp://10.0.0.5:5555"),
        (["serve", "demo", "--port", "0", "--listen", "tcp://10.0.0.5:1"], "beyond loopback a key is needed"),
        (["serve", "demo", "--port", "0", "--listen", "tcp://0.0.0.0:1"], "the address of this host that the others"),
        (["serve", "demo", "--port", "0", "--key-file", "k"], "give --listen tcp://IP:PORT too"),
        (
            ["serve", "demo", "--port", "0", "--listen", "tcp://127.0.0.1:0", "--key-file", "/does/not/exist"],
            "--key-file /does/not/exist: No such file or directory; `baton keys new DIR` makes one",
        ),
        (["keys", "new", "/proc/nowhere"], "can't write /proc/nowhere/cluster.key"),
        (["worker", "demo", "--role", "unified", "--scheduler", "ipc:///does/not/exist"], "no such socket"),
        (["bench", "serve", "--output-json", "/does/not/exist/x.json"], "can't write the result to /does/not/exist"),
        (["bench", "serve", "--random-range-ratio", "2"], "expected 0 <= ratio < 1"),
        (["bench", "serve", "--goodput", "itl:3"], "expected one of ttft, tpot, e2el as in ttft:300, got 'itl:3'"),
        (["bench", "serve", "--percentile-metrics", "ttft,x"], "expected names of ttft,tpot,itl,e2el, got 'x'"),
        (["bench", "serve", "--metric-percentiles", "101"], "expected percentiles such as 50,99, got '101'"),
        (["bench", "serve", "--metadata", "k"], "expected KEY=VALUE, got 'k'"),
        (["bench", "throughput"], "MODEL is missing"),
        (["bench", "throughput", "demo", "--model", "demo"], "two models are given"),
        (["bench", "latency", "demo", "--output-json", "/does/not/x.json"], "can't write the result to /does/not"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(
    words: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert line in err
    assert len(err.splitlines()) == 1


def test_a_busy_port_is_told_before_anything_starts(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 2
    assert f"can't serve on 0.0.0.0:{port}: Address already in use" in capfd.readouterr().err


def test_an_unknown_host_is_not_mended_by_another_port() -> None:
    with pytest.raises(UserError, match="choose another --host"):
        serve.claim_address(parse("demo", "--host", "nosuch.invalid", "--port", "0"))


@pytest.mark.parametrize(
    ("text", "prefix"), [("", ""), ("/", ""), ("api", "/api"), ("/api/", "/api"), ("/a/b", "/a/b")]
)
def test_the_root_path_has_a_slash_before_it_only(text: str, prefix: str) -> None:
    assert parse("demo", "--root-path", text).root_path == prefix


def test_a_benchmark_result_may_replace_an_older_one(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    args = bench_options("--result-filename", str(file))
    assert bench_serve.result_path(args) == file
    assert list(tmp_path.iterdir()) == []
    file.touch()
    assert bench_serve.result_path(args) == file


def test_benchmark_options_are_read_as_vllm_reads_them(tmp_path: Path) -> None:
    args = bench_options("--goodput", "ttft:300", "e2el:2000.5", "--percentile-metrics", "ttft,e2el")
    assert dict(args.goodput) == {"ttft": 300.0, "e2el": 2000.5}
    assert args.percentile_metrics == ("ttft", "e2el")
    assert bench_options("--metric-percentiles", "50,99.9").metric_percentiles == (50.0, 99.9)
    assert bench_serve.result_path(bench_options()) is None
    path = bench_serve.result_path(bench_options("--save-result", "--result-dir", str(tmp_path)))
    assert path is not None
    assert path.parent == tmp_path
    assert path.name.startswith("openai-infqps-")


def bench_options(*words: str) -> argparse.Namespace:
    parser = OneLineParser("baton bench serve", None)
    bench_serve.add_arguments(parser)
    return parser.parse(list(words))


def test_a_live_unix_socket_is_busy_and_a_stale_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "http"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(UserError, match="in use by another process"):
            serve.claim_address(parse("demo", "--uds", str(path)))
    assert serve.claim_address(parse("demo", "--uds", str(path))) == 0


def test_the_command_line_wins_over_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 1\ndecode: 2\nserved_model_name: [a, b]\nenable-prefix-caching: false\napi-key: -k\n"
    )
    args = parse("--config", str(file), "--port", "2")
    assert (args.model, args.port, args.decode, args.api_key) == ("from-file", 2, 2, ["-k"])
    assert args.served_model_name == ["a", "b"]
    assert args.enable_prefix_caching is False
    assert parse("mine", "--config", str(file)).model == "mine"


def test_false_in_the_config_file_turns_a_flag_off(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("mps: false\nno-enable-prefix-caching: false\nenable_auto_tool_choice: true\n")
    args = parse("demo", "--config", str(file))
    assert (args.mps, args.enable_prefix_caching, args.enable_auto_tool_choice) == (False, True, True)
    file.write_text("port: false\n")
    with pytest.raises(UserError, match="--port"):
        parse("demo", "--config", str(file))


def test_an_unknown_key_in_the_config_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("wings: 2\n")
    with pytest.raises(UserError, match="has no option --wings"):
        parse("demo", "--config", str(file))


@pytest.mark.parametrize("line", ["api-key:", "api-key: [a, null]", "model: ~"])
def test_a_key_without_value_in_the_config_file_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=f"{line.split(':')[0]} has no value"):
        parse("demo", "--config", str(file))


def test_vllms_names_are_aliases() -> None:
    assert parse("demo", "--num-gpu-blocks-override", "7").num_blocks == 7


@pytest.mark.parametrize(("text", "count"), [("1024", 1024), ("512M", 2**29), ("1.5GiB", 3 * 2**29), ("2k", 2048)])
def test_sizes(text: str, count: int) -> None:
    assert engine_args.size(text) == count


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        ([], ["prefill", "decode"]),
        (["--prefill", "2", "--decode", "1"], ["prefill", "prefill", "decode"]),
        (["--unified", "2"], ["unified", "unified"]),
        (["--decode", "2", "--unified", "1"], None),
        (["--prefill", "1", "--decode", "1", "--unified", "1"], ["prefill", "decode", "unified"]),
    ],
)
def test_worker_roles(words: list[str], roles: list[str] | None) -> None:
    args = parse("demo", *words)
    if roles is None:
        with pytest.raises(UserError):
            serve.worker_roles(args)
    else:
        assert serve.worker_roles(args) == roles


def test_size_of_a_model_from_its_config(model: Path) -> None:
    size = sizing.read_model_size(model, "auto", "dummy")
    assert size.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    parameters = 1000 * 64 + 2 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 128)
    assert size.weight_bytes == 4 * parameters


def test_a_pool_smaller_than_the_models_context_shortens_it(model: Path) -> None:
    shortened = plan(model, "--num-blocks", "10")
    assert shortened.max_model_len == 160
    assert "instead of the model's 256" in shortened.note
    assert shortened.note_level == logging.WARNING  # the pool's size was given, the context's was not


def test_a_pool_sized_for_the_machine_shortens_the_context_as_information(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "DEFAULT_POOL_BYTES", 160 * KV_BYTES_PER_TOKEN)
    shortened = plan(model)
    assert (shortened.max_model_len, shortened.note_level) == (160, logging.INFO)


def test_a_context_that_was_asked_for_must_fit_the_pool(model: Path) -> None:
    with pytest.raises(UserError, match="give --num-blocks 16 or more"):
        plan(model, "--num-blocks", "10", "--max-model-len", "256")


def test_a_context_beyond_the_models_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="beyond the model's 256"):
        plan(model, "--max-model-len", "257")


def test_too_little_memory_is_told(model: Path) -> None:
    with pytest.raises(UserError, match="too little memory: 2 workers need"):
        plan(model, "--kv-cache-memory-bytes", "100T")


def test_memory_of_a_container_is_free_where_files_that_were_read_fill_it(tmp_path: Path) -> None:
    whole = sizing.available_memory(tmp_path)
    (tmp_path / "memory.current").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 100000000\nfile 800000000\ninactive_file 700000000\n")
    for limit, free in (("1000000000", 800000000), ("max", whole)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert sizing.available_memory(tmp_path) == pytest.approx(free, rel=0.2)


def test_a_restarted_scheduler_waits_for_nobody_whom_an_operator_may_have_removed(model: Path) -> None:
    args = parse(str(model), "--prefill", "2", "--decode", "1")
    with RunDir() as run_dir:
        config = serve.serve_config(args, model, sizing.Plan(256, 4096), serve.worker_roles(args), run_dir)
    (scheduler,) = [spec for spec in processes.specs(config) if spec.name == config.scheduler.name]
    assert scheduler.config == config.scheduler
    assert scheduler.again.config == msgspec.structs.replace(config.scheduler, expected_workers=0)
    assert [spec.again for spec in processes.specs(config)[1:]] == processes.specs(config)[1:]


def test_a_step_has_a_token_for_each_stream() -> None:
    def filled(**given: int) -> tuple[int, int]:
        config = WorkerConfig("w", "unified", ModelConfig("m", ("m",)), batch=BatchConfig(**given))
        batch = fill_batch(config, CPU_OWN).batch
        return batch.max_num_batched_tokens, batch.max_num_seqs

    assert filled(max_num_batched_tokens=48) == (48, 48)
    assert filled(max_num_seqs=1000) == (1000, 1000)
    assert filled(max_num_batched_tokens=48, max_num_seqs=4) == (48, 4)
    with pytest.raises(UserError, match="--max-num-batched-tokens 48 is below --max-num-seqs 64"):
        filled(max_num_batched_tokens=48, max_num_seqs=64)


def test_several_frontends_need_a_port_to_share(model: Path) -> None:
    with pytest.raises(UserError, match="leave --uds out"):
        serve.claim_address(parse(str(model), "--frontends", "2", "--uds", "/tmp/baton.sock"))


def test_the_configuration_tree_names_everything_and_survives_json(model: Path) -> None:
    words = ("--prefill", "2", "--decode", "1", "--threads", "1", "--api-key", "k1", "k2", "--frontends", "2")
    args = parse(str(model), *words)
    with RunDir() as run_dir:
        config = serve.serve_config(args, model, sizing.Plan(256, 4096), serve.worker_roles(args), run_dir)
        assert run_dir.path.stat().st_mode & 0o777 == 0o700
    assert not run_dir.path.exists()
    assert config_tree.decode(config_tree.encode(config), ServeConfig) == config
    assert [worker.name for worker in config.workers] == ["prefill-0", "prefill-1", "decode-0"]
    assert {worker.scheduler for worker in config.workers} == {config.scheduler.endpoint}
    assert config.scheduler.expected_workers == 3
    assert [frontend.name for frontend in config.frontends] == ["frontend-0", "frontend-1"]
    assert {frontend.scheduler for frontend in config.frontends} == {config.scheduler.endpoint}
    assert all(frontend.api_keys == ("k1", "k2") and frontend.shares_port for frontend in config.frontends)
    assert config.workers[0].cache.kv_cache_memory_bytes == 4096


def test_with_listen_every_process_is_reachable_from_other_hosts(model: Path) -> None:
    args = parse(str(model), "--prefill", "1", "--decode", "0", "--listen", "tcp://127.0.0.1:0")
    endpoint, network = network_args.listen(args)
    assert endpoint.startswith("tcp://127.0.0.1:")
    assert not endpoint.endswith(":0")
    with RunDir() as run_dir:
        roles = serve.worker_roles(args)
        config = serve.serve_config(args, model, sizing.Plan(256, 4096), roles, run_dir, endpoint, network)
    assert [worker.name for worker in config.workers] == ["prefill-0"]
    local, far = config.scheduler.endpoint.split()
    assert (config.workers[0].scheduler, config.frontends[0].scheduler, far) == (local, local, endpoint)
    assert {config.workers[0].network, config.frontends[0].network} == {NetworkConfig("127.0.0.1")}


def test_a_key_is_written_for_its_owner_alone_and_never_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", "new", str(folder)]) == 0
    file = folder / "cluster.key"
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    before = file.read_text()
    assert main(["keys", "new", str(folder)]) == 2
    assert file.read_text() == before
    out, err = capsys.readouterr()
    assert str(file) in out
    assert "exists already" in err
    assert load_key(str(file)).secret.decode() not in out + err
