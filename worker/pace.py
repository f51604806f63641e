"""How long a step should take, judged by the steps before it: what the heartbeat compares a running one with."""

_LEAST_S = 0.5
"""No step is expected to be shorter: the first ones compile, and small ones are all fixed cost."""
_MEMORY = 0.9
"""A slow step is forgotten at this rate, so that one fast step does not make the next one look stuck."""


class Pace:
    """Seconds a token, from finished steps."""

    def __init__(self) -> None:
        self._seconds_per_token = 0.0

    def expected_s(self, tokens: int) -> float:
        """Of a step of so many tokens."""
        return max(_LEAST_S, self._seconds_per_token * tokens)

    def learn(self, tokens: int, took_s: float) -> None:
        """A step of so many tokens has ended."""
        self._seconds_per_token = max(took_s / tokens, self._seconds_per_token * _MEMORY)
