"""How many prompt tokens a step may take beside running streams, so that those keep their pace.

A step costs about base + tokens * slope seconds: base for its decode rows, slope for each prompt token beside them.
Both are learned from the steps that have ended. With a target for the time between two tokens, a step's prompt tokens
are what is left of it; with no stream running, or no target, a step may be as large as its budget.
"""

SMOOTHING = 0.3
"""Weight of a new observation."""
SMALLEST_CHUNK = 128
"""Prompts go on with at least so many tokens a step, whatever the target says: they must end too."""
LEARN_FROM = 64
"""Steps with fewer prompt tokens say little about the cost of one."""


class StepBudget:
    """`max_tokens` is the step's budget in tokens, `target_s` the time between two tokens to keep; 0 is none."""

    def __init__(self, max_tokens: int, target_s: float) -> None:
        self._max_tokens = max_tokens
        self._target_s = target_s
        self._base_s = 0.0
        self._slope_s = 0.0

    def tokens(self, num_decodes: int) -> int:
        """For a step with so many decode rows; they are part of it."""
        if not self._target_s or not num_decodes:
            return self._max_tokens
        if not self._slope_s:
            return min(self._max_tokens, num_decodes + 4 * SMALLEST_CHUNK)  # nothing learned yet: carefully
        fitting = int((self._target_s - self._base_s) / self._slope_s)
        return min(self._max_tokens, num_decodes + max(fitting, SMALLEST_CHUNK))

    def observe(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        """What a step has cost."""
        if num_decodes and not prompt_tokens:
            self._base_s = _towards(self._base_s, seconds)
        elif prompt_tokens >= LEARN_FROM:
            base_s = self._base_s if num_decodes else 0.0
            self._slope_s = _towards(self._slope_s, max(seconds - base_s, 0.0) / prompt_tokens)


def _towards(old: float, new: float) -> float:
    return new if not old else old + SMOOTHING * (new - old)
