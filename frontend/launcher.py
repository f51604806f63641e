"""Starts the processes of a deployment, keeps them running and ends them: no process outlives the launcher.

    STARTING ─► SERVING ─► DRAINING ─► over
        └──────────┴─ a process can't be kept running ─► over

While STARTING any death ends the start. While SERVING a dead process is started again as restart.py decides, or one
that stands by takes its place. DRAINING stops the frontend first, which lets running streams finish, then the workers,
then the scheduler; a second signal, or a process that takes too long, is answered with SIGKILL. The child's side is
proto/supervision.py.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import msgspec

from baton.frontend.processes import ProcessSpec, StopOrder
from baton.frontend.restart import LONGEST_DELAY_S, RestartPolicy
from baton.proto import config as config_tree
from baton.proto import mps
from baton.proto.supervision import BEGIN, EXIT_FAILED, EXIT_USER_ERROR, Report

log = logging.getLogger(__name__)

WAITING_INTERVAL_S = 10.0
"""While STARTING: how often it is said who is not ready."""
STOP_GRACE_S = 5.0
"""After SIGTERM a process may take so long, beyond the time its streams may take, before it is killed."""


@dataclass(frozen=True)
class Ending:
    """Why the deployment ends."""

    exit_code: int
    error: str = ""
    """The last line the user sees; empty after a signal."""


class Child:
    """One started process: its pid, its socket to us, what it has reported. `standby`: it waits for `begin`."""

    def __init__(self, spec: ProcessSpec, run_dir: Path, standby: bool = False) -> None:
        self.spec = spec
        self.name = spec.name
        self.started_at = time.monotonic()
        self.standing_by = standby
        self.ready = False
        self.leaving = False
        self.failure: Report | None = None
        config_file = run_dir / f"{spec.name}.json"
        config_file.write_bytes(config_tree.encode(spec.config))
        self.reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *spec.command,
                    *("--config", str(config_file)),
                    *("--supervisor-fd", str(theirs.fileno())),
                    *(("--standby",) if standby else ()),
                ],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONSAFEPATH": "1", **spec.environment},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.exited = asyncio.Event()

    def begin(self) -> None:
        """End of standing by."""
        self.standing_by = False
        self.started_at = time.monotonic()
        with contextlib.suppress(OSError):  # it has just died too, which its pidfd will say
            self.reports.send(BEGIN, socket.MSG_NOSIGNAL)

    def read_reports(self) -> list[Report]:
        """All that have arrived."""
        reports = []
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while packet := self.reports.recv(65536):
                reports.append(msgspec.json.decode(packet, type=Report))
        return reports

    def terminate(self) -> None:
        """Ask it to stop. Popen's own way would reap a process that has just exited, before close() does."""
        if not self.exited.is_set():
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """At once, with everything that it has started."""
        if self.exited.is_set():
            return
        if self.spec.mps_dir and not self.standing_by:
            mps.end_client(self.spec.mps_dir, self.process.pid)
        os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Reap the process, which has exited, end what it has left running, and free our ends."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reports.close()
        os.close(self.pidfd)
        self.exited.set()

    def obituary(self) -> str:
        """How it died, in one line."""
        if self.failure is not None:
            return f"{self.name}: {self.failure.error}"
        code = self.process.returncode
        if code < 0:
            return f"{self.name}: killed by {signal.Signals(-code).name}"
        return f"{self.name}: exited with code {code} before it could say why"


class Launcher:
    """Keeps `specs` running in `run_dir`; `on_ready(seconds since the start)` is called once, when all are ready."""

    def __init__(
        self, specs: Sequence[ProcessSpec], run_dir: Path, on_ready: Callable[[float], None], drain_s: float
    ) -> None:
        self._specs = specs
        self._run_dir = run_dir
        self._on_ready = on_ready
        self._drain_s = drain_s
        self._children: dict[str, Child] = {}
        self._standbys: dict[str, Child] = {}
        self._policies = {spec.name: RestartPolicy() for spec in specs}
        self._restarts: set[asyncio.Task[None]] = set()
        self._serving = False
        self._draining = False

    async def run(self) -> int:
        """Until a signal, or until a process can't be kept running; the exit code."""
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._started_at = time.monotonic()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signum, self._on_signal)
        try:
            try:
                for spec in self._specs:
                    self._start(spec)
            except OSError as error:
                if not self._ending.done():
                    self._ending.set_result(Ending(EXIT_USER_ERROR, f"{spec.name} can't be started: {error}"))
            self._loop.call_later(WAITING_INTERVAL_S, self._say_who_is_missing)
            ending = await self._ending
            self._draining = True
            if self._serving and not ending.error:
                await self._drain()
        finally:
            self._draining = True
            await self._kill_all()
        if ending.error:
            print(f"error: {ending.error}", file=sys.stderr, flush=True)
        return ending.exit_code

    def _start(self, spec: ProcessSpec) -> None:
        if self._ending.done():
            return
        standby = self._standbys.pop(spec.name, None)
        if standby is not None:
            standby.begin()
        self._children[spec.name] = standby or self._spawn(spec)

    def _spawn(self, spec: ProcessSpec, standby: bool = False) -> Child:
        child = Child(spec, self._run_dir, standby)
        self._loop.add_reader(child.reports, self._on_reports, child)
        self._loop.add_reader(child.pidfd, self._on_exit, child)
        return child

    def _prepare(self, spec: ProcessSpec) -> None:
        """For the next death. A worker that begins a new incarnation is ready once more, and has its standby still."""
        if spec.standby and spec.name not in self._standbys and not self._ending.done():
            self._standbys[spec.name] = self._spawn(spec, standby=True)

    def _on_reports(self, child: Child) -> None:
        reports = child.read_reports()
        if not reports:
            # End of file: the process closed its end, and its pidfd says the rest.
            self._loop.remove_reader(child.reports)
        for report in reports:
            if report.event == "failed":
                child.failure = report
            elif report.event == "standing by":
                log.info("%s: another process stands by, pid %d", child.name, child.process.pid)
            elif report.event == "alive":
                log.info("%s is alive, pid %d", child.name, child.process.pid)
            elif report.event == "ready":
                self._on_child_ready(child)
            elif report.event == "leaving":
                child.leaving = True

    def _on_child_ready(self, child: Child) -> None:
        now = time.monotonic()
        child.ready = True
        self._policies[child.name].became_ready(now)
        if self._serving:
            log.info("%s is ready again after %.1f s", child.name, now - child.started_at)
            self._prepare(child.spec)
        elif len(self._children) == len(self._specs) and all(each.ready for each in self._children.values()):
            self._serving = True
            self._on_ready(now - self._started_at)
            for spec in self._specs:
                self._prepare(spec)

    def _say_who_is_missing(self) -> None:
        if self._serving or self._ending.done():
            return
        missing = [child.name for child in self._children.values() if not child.ready]
        log.info("waiting for %s to be ready", ", ".join(missing))
        self._loop.call_later(WAITING_INTERVAL_S, self._say_who_is_missing)

    def _on_exit(self, child: Child) -> None:
        self._on_reports(child)
        self._loop.remove_reader(child.pidfd)
        self._loop.remove_reader(child.reports)
        child.close()
        if child.standing_by:
            if self._standbys.get(child.name) is child and not self._draining:
                del self._standbys[child.name]
                log.warning("%s, while it stood by", child.obituary())
            return
        if self._draining or self._ending.done():
            return
        if child.leaving and self._serving:
            self._on_left(child)
            return
        mendable = child.failure is not None and child.failure.user_error
        if mendable and not self._serving:
            self._ending.set_result(Ending(EXIT_USER_ERROR, child.obituary()))
        else:
            self._restart(child.spec, child.obituary(), mendable)

    def _restart(self, spec: ProcessSpec, obituary: str, mendable: bool = False) -> None:
        """`mendable`: by its user, for whom the others go on serving meanwhile."""
        delay = self._policies[spec.name].died(time.monotonic())
        if mendable:
            delay = LONGEST_DELAY_S
        if delay is None or not self._serving:
            self._ending.set_result(Ending(EXIT_FAILED, obituary))
            return
        log.warning("%s; starting it again %s", obituary, f"in {delay:.0f} s" if delay else "now")
        restart = self._loop.create_task(self._start_again(spec, delay))
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _start_again(self, spec: ProcessSpec, delay_s: float) -> None:
        """Once nobody is left who ends with it: a keeper's successor doesn't know who still has the old one's memory,
        and would let a worker measure what is free beside that."""
        bereaved = [each for each in self._children.values() if each.spec.ends_with == spec.name]
        for each in bereaved:
            each.kill()
        for each in bereaved:
            await each.exited.wait()
        await asyncio.sleep(delay_s)
        try:
            self._start(spec.again)
        except OSError as error:  # no memory for it, or no space for its configuration
            self._restart(spec, f"{spec.name}: can't be started: {error}")

    def _on_left(self, child: Child) -> None:
        del self._children[child.name]
        if standby := self._standbys.pop(child.name, None):
            standby.kill()  # nobody's death is waited for any more
        log.info("%s was removed by an operator; it is not started again", child.name)
        if not self._children:
            self._ending.set_result(Ending(0))

    def _on_signal(self) -> None:
        if not self._ending.done():
            self._ending.set_result(Ending(0))
            return
        for child in self._children.values():
            child.kill()

    async def _drain(self) -> None:
        log.info("stopping; running requests may take up to %.0f s, a second signal stops at once", self._drain_s)
        by_order = sorted(self._children.values(), key=lambda child: child.spec.stop_order)
        for order, children in groupby(by_order, key=lambda child: child.spec.stop_order):
            patience = STOP_GRACE_S + (self._drain_s if order == StopOrder.FRONTEND else 0)
            await self._stop(list(children), patience)

    async def _stop(self, children: Sequence[Child], patience_s: float) -> None:
        running = [child for child in children if not child.exited.is_set()]
        for child in running:
            child.terminate()
        try:
            async with asyncio.timeout(patience_s):
                for child in running:
                    await child.exited.wait()
        except TimeoutError:
            late = ", ".join(child.name for child in running if not child.exited.is_set())
            log.warning("killing %s: not stopped %.0f s after SIGTERM", late, patience_s)
            for child in running:
                child.kill()

    async def _kill_all(self) -> None:
        for child in [*self._standbys.values(), *self._children.values()]:
            child.kill()
            await child.exited.wait()
