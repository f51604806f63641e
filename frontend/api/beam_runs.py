"""Beam searches of a request on the cluster: each step of each beam is a stream of one token.

The prefix cache makes it cheap: what a beam shares with the step before is found, block by block.
"""

import asyncio
import time
from dataclasses import dataclass

import msgspec
import numpy as np

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import outcome_error, unavailable
from baton.frontend.api.params import Wishes
from baton.frontend.api.prompts import Prompt
from baton.frontend.beams import BeamSearch, Ended
from baton.frontend.engine_client import EngineClient, Output, OutputReader
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.plan import OutputPlan
from baton.proto.hashing import extend_packed
from baton.proto.lifecycle import Outcome, RejectCode
from baton.proto.messages import Ledger, SamplingParams, TokenLogprobs


class BeamRun:
    """All prompts of one request, step by step together. Leaving `finish` early aborts what runs."""

    def __init__(
        self, client: EngineClient, prompts: list[Prompt], wishes: Wishes, info: ModelInfo, received_s: float
    ) -> None:
        """Raises ApiError when a prompt is too long."""
        self._client = client
        self._prompts, self._wishes, self._received_s = prompts, wishes, received_s
        self._params = [wishes.for_prompt(len(prompt.ids), info, "prompt") for prompt in prompts]
        self._searches = [new_search(params, wishes) for params in self._params]
        self._ledgers: list[Ledger | None] = [None] * len(prompts)
        self._first = True
        self._outcome = Outcome.ABORTED
        """Of searches that did not come to their end."""

    async def finish(
        self, tokenizer: Tokenizer, plan: OutputPlan | None, deadline: float
    ) -> list[tuple[Choice, Delta]]:
        """The best outputs of each prompt, best first, as the choices of an answer whose text is read as `plan` says.
        `deadline` is on CLOCK_MONOTONIC, infinity for none. Raises ApiError."""
        try:
            while any(not search.done for search in self._searches):
                await self._step(deadline)
        finally:
            self._count()
        done: list[tuple[Choice, Delta]] = []
        for index, search in enumerate(self._searches):
            for ended in search.best():
                ledger = self._ledgers[index] or Ledger()
                prompt, params = self._prompts[index], self._params[index]
                choice = Choice(len(done), prompt, params, self._wishes, tokenizer, plan)
                done.append((choice, choice.take(beam_output(ended, self._wishes, ledger), _NoStops())))
        return done

    def _count(self) -> None:
        """A search is one request, however many streams its steps were."""
        for search, prompt, ledger in zip(self._searches, self._prompts, self._ledgers, strict=True):
            best = search.best()
            outcome = self._outcome
            if search.done:
                outcome = Outcome.STOP if best[0].by_token else Outcome.LENGTH
            # Of its first step; none of its workers has a time per output token.
            told = ledger and msgspec.structs.replace(ledger, decode_worker="")
            self._client.count(outcome, len(prompt.ids), sum(len(each.beam.tokens) for each in best), told)

    async def _step(self, deadline: float) -> None:
        """Every running beam goes on by one token."""
        received_s = self._received_s if self._first else time.monotonic()
        steps: list[_Step] = []
        with OutputReader(self._client, received_s, self._wishes.request_id, part=True) as reader:
            for index, (search, prompt) in enumerate(zip(self._searches, self._prompts, strict=True)):
                for beam in [] if search.done else search.running:
                    ids = np.concatenate([prompt.ids, np.array(beam.tokens, dtype=np.int32)])
                    steps.append(_Step(index, ids, extend_packed(prompt.hashes, ids)))
                    self._submit(reader, steps[-1], deadline)
                await asyncio.sleep(0)  # in between others have their turns
            await self._collect(reader, steps, deadline)
        self._first = False
        for index, search in enumerate(self._searches):
            if not search.done:
                search.advance([step.found for step in steps if step.owner == index and step.found is not None])
                await asyncio.sleep(0)

    def _submit(self, reader: OutputReader, step: "_Step", deadline: float) -> None:
        timeout_s = 0.0 if deadline == float("inf") else max(deadline - time.monotonic(), 1e-3)
        params = step_params(self._searches[step.owner])
        reader.submit(step.ids, params, step.hashes, self._wishes.priority, timeout_s)

    async def _collect(self, reader: OutputReader, steps: "list[_Step]", deadline: float) -> None:
        of_stream = list(steps)
        while reader.num_open:
            for stream, output in (await reader.next()).items():
                step, finished = of_stream[stream], output.finished
                if output.logprobs:
                    step.found = output.logprobs[0]
                if finished is None:
                    continue
                if finished.reject_code == RejectCode.QUEUE_FULL and not self._first:
                    # What has been found so far is not thrown away for others that came later.
                    await asyncio.sleep(finished.retry_after_s)
                    of_stream.append(step)
                    self._submit(reader, step, deadline)
                    continue
                if (error := outcome_error(finished)) is not None:
                    self._outcome = finished.outcome
                    raise error
                self._ledgers[step.owner] = self._ledgers[step.owner] or finished.ledger
        if any(step.found is None for step in steps):
            self._outcome = Outcome.FAILED
            raise unavailable("a beam's step ended without its token")


@dataclass(eq=False)
class _Step:
    """Of one beam."""

    owner: int
    """Index of the search."""
    ids: np.ndarray
    hashes: bytes
    found: TokenLogprobs | None = None


def new_search(params: SamplingParams, wishes: Wishes) -> BeamSearch:
    """The search that a request asks for, with the output tokens that its prompt leaves."""
    assert wishes.length_penalty is not None
    return BeamSearch(wishes.n, params.max_tokens, frozenset(params.stop_token_ids), wishes.length_penalty)


def step_params(search: BeamSearch) -> SamplingParams:
    """One step of one beam: the token that is drawn means nothing, its alternatives do."""
    return SamplingParams(max_tokens=1, temperature=0.0, logprobs=search.num_alternatives)


def beam_output(ended: Ended, wishes: Wishes, ledger: Ledger) -> Output:
    """As a stream that drew these tokens would have put it out."""
    beam, count = ended.beam, wishes.logprobs
    output = Output(tokens=list(beam.tokens))
    if count is not None:
        output.logprobs = [msgspec.structs.replace(entry, top=entry.top[:count]) for entry in beam.logprobs]
    outcome = Outcome.STOP if ended.by_token else Outcome.LENGTH
    output.finished = Finished((0, 0), outcome, ledger, len(beam.tokens))
    return output


class _NoStops:
    """A beam is over already."""

    def stop(self, _index: int) -> None:
        return None
