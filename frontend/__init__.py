"""Everything clients meet: the HTTP server, tokenising, streams, the offline LLM class and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.frontend.llm import LLM, BeamSearchParams, PoolingParams, SamplingParams

__all__ = ["LLM", "BeamSearchParams", "PoolingParams", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """LLM brings the whole engine with it: it is imported when it is asked for."""
    if name in __all__:
        from baton.frontend import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
