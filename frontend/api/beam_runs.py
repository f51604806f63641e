"""Beam searches of a request on the cluster: each step of each beam is a stream of one token.

The prefix cache makes it cheap: what a beam shares with the step before is found, block by block.
"""

import asyncio
import time

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
from baton.proto.lifecycle import Outcome
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

    async def finish(
        self, tokenizer: Tokenizer, plan: OutputPlan | None, deadline: float
    ) -> list[tuple[Choice, Delta]]:
        """The best outputs of each prompt, best first, as the choices of an answer whose text is read as `plan` says.
        `deadline` is on CLOCK_MONOTONIC, infinity for none. Raises ApiError."""
        while any(not search.done for search in self._searches):
            await self._step(deadline)
        done: list[tuple[Choice, Delta]] = []
        for index, search in enumerate(self._searches):
            for ended in search.best():
                ledger = self._ledgers[index] or Ledger()
                prompt, params = self._prompts[index], self._params[index]
                choice = Choice(len(done), prompt, params, self._wishes, tokenizer, plan)
                done.append((choice, choice.take(beam_output(ended, self._wishes, ledger), _NoStops())))
        return done

    async def _step(self, deadline: float) -> None:
        """Every running beam goes on by one token."""
        timeout_s = 0.0 if deadline == float("inf") else max(deadline - time.monotonic(), 1e-3)
        owners: list[int] = []
        with OutputReader(self._client, self._received_s, self._wishes.request_id) as reader:
            for index, (search, prompt) in enumerate(zip(self._searches, self._prompts, strict=True)):
                for beam in [] if search.done else search.running:
                    ids = np.concatenate([prompt.ids, np.array(beam.tokens, dtype=np.int32)])
                    hashes = extend_packed(prompt.hashes, ids)
                    reader.submit(ids, step_params(search), hashes, self._wishes.priority, timeout_s)
                    owners.append(index)
                await asyncio.sleep(0)  # in between others have their turns
            found = await self._collect(reader, owners)
        for index, search in enumerate(self._searches):
            if not search.done:
                search.advance([entry for owner, entry in zip(owners, found, strict=True) if owner == index])
                await asyncio.sleep(0)

    async def _collect(self, reader: OutputReader, owners: list[int]) -> list[TokenLogprobs]:
        found: dict[int, TokenLogprobs] = {}
        while reader.num_open:
            for stream, output in (await reader.next()).items():
                if output.logprobs:
                    found[stream] = output.logprobs[0]
                if output.finished is None:
                    continue
                if (error := outcome_error(output.finished)) is not None:
                    raise error
                self._ledgers[owners[stream]] = self._ledgers[owners[stream]] or output.finished.ledger
        if len(found) < len(owners):
            raise unavailable("a beam's step ended without its token")
        return [found[stream] for stream in range(len(owners))]


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
