"""An answer as a response: its items, the events that tell of them, and its end.

    queued ─► in_progress ─► completed | incomplete | failed | cancelled

The whole response is what its events add up to.
"""

import time
from collections.abc import Callable, Iterator

import msgspec
from msgspec import UNSET

from baton.frontend.api.blocks import Begins, Block, Blocks, Change, Ends, Grows, Kind, Logprobs
from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.responses import TokenLogprob
from baton.frontend.api.responses_api import objects
from baton.frontend.api.responses_api.items import new_id
from baton.frontend.api.responses_api.objects import ItemStatus, OutputItem, ResponsesResponse
from baton.proto.lifecycle import Outcome

_PREFIXES = {Kind.TEXT: "msg", Kind.REASONING: "rs", Kind.CALL: "fc"}
_CODES = {429: "rate_limit_exceeded"}
"""HTTP status -> code of a response's error; all others are the server's."""

_LAST: dict[objects.Status, Callable[[int, ResponsesResponse], object]] = {
    "completed": objects.Completed,
    "failed": objects.Failed,
}


class ResponseAnswer:
    """Follows one response."""

    def __init__(
        self, response: ResponsesResponse, with_ledger: bool, spell: Callable[[Logprobs], list[TokenLogprob]]
    ) -> None:
        """`response`: as it is before the first token. `spell` writes log probabilities down."""
        self._response = response
        self._with_ledger = with_ledger
        self._spell = spell
        self._blocks = Blocks()
        self._output: list[OutputItem] = []
        self._item_id = ""
        self._logprobs: list[TokenLogprob] = []
        """Of the text that began last, written down as it grows: at its end there would be seconds of work."""
        self._number = 0

    def snapshot(self) -> ResponsesResponse:
        """The response as it is now, with the items that are done."""
        return msgspec.structs.replace(self._response, output=[*self._output])

    def queue(self) -> list[object]:
        """Its first events when nobody waits for it."""
        return [self._state(objects.Created), self._state(objects.Queued)]

    def take(self, delta: Delta) -> list[object]:
        return [*self._begin(), *self._changed(self._blocks.take(delta))]

    def finish(self, delta: Delta, choice: Choice) -> list[object]:
        cut = delta.finish_reason == Outcome.LENGTH
        events = [*self._changed(self._blocks.end(), "incomplete" if cut else "completed")]
        output_tokens, prompt_len = choice.num_tokens, len(choice.prompt.ids)
        usage = objects.ResponseUsage(
            prompt_len,
            objects.InputTokensDetails(choice.cached_tokens),
            output_tokens,
            objects.OutputTokensDetails(choice.reasoning_tokens),
            prompt_len + output_tokens,
        )
        ledger = choice.ledger if self._with_ledger else UNSET
        self._response = msgspec.structs.replace(self._response, usage=usage, baton_ledger=ledger)
        if cut:
            return [
                *events,
                *self._end("incomplete", incomplete_details=objects.IncompleteDetails("max_output_tokens")),
            ]
        return [*events, *self._end("completed", completed_at=int(time.time()))]

    def fail(self, error: ApiError) -> list[object]:
        code, message = _CODES.get(error.status, "server_error"), error.body.error.message
        return self._broken_off("failed", error=objects.ResponseError(code, message))

    def cancel(self) -> list[object]:
        """Its end, because the client has asked for it or has gone."""
        return self._broken_off("cancelled")

    def _begin(self) -> list[object]:
        if self._number and self._response.status != "queued":
            return []
        created = [] if self._number else [self._state(objects.Created)]
        self._response = msgspec.structs.replace(self._response, status="in_progress")
        return [*created, self._state(objects.InProgress)]

    def _broken_off(self, status: objects.Status, **fields: object) -> list[object]:
        return [*self._changed(self._blocks.end(), "incomplete"), *self._end(status, **fields)]

    def _end(self, status: objects.Status, **fields: object) -> list[object]:
        self._response = msgspec.structs.replace(self._response, status=status, **fields)
        return [self._state(_LAST.get(status, objects.Incomplete))]

    def _state(self, kind: Callable[[int, ResponsesResponse], object]) -> object:
        return kind(self._next(), self.snapshot())

    def _next(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def _changed(self, changes: Iterator[Change], status: ItemStatus = "completed") -> Iterator[object]:
        """`status`: of an item that ends."""
        for change in changes:
            match change:
                case Begins(block):
                    yield from self._begins(block)
                case Grows(block, text, logprobs):
                    yield self._grows(block, text, logprobs)
                case Ends(block):
                    yield from self._ends(block, status)

    def _begins(self, block: Block) -> Iterator[object]:
        self._item_id, self._logprobs = new_id(_PREFIXES[block.kind]), []
        yield objects.ItemAdded(self._next(), block.index, self._item(block, "in_progress", whole=False))
        if block.kind is Kind.TEXT:
            yield objects.PartAdded(self._next(), self._item_id, block.index, 0, objects.OutputText("", []))
        elif block.kind is Kind.REASONING:
            yield objects.PartAdded(self._next(), self._item_id, block.index, 0, objects.ReasoningText(""))

    def _grows(self, block: Block, text: str, logprobs: Logprobs) -> object:
        number, id, index = self._next(), self._item_id, block.index
        match block.kind:
            case Kind.TEXT:
                spelled = self._spell(logprobs)
                self._logprobs += spelled
                return objects.TextDelta(number, id, index, 0, text, spelled)
            case Kind.REASONING:
                return objects.ReasoningDelta(number, id, index, 0, text)
            case Kind.CALL:
                return objects.ArgumentsDelta(number, id, index, text)

    def _ends(self, block: Block, status: ItemStatus) -> Iterator[object]:
        item, id, index = self._item(block, status), self._item_id, block.index
        match item:
            case objects.OutputMessage(content=[part]):
                yield objects.TextDone(self._next(), id, index, 0, part.text, part.logprobs)
                yield objects.PartDone(self._next(), id, index, 0, part)
            case objects.ReasoningItem(content=[part]):
                yield objects.ReasoningDone(self._next(), id, index, 0, part.text)
                yield objects.PartDone(self._next(), id, index, 0, part)
            case objects.FunctionCall(name=name, arguments=arguments):
                yield objects.ArgumentsDone(self._next(), id, index, name, arguments)
        self._output.append(item)
        yield objects.ItemDone(self._next(), index, item)

    def _item(self, block: Block, status: ItemStatus, whole: bool = True) -> OutputItem:
        """`whole`: with its content."""
        id = self._item_id
        match block.kind:
            case Kind.TEXT:
                texts = [objects.OutputText(block.text, self._logprobs)] if whole else []
                return objects.OutputMessage(id=id, content=texts, status=status)
            case Kind.REASONING:
                thoughts = [objects.ReasoningText(block.text)] if whole else []
                return objects.ReasoningItem(id=id, content=thoughts, status=status)
            case Kind.CALL:
                arguments = block.text if whole else ""
                return objects.FunctionCall(
                    id=id, call_id=block.call_id, name=block.name, arguments=arguments, status=status
                )
