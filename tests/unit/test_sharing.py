"""Which workers share a device's memory."""

import argparse
from pathlib import Path

import pytest

from baton.frontend.cli import sharing
from baton.frontend.processes import keeper_spec, specs, worker_spec
from baton.proto.config import CacheConfig, KeeperConfig, ModelConfig, SchedulerConfig, ServeConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role

P, D, U = Role.PREFILL, Role.DECODE, Role.UNIFIED


def worker(name: str, role: Role, gpu: int = 0, device: str = "cuda", **fields: object) -> WorkerConfig:
    model = ModelConfig(str(Path("m")), ("m",))
    return WorkerConfig(name, role, model, device=device, gpu=gpu, **fields)  # type: ignore[arg-type]


def share(*workers: WorkerConfig) -> tuple[list[tuple[str, int]], tuple[KeeperConfig, ...]]:
    shared, keepers = sharing.share(workers, "ipc://{}".format)
    return [(each.keeper, each.keeper_workers) for each in shared], keepers


def test_workers_on_one_gpu_have_a_keeper_and_a_part_by_role() -> None:
    assigned, (keeper,) = share(worker("p", P, 2), worker("d", D, 5), worker("e", D, 2))
    assert assigned == [("ipc://keeper-0", 2), ("", 1), ("ipc://keeper-0", 2)]
    assert keeper.parts == {"p": 0.25, "e": 0.75}
    assert (keeper.device, keeper.gpu) == ("cuda", 2)


def test_who_has_a_keepers_memory_ends_with_it() -> None:
    workers, keepers = sharing.share((worker("p", P, 2), worker("d", D, 5), worker("e", D, 2)), "ipc://{}".format)
    started = specs(ServeConfig(SchedulerConfig("ipc://scheduler"), (), workers, "/run", keepers=keepers))
    assert {each.name: each.ends_with for each in started if each.ends_with} == {"p": "keeper-0", "e": "keeper-0"}


@pytest.mark.parametrize("cache", [CacheConfig(num_blocks=100), CacheConfig(kv_cache_memory_bytes=2**30)])
def test_a_size_for_each_worker_makes_equal_parts(cache: CacheConfig) -> None:
    _, (keeper,) = share(worker("p", P, cache=cache), worker("d", D, cache=cache))
    assert keeper.parts == {"p": 0.5, "d": 0.5}


def test_on_cpu_workers_share_only_when_asked_to() -> None:
    assert share(worker("p", P, device="cpu"), worker("d", D, device="cpu"))[1] == ()
    local = {"device": "cpu", "kv_transfer": "local"}
    assigned, (keeper,) = share(worker("p", P, **local), worker("d", D, **local))  # type: ignore[arg-type]
    assert assigned == [("ipc://keeper-0", 2)] * 2
    assert keeper.device == "cpu"
    assert share(worker("u", U, **local), worker("v", U, **local))[1] == ()  # type: ignore[arg-type]


def test_only_the_one_worker_of_a_deployment_keeps_its_threads_awake() -> None:
    def spins(*names: str) -> set[str]:
        workers = tuple(worker(name, U, device="cpu") for name in names)
        serve = ServeConfig(scheduler=SchedulerConfig("", ""), workers=workers, frontends=(), run_dir="")
        return {each.environment["GOMP_SPINCOUNT"] for each in specs(serve) if each.name in names}

    assert spins("u", "v") == {"0"}
    (alone,) = spins("u")
    assert int(alone) > 0


def test_nobody_shares_where_all_workers_join_later() -> None:
    assert share() == ([], ())


def test_mps_without_its_daemon_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = argparse.Namespace(mps=True, device="cuda", gpus=(0,))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--mps needs nvidia-cuda-mps-control"):
        sharing.check(args, 2)
    with pytest.raises(UserError, match="--mps is for workers that share a GPU"):
        sharing.check(args, 1)


def test_with_mps_prefill_workers_have_a_part_of_the_gpu(tmp_path: Path) -> None:
    workers, keepers = sharing.share((worker("p", P), worker("d", D)), "ipc://{}".format)
    (prefill, decode), (keeper,) = sharing.with_mps(workers, keepers, tmp_path, 60)
    assert prefill.mps_dir == decode.mps_dir == keeper.mps_dir == str(tmp_path / "keeper-0.mps")
    assert (prefill.mps_percentage, decode.mps_percentage) == (60, 100)
    named = "CUDA_MPS_PIPE_DIRECTORY"
    assert [worker_spec(each).environment[named] for each in (prefill, decode)] == [keeper.mps_dir] * 2
    assert named not in keeper_spec(keeper).environment  # the daemon that it ends would wait for it
