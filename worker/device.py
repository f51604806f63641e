"""The device as the worker's loop sees it: plans go in, results come out in order, and nothing waits.

A thread waits for each step, without the interpreter lock, and wakes the loop. On a GPU the step was enqueued when it
was submitted and the thread waits for its event; on CPU waiting is computing, and torch and our kernels let go of the
lock. So the loop answers messages while a step runs.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from baton.worker.pace import Pace
from baton.worker.plan import StepPlan, StepResult


class Device:
    """Runs steps in the order in which they are submitted."""

    def __init__(self, launch: Callable[[StepPlan], Callable[[], StepResult]]) -> None:
        """`launch` is Backend.launch: it begins a step, and what it returns waits for the step's end."""
        self._launch = launch
        self._pending: SimpleQueue[tuple[StepPlan, Callable[[], StepResult]] | threading.Event | None] = SimpleQueue()
        self._results: deque[StepResult] = deque()
        self._done = os.eventfd(0, os.EFD_NONBLOCK)
        self._failure: BaseException | None = None
        self._pace = Pace()
        self.running: tuple[int, float, float] | None = None
        """(step, started, expected duration) of the step on the device; read by the heartbeat thread."""
        self._thread = threading.Thread(target=self._wait, name="device", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Begin or queue a step."""
        self._pending.put((plan, self._launch(plan)))

    def fileno(self) -> int:
        """Readable while `results` has something to return or raise."""
        return self._done

    def results(self) -> list[StepResult]:
        """Steps that ended since the last call, in order. Raises what a step raised."""
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
        self._pending.put(reached)
        reached.wait()
        self._results.clear()

    def close(self) -> None:
        """End after the steps that were submitted."""
        self._pending.put(None)
        self._thread.join()
        os.close(self._done)

    def _wait(self) -> None:
        while (pending := self._pending.get()) is not None:
            if isinstance(pending, threading.Event):
                pending.set()
                continue
            if self._failure is not None:
                continue
            plan, wait = pending
            started = time.monotonic()
            self.running = (plan.step, started, self._pace.expected_s(plan.num_tokens))
            try:
                self._results.append(wait())
            except BaseException as error:
                self._failure = error
            self.running = None
            self._pace.learn(plan.num_tokens, time.monotonic() - started)
            os.eventfd_write(self._done, 1)
