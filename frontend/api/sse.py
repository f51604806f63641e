"""Server-sent events of a streamed answer."""

from msgspec import UNSET

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.formats import Format, UsageField
from baton.frontend.api.requests import StreamOptions
from baton.frontend.api.responses import Usage, encode

DONE = b"data: [DONE]\n\n"
_TEXT = "\ue000text\ue001"
"""Stands for the text of a chunk that is rendered in advance."""


def event(body: object) -> bytes:
    """One event."""
    return b"data: " + encode(body) + b"\n\n"


def named_event(body: object) -> bytes:
    """One event with its name, which is the tag of its struct."""
    name: str = body.__struct_config__.tag  # type: ignore[attr-defined]
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(body))


class ChunkWriter:
    """Writes deltas down as chunks of one answer.

    Chunks that bring nothing but text are equal up to that text: what stands around it is rendered once per choice.
    """

    def __init__(self, format: Format, options: StreamOptions, plain: bool) -> None:
        """`plain`: chunks before the last one bring nothing but text, as far as the request is concerned."""
        self._format = format
        self._continuous_usage = bool(options.continuous_usage_stats)
        self._usage: UsageField = None if options.include_usage else UNSET
        self._plain = plain and not self._continuous_usage
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, choice: Choice, delta: Delta, first: bool) -> bytes:
        """The event, or events, of a delta; `first` is the first of its choice."""
        if not self._plain or first or delta.finish_reason is not None:
            return self._render(choice, delta, first)
        around = self._around.get(choice.index)
        if around is None:
            head, _, tail = self._render(choice, Delta(_TEXT), False).rpartition(encode(_TEXT))
            around = self._around[choice.index] = head, tail
        return around[0] + encode(delta.text) + around[1]

    def _render(self, choice: Choice, delta: Delta, first: bool) -> bytes:
        usage = self._usage
        if self._continuous_usage:
            prompt_len = len(choice.prompt.ids)
            usage = Usage(prompt_len, prompt_len + choice.num_tokens, choice.num_tokens)
        return b"".join([event(chunk) for chunk in self._format.chunks(choice, delta, first, usage)])
