"""Sampled tokens on their way to the frontends: one TokenBatch per step and frontend, on a socket per frontend."""

from collections import defaultdict
from collections.abc import Container, Iterator

import zmq

from baton.proto.channels import Dealer, identity
from baton.proto.messages import CancelStream, TokenBatch, ToWorkerFromFrontend
from baton.proto.network import Network
from baton.worker.clock import ClusterClock
from baton.worker.effects import Emit

BEAT_INTERVAL_S = 0.5
"""An idle link repeats its last sequence number this often, so that a frontend sees that a batch was lost."""
LINK_IDLE_S = 60.0
"""A link without rows for so long is closed; the next row opens it again."""
FRONTEND_MEMORY = 1024
"""Frontend incarnations whose channels are numbered on, those that got rows last."""


class _Link:
    def __init__(self, dealer: Dealer[CancelStream]) -> None:
        self.dealer = dealer
        self.frontend = 0  # the incarnation that the last rows were for
        self.sent_at = 0.0
        self.rows_at = 0.0


class TokenPlane:
    """Links of one worker incarnation to every frontend it has rows for."""

    def __init__(
        self, network: Network, poller: zmq.Poller, worker: str, incarnation: int, clock: ClusterClock
    ) -> None:
        self._network = network
        self._poller = poller
        self._worker = worker
        self._incarnation = incarnation
        self._clock = clock
        self._links: dict[str, _Link] = {}
        # By endpoint and incarnation, the last used last; outlives a link: a reopened one goes on counting.
        self._seq: dict[tuple[str, int], int] = {}
        # The highest number of those forgotten. Others go on from it: from a lower one, a loss would not show.
        self._forgotten = 0

    def send(self, rows: list[Emit], now: float) -> None:
        """Deliver one step's rows, grouped by frontend."""
        by_frontend: dict[tuple[str, int], list[Emit]] = defaultdict(list)
        for row in rows:
            by_frontend[row.reply_to, row.sid[0]].append(row)
        for (endpoint, frontend), group in by_frontend.items():
            link = self._link(endpoint)
            link.frontend = frontend
            seq = self._next_seq(endpoint, frontend)
            link.rows_at = link.sent_at = now
            frames = [row.prompt_logprobs.data for row in group if row.prompt_logprobs]
            if vectors := b"".join(row.vector for row in group):
                frames.append(vectors)
            link.dealer.send(self._batch(seq, group, frontend), *frames)

    def beat(self, now: float) -> None:
        """Send the idle beats that are due, and close links that nobody needs."""
        for endpoint, link in list(self._links.items()):
            if now - link.rows_at >= LINK_IDLE_S:
                self._close(endpoint)
            elif now - link.sent_at >= BEAT_INTERVAL_S:
                link.sent_at = now
                seq = self._seq.get((endpoint, link.frontend), self._forgotten)
                link.dealer.send(TokenBatch(self._worker, self._incarnation, seq, frontend=link.frontend))

    def next_beat(self) -> float:
        """When `beat` has something to do; infinity without links."""
        return min((link.sent_at for link in self._links.values()), default=float("inf")) + BEAT_INTERVAL_S

    def cancels(self, ready: Container[object]) -> Iterator[CancelStream]:
        """What the frontends no longer want; `ready`: as of Dealer.drain."""
        for link in self._links.values():
            for message, _frames in link.dealer.drain(ready):
                yield message

    def close(self) -> None:
        """Close every link."""
        for endpoint in list(self._links):
            self._close(endpoint)

    def _link(self, endpoint: str) -> _Link:
        link = self._links.get(endpoint)
        if link is None:
            me = identity(self._worker, self._incarnation)
            dealer: Dealer[CancelStream] = Dealer(self._network, endpoint, me, ToWorkerFromFrontend)
            link = self._links[endpoint] = _Link(dealer)
            self._poller.register(dealer.socket, zmq.POLLIN)
        return link

    def _next_seq(self, endpoint: str, frontend: int) -> int:
        seq = self._seq.pop((endpoint, frontend), self._forgotten) + 1
        self._seq[endpoint, frontend] = seq
        if len(self._seq) > FRONTEND_MEMORY:
            self._forgotten = max(self._forgotten, self._seq.pop(next(iter(self._seq))))
        return seq

    def _close(self, endpoint: str) -> None:
        link = self._links.pop(endpoint)
        self._poller.unregister(link.dealer.socket)
        link.dealer.close()

    def _batch(self, seq: int, rows: list[Emit], frontend: int) -> TokenBatch:
        return TokenBatch(
            worker=self._worker,
            incarnation=self._incarnation,
            seq=seq,
            n=tuple(row.sid[1] for row in rows),
            attempt=tuple(row.attempt for row in rows),
            pos=tuple(row.pos for row in rows),
            count=tuple(len(row.tokens) for row in rows),
            tokens=tuple(token for row in rows for token in row.tokens),
            finish={i: row.finish for i, row in enumerate(rows) if row.finish},
            logprobs={i: row.logprobs for i, row in enumerate(rows) if row.logprobs},
            ledgers={i: self._clock.outgoing(row.ledger) for i, row in enumerate(rows) if row.ledger},
            prompt_logprobs={i: row.prompt_logprobs.top for i, row in enumerate(rows) if row.prompt_logprobs},
            vectors=tuple(i for i, row in enumerate(rows) if row.vector),
            frontend=frontend,
        )
