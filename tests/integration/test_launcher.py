"""The launcher over real processes: ready once, restart, drain in order, and nothing left behind however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PROGRAM = str(Path(__file__).with_name("small_deployment.py"))
DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(60)


class Deployment:
    """A running small_deployment.py and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def read_until(self, start: str) -> str:
        """The next output line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(start):
                return line.rstrip()
        raise AssertionError(f"ended without {start!r}: {self.lines}")

    def finish(self) -> int:
        """Read to the end of the output, which is after the last process; the exit code."""
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in self.process.stdout)
        return self.process.wait(DEADLINE_S)

    @property
    def run_dir(self) -> Path:
        return Path(next(line for line in self.lines if line.startswith("run_dir ")).split()[1])


@contextmanager
def deployment(*children: str) -> Iterator[Deployment]:
    """A launcher with `children` (NAME=BEHAVIOUR); killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, *children], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield Deployment(process)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def child_pids(process: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def title(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline()).strip()


def wait_gone(pids: list[int]) -> None:
    """Every process ends within the deadline, also the shell that removes the run directory before it ends."""
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=DEADLINE_S)
    assert [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


def test_ready_is_said_once_when_all_children_are_ready() -> None:
    with deployment("scheduler=serve", "worker=serve") as running:
        running.read_until("ready")
        running.process.terminate()
        assert running.finish() == 0
        assert running.lines.count("ready") == 1


def test_children_carry_their_names() -> None:
    with deployment("worker=serve") as running:
        running.read_until("ready")
        titles = [title(pid) for pid in child_pids(running.process)]
        assert "baton: worker" in titles


def test_sigterm_stops_frontend_then_workers_then_scheduler_and_leaves_nothing() -> None:
    with deployment("scheduler=serve", "worker=serve", "frontend=serve") as running:
        running.read_until("ready")
        pids = child_pids(running.process)
        running.process.terminate()
        assert running.finish() == 0
        stopped = [line.split()[0] for line in running.lines if line.endswith(" stopped")]
        assert stopped == ["frontend", "worker", "scheduler"]
        wait_gone(pids)
        assert not running.run_dir.exists()


def test_a_second_signal_stops_at_once() -> None:
    with deployment("worker=serve", "frontend=stubborn") as running:
        running.read_until("ready")
        running.process.send_signal(signal.SIGINT)
        while "a second signal" not in running.lines[-1]:
            running.read_until("")
        started = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        assert running.finish() == 0
        assert time.monotonic() - started < 3.0
        assert not running.run_dir.exists()


def test_kill_9_of_the_launcher_leaves_no_process_and_no_directory() -> None:
    with deployment("scheduler=serve", "worker=stubborn", "frontend=serve") as running:
        running.read_until("ready")
        pids = child_pids(running.process)
        assert len(pids) >= 3
        running.process.kill()
        wait_gone(pids)
        assert not running.run_dir.exists()


def test_one_process_stands_by_and_takes_over_whatever_signal_it_had() -> None:
    with deployment("worker=renew+") as running:
        worker = int(running.read_until("worker ").split()[1])
        while "ready again" not in running.lines[-1]:
            running.read_until("")
        while "worker: another process stands by" not in running.lines[-1]:
            running.read_until("")
        standby = int(running.lines[-1].split()[-1])
        assert [pid for pid in child_pids(running.process) if "standby" in title(pid)] == [standby]
        os.kill(standby, signal.SIGTERM)
        os.kill(worker, signal.SIGKILL)
        assert running.read_until("worker ") == f"worker {standby}"
        running.process.terminate()
        assert running.finish() == 0
        assert "worker stopped" in running.lines
        assert not running.run_dir.exists()


def test_a_dead_child_is_started_again() -> None:
    with deployment("worker=serve") as running:
        first = int(running.read_until("worker ").split()[1])
        running.read_until("ready")
        os.kill(first, signal.SIGKILL)
        second = int(running.read_until("worker ").split()[1])
        assert second != first
        assert any("worker: killed by SIGKILL; starting it again now" in line for line in running.lines)
        running.process.terminate()
        assert running.finish() == 0


def test_what_its_user_has_to_mend_does_not_end_those_that_serve() -> None:
    with deployment("scheduler=serve", "worker=fail_by_user_after_restart") as running:
        first = int(running.read_until("worker ").split()[1])
        running.read_until("ready")
        os.kill(first, signal.SIGKILL)
        while "this flag is wrong; starting it again in 30 s" not in running.lines[-1]:
            running.read_until("")
        assert "scheduler stopped" not in running.lines
        running.process.terminate()
        assert running.finish() == 0
        assert "scheduler stopped" in running.lines


def test_what_can_not_be_started_again_now_is_tried_once_more() -> None:
    with deployment("scheduler=serve", "worker=serve") as running:
        running.read_until("ready")
        (first,) = [int(line.split()[1]) for line in running.lines if line.startswith("worker ")]
        config = running.run_dir / "worker.json"
        config.unlink()
        config.mkdir()
        os.kill(first, signal.SIGKILL)
        while "worker: can't be started: " not in running.read_until(""):
            pass
        config.rmdir()
        assert int(running.read_until("worker ").split()[1]) != first
        running.process.terminate()
        assert running.finish() == 0


def test_a_keeper_is_started_again_only_when_all_who_had_its_memory_are_gone() -> None:
    with deployment("keeper=serve", "worker=stubborn:keeper", "frontend=serve") as running:
        running.read_until("ready")
        said = [line.split() for line in running.lines]
        first = {words[0]: int(words[1]) for words in said if len(words) == 2 and words[1].isdigit()}
        os.kill(first["keeper"], signal.SIGKILL)
        running.read_until("keeper ")
        assert not psutil.pid_exists(first["worker"])
        assert psutil.pid_exists(first["frontend"])
        assert any("worker: killed by SIGKILL; starting it again now" in line for line in running.lines)


def test_a_failed_start_ends_with_the_childs_own_exception() -> None:
    with deployment("scheduler=serve", "worker=fail") as running:
        assert running.finish() == 1
        assert running.lines[-1] == "error: worker: ValueError: cannot work, start 1"
        assert not running.run_dir.exists()


def test_a_module_that_cannot_be_imported_says_why() -> None:
    with deployment("worker=missing") as running:
        assert running.finish() == 1
        assert running.lines[-1] == "error: worker: ImportError: No module named no_such_module"


def test_a_users_error_exits_2_without_a_traceback() -> None:
    with deployment("scheduler=serve", "worker=fail_by_user") as running:
        assert running.finish() == 2
        assert running.lines[-1] == "error: worker: this flag is wrong"
        assert sum("this flag is wrong" in line for line in running.lines) == 1
        assert not any("Traceback" in line for line in running.lines)


@pytest.mark.slow
def test_three_failed_starts_in_a_row_end_the_deployment() -> None:
    with deployment("scheduler=serve", "worker=fail_after_restart") as running:
        worker = int(running.read_until("worker ").split()[1])
        running.read_until("ready")
        os.kill(worker, signal.SIGKILL)
        assert running.finish() == 1
        assert running.lines[-1] == "error: worker: ValueError: cannot work, start 4"
