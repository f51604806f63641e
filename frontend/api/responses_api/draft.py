"""A response before its first token: what was asked for, with the defaults that took effect."""

import time

from baton.frontend.api.responses_api.objects import ResponsesResponse
from baton.frontend.api.responses_api.requests import ReasoningConfig, ResponsesRequest, TextConfig, TextFormat
from baton.frontend.model_info import ModelInfo
from baton.proto.messages import SamplingParams


def new_response(id: str, wanted: ResponsesRequest, sampling: SamplingParams, info: ModelInfo) -> ResponsesResponse:
    """Queued in the background, otherwise in progress."""
    text = wanted.text or TextConfig()
    return ResponsesResponse(
        id=id,
        created_at=int(time.time()),
        status="queued" if wanted.background else "in_progress",
        background=wanted.background,
        instructions=wanted.instructions,
        max_output_tokens=wanted.max_output_tokens,
        max_tool_calls=wanted.max_tool_calls,
        metadata=wanted.metadata or {},
        model=wanted.model or info.names[0],
        output=[],
        parallel_tool_calls=wanted.parallel_tool_calls,
        previous_response_id=wanted.previous_response_id,
        prompt_cache_key=wanted.prompt_cache_key,
        reasoning=wanted.reasoning or ReasoningConfig(),
        safety_identifier=wanted.safety_identifier,
        store=wanted.store,
        temperature=sampling.temperature,
        text=TextConfig(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
        tool_choice="auto" if wanted.tool_choice is None else wanted.tool_choice,
        tools=wanted.tools or [],
        top_logprobs=wanted.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=wanted.truncation or "disabled",
        user=wanted.user,
    )
