"""An answer as a message: its blocks, the events that tell of them, and its end."""

import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET

from baton.frontend.api.blocks import Begins, Block, Blocks, Change, Ends, Grows, Kind
from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.messages import objects
from baton.frontend.api.messages.errors import of_error
from baton.proto.lifecycle import Outcome


class MessageAnswer:
    """Follows one message."""

    def __init__(self, model: str, prompt_len: int, fills_context: bool, with_ledger: bool) -> None:
        """`fills_context`: the limit of its length is the end of the context, not max_tokens."""
        self.message = objects.Message(
            id=f"msg_{uuid.uuid4().hex}", content=[], model=model, usage=_usage(prompt_len, 0, 0, 0)
        )
        """Whole once `finish` has been called."""
        self._fills_context = fills_context
        self._with_ledger = with_ledger
        self._blocks = Blocks()
        self._content: list[objects.Block] = []
        self._begun = False

    def take(self, delta: Delta) -> list[object]:
        first = [] if self._begun else [objects.MessageStart(self.message)]
        self._begun = True
        return [*first, *self._changed(self._blocks.take(delta))]

    def finish(self, delta: Delta, choice: Choice) -> list[object]:
        events = [*self._changed(self._blocks.end())]
        end = objects.StopDelta(*self._reason(delta))
        prompt_len = len(choice.prompt.ids)
        usage = _usage(prompt_len, choice.cached_tokens, choice.num_tokens, choice.reasoning_tokens)
        ledger = choice.ledger if self._with_ledger else UNSET
        self.message = msgspec.structs.replace(
            self.message,
            content=self._content,
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=usage,
            baton_ledger=ledger,
        )
        return [*events, objects.MessageDelta(end, usage, ledger), objects.MessageStop()]

    def fail(self, error: ApiError) -> list[object]:
        return [of_error(error)]

    def _reason(self, delta: Delta) -> tuple[objects.StopReason, str | None]:
        if delta.finish_reason == Outcome.LENGTH:
            return "model_context_window_exceeded" if self._fills_context else "max_tokens", None
        if isinstance(delta.stop_reason, str):
            return "stop_sequence", delta.stop_reason
        used = any(isinstance(block, objects.ToolUseBlock) for block in self._content)
        return "tool_use" if used else "end_turn", None

    def _changed(self, changes: Iterator[Change]) -> Iterator[object]:
        for change in changes:
            match change:
                case Begins(block):
                    yield objects.BlockStart(block.index, _written(block, {}))
                case Grows(block, text):
                    yield objects.BlockDelta(block.index, _DELTAS[block.kind](text))
                case Ends(block):
                    self._content.append(_written(block, _input(block)))
                    yield objects.BlockStop(block.index)


_DELTAS: dict[Kind, Any] = {
    Kind.TEXT: objects.TextDelta,
    Kind.REASONING: objects.ThinkingDelta,
    Kind.CALL: objects.InputJsonDelta,
}


def _written(block: Block, input: Any) -> objects.Block:
    match block.kind:
        case Kind.TEXT:
            return objects.TextBlock(block.text)
        case Kind.REASONING:
            return objects.ThinkingBlock(block.text)
        case Kind.CALL:
            return objects.ToolUseBlock(block.call_id, block.name, input)


def _input(block: Block) -> Any:
    """A call's arguments; empty when they are cut off or were never JSON."""
    try:
        return msgspec.json.decode(block.text) if block.kind is Kind.CALL else {}
    except (msgspec.DecodeError, RecursionError):
        return {}


def _usage(prompt_len: int, cached: int, output: int, thinking: int) -> objects.MessageUsage:
    return objects.MessageUsage(
        input_tokens=prompt_len - cached,
        cache_read_input_tokens=cached,
        output_tokens=output,
        output_tokens_details=objects.OutputTokensDetails(thinking),
    )
