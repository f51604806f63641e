"""No transport: for pools that peers can't read yet. A pull fails at once, and the stream is computed again."""

import os

from baton.kv_transfer.contract import Pull, PullDone, Sink, Source


class NoSource(Source):
    """Nothing to read here."""

    def __init__(self) -> None:
        self.address = ""

    def close(self) -> None:
        """Nothing to stop."""


class NoSink(Sink):
    """Answers every pull with its failure."""

    def __init__(self) -> None:
        self._ready = os.eventfd(0, os.EFD_NONBLOCK)
        self._done: list[PullDone] = []

    def start(self, pull: Pull) -> None:
        self._done.append(PullDone(pull.transfer, ok=False, reason="this worker's pool has no transport"))
        os.eventfd_write(self._ready, 1)

    def fileno(self) -> int:
        return self._ready

    def completed(self) -> list[PullDone]:
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            return []
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        os.close(self._ready)
