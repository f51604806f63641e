"""One stream of the frontend: what it has accepted, what it waits for, and the messages that follow from it."""

import heapq
import math
from dataclasses import dataclass, field

import msgspec
import numpy as np

from baton.frontend.instructions import Worker
from baton.proto.hashing import extend_packed
from baton.proto.lifecycle import FinishReason, Outcome, Stage
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import Close, Finish, Ledger, SamplingParams, Sid, Submit, TokenLogprobs

_KEPT_STAGES = (Stage.RECEIVED.value, Stage.FIRST_TOKEN.value)


@dataclass(slots=True)
class Row:
    """Tokens of one stream at consecutive output positions, ahead of what is accepted."""

    pos: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish | None

    def __lt__(self, other: "Row") -> bool:
        return self.pos < other.pos


@dataclass(slots=True, eq=False)
class Stream:
    """State of one open stream. Times are absolute seconds on the caller's clock; inf is never."""

    sid: Sid
    prompt: np.ndarray  # int32 [prompt_len]
    prompt_hashes: bytes
    params: SamplingParams
    deadline: float
    priority: int
    ledger: Ledger
    sibling: int = 0
    """See Submit; while this is the first attempt."""
    request: str = ""
    """See Submit."""
    part: bool = False
    """See Close."""
    attempt: int = 1
    output: list[int] = field(default_factory=list)
    """Every accepted token."""
    answered: bool = False
    """This attempt is known to the scheduler: accepted, or proven to be running by a row."""
    admitted: bool = False
    """Answered under this attempt or an older one."""
    submit_at: float = 0.0
    """While not answered: when Submit is sent (again)."""
    busy_since: float = math.inf
    """Since when the next attempt of an admitted stream has been rejected as busy."""
    prompt_logprobs: PromptLogprobs | None = None
    """Come with the row of the first token."""
    lacks_prompt_logprobs: bool = field(init=False)
    """They are wanted and not here: only the prefill leg's row has them, and that may be overtaken. No row counts."""
    held: list[Row] = field(default_factory=list)
    """Heap of rows that arrived before their predecessors."""
    gap_until: float = math.inf
    finish: Finish | None = None
    """Announced by a worker; counts once `final` tokens are accepted."""
    vector: bytes = b""
    """Comes with the finish of a stream without tokens."""
    source: Worker | None = None
    """Who sent the last row of this attempt."""
    suspect: Worker | None = None
    """Whose lost rows may have been this stream's."""
    suspect_until: float = math.inf
    fruitless: int = 0
    """Attempts in a row that ended without a new token."""
    timer: float = math.inf
    """Earliest entry of this stream among the owner's timers."""

    def due(self) -> float:
        """When the earliest of its timers runs out."""
        submit_at = math.inf if self.answered else self.submit_at
        return min(submit_at, self.deadline, self.gap_until, self.suspect_until)

    def confirm(self) -> None:
        """This attempt is known to the scheduler."""
        self.answered = self.admitted = True
        self.busy_since = math.inf

    def __post_init__(self) -> None:
        self.lacks_prompt_logprobs = self.params.prompt_logprobs >= 0

    def learn_prompt_logprobs(self, told: PromptLogprobs) -> None:
        """They have come, under this attempt or an older one."""
        self.prompt_logprobs, self.lacks_prompt_logprobs = told, False

    def apply(
        self, pos: int, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], finish: Finish | None
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """What is new in the row at `pos` and in the held rows that it reaches; a row that is ahead is held."""
        output = self.output
        known = len(output) - pos
        if known < 0 or (tokens and self.lacks_prompt_logprobs):
            heapq.heappush(self.held, Row(pos, tokens, logprobs, finish))
            return (), ()
        if known:
            tokens, logprobs = tokens[known:], logprobs[known:]
        output += tokens
        if finish is not None:
            self.finish = finish
        while self.held and self.held[0].pos <= len(output) and not self.lacks_prompt_logprobs:
            row = heapq.heappop(self.held)
            more = self.apply(row.pos, row.tokens, row.logprobs, row.finish)
            tokens, logprobs = tokens + more[0], logprobs + more[1]
        return tokens, logprobs

    def complete(self) -> bool:
        """A finish was announced and all its tokens are here."""
        return self.finish is not None and len(self.output) >= self.finish.final

    def waits_for_rows(self) -> bool:
        """Something later than the next position has been seen."""
        return bool(self.held) or self.finish is not None

    def implied_finish(self) -> Finish | None:
        """The accepted tokens may be complete although the row that said so was lost."""
        n = len(self.output)
        if not n:
            return None
        if self.output[-1] in self.params.stop_token_ids:
            return Finish(FinishReason.STOP.value, n)
        return Finish(FinishReason.LENGTH.value, n) if n >= self.params.max_tokens else None

    def next_attempt(self, reason: str) -> None:
        """Freeze what is accepted and forget everything about the attempt that has failed."""
        old = self.ledger
        self.ledger = Ledger(
            client=old.client,
            attempts=self.attempt + 1,
            notes=[*old.notes, f"attempt {self.attempt} ended at token {len(self.output)}: {reason}"],
            stages={stage: old.stages[stage] for stage in _KEPT_STAGES if stage in old.stages},
        )
        self.attempt += 1
        self.sibling = 0
        self.answered = False
        self.held = []
        self.gap_until = self.suspect_until = math.inf
        self.finish = self.source = self.suspect = None
        self.vector = b""

    def submit_message(self, now: float) -> tuple[Submit, tuple[bytes, ...]]:
        """Submit of this attempt with its frames: int32 prompt ‖ accepted tokens; packed block hashes."""
        timeout_s = 0.0 if self.deadline == math.inf else max(self.deadline - now, 1e-3)
        params = self.params
        if self.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=-1)
        message = Submit(
            self.sid, self.attempt, len(self.prompt), params, timeout_s, self.priority, self.sibling, self.request
        )
        if not self.output:
            return message, (self.prompt.tobytes(), self.prompt_hashes)
        tokens = np.concatenate([self.prompt, np.asarray(self.output, dtype=np.int32)])
        return message, (tokens.tobytes(), extend_packed(self.prompt_hashes, tokens))

    def close_message(self, outcome: Outcome) -> Close:
        """The end of this stream, for the scheduler."""
        return Close(self.sid, self.attempt, outcome.value, len(self.prompt), len(self.output), self.ledger, self.part)
