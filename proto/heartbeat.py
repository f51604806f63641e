"""The sign of life that every worker and frontend sends to the scheduler."""

import threading
from collections import deque
from collections.abc import Callable

from baton.proto.channels import Dealer, identity
from baton.proto.messages import Beat, Message
from baton.proto.network import Network

BEAT_INTERVAL_S = 0.5


class Heartbeat:
    """A thread with a socket of its own, so that a process with a busy loop does not look dead."""

    def __init__(self, network: Network, scheduler: str, make_beat: Callable[[], Beat]) -> None:
        """`make_beat` is called in the thread, every BEAT_INTERVAL_S."""
        self._network = network
        self._scheduler = scheduler
        self._make_beat = make_beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and wait for the end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        beat = self._make_beat()
        me = identity(beat.name, beat.incarnation) + b":beat"
        # Answers go to the main socket: this one reads nothing.
        dealer: Dealer[Message] = Dealer(self._network, self._scheduler, me, Message)
        while not self._stop.wait(BEAT_INTERVAL_S):
            dealer.send(self._make_beat())
            deque(dealer.drain(), maxlen=0)  # nothing comes, but refused connections are reported there
        dealer.close(0)
