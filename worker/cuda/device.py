"""The GPU as the worker's loop sees it; the interface of baton.worker.backend.Device.

Steps are enqueued by the loop's own thread, which takes a fraction of what they take on the device. A thread waits for
their events, without the interpreter lock, and wakes the loop.
"""

import os
import threading
import time
from collections import deque
from queue import SimpleQueue

from baton.worker.cuda.runner import CudaRunner, Pending
from baton.worker.pace import Pace
from baton.worker.plan import StepPlan, StepResult


class CudaDevice:
    """Runs steps in order on one stream."""

    def __init__(self, runner: CudaRunner) -> None:
        self._runner = runner
        self._pending: SimpleQueue[Pending | threading.Event | None] = SimpleQueue()
        self._results: deque[StepResult] = deque()
        self._done = os.eventfd(0, os.EFD_NONBLOCK)
        self._failure: BaseException | None = None
        self._pace = Pace()
        self.running: tuple[int, float, float] | None = None
        """(step, started, expected duration) of the step on the device; read by the heartbeat thread."""
        self._thread = threading.Thread(target=self._wait, name="gpu", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Enqueue a step."""
        self._pending.put(self._runner.launch(plan))

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
            tokens, started = pending.plan.num_tokens, time.monotonic()
            self.running = (pending.plan.step, started, self._pace.expected_s(tokens))
            try:
                self._results.append(pending.wait())
            except BaseException as error:
                self._failure = error
            self.running = None
            self._pace.learn(tokens, time.monotonic() - started)
            os.eventfd_write(self._done, 1)
