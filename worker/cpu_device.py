"""Steps on CPU cores: the device is a thread.

torch and our kernels let go of the interpreter lock, so the loop answers messages while a step runs, just as it does
beside a GPU.
"""

import os
import threading
import time
from collections import deque
from typing import Protocol

from baton.worker.pace import Pace
from baton.worker.plan import StepPlan, StepResult


class Runner(Protocol):
    """What a step is, apart from when it runs."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run it to its end."""


class ThreadDevice:
    """Runs steps one after the other in a thread of its own (backend.Device)."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: deque[StepPlan | threading.Event | None] = deque()
        self._results: deque[StepResult] = deque()
        self._available = threading.Semaphore(0)
        self._done = os.eventfd(0, os.EFD_NONBLOCK)
        self._failure: BaseException | None = None
        self._pace = Pace()
        self.running: tuple[int, float, float] | None = None
        """(step, started, expected duration) of the step on the device; read by the heartbeat thread."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a step."""
        self._put(plan)

    def fileno(self) -> int:
        """Readable while `results` has something to return or raise."""
        return self._done

    def results(self) -> list[StepResult]:
        """Steps that ended since the last call, in order. Raises what the step raised."""
        try:
            os.eventfd_read(self._done)
        except BlockingIOError:
            return []
        if self._failure is not None:
            raise self._failure
        return [self._results.popleft() for _ in range(len(self._results))]

    def finish(self) -> None:
        """Wait for every submitted step and throw the results away: nobody is there to want them."""
        reached = threading.Event()
        self._put(reached)
        reached.wait()
        self._results.clear()

    def close(self) -> None:
        """End after the step that is running."""
        self._put(None)
        self._thread.join()
        os.close(self._done)

    def _put(self, plan: StepPlan | threading.Event | None) -> None:
        self._plans.append(plan)
        self._available.release()

    def _run(self) -> None:
        while True:
            self._available.acquire()
            plan = self._plans.popleft()
            if plan is None:
                return
            if isinstance(plan, threading.Event):
                plan.set()
                continue
            if self._failure is not None:
                continue
            started = time.monotonic()
            self.running = (plan.step, started, self._pace.expected_s(plan.num_tokens))
            try:
                self._results.append(self._runner.execute(plan))
            except BaseException as error:
                self._failure = error
                os.eventfd_write(self._done, 1)
                continue
            self.running = None
            self._pace.learn(plan.num_tokens, time.monotonic() - started)
            os.eventfd_write(self._done, 1)
