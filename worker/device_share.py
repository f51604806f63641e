"""Workers that take turns on one device let each other know of prompts on it, and decode steps give way to them.

    steps with prompts begin, end ─► Prompts(since) ─► keeper ─► Prompts(since) to the other workers

Processes share a GPU in slices of time, as many for each. Decode steps one right behind the other would leave prompts
half of it for as long as streams run. So beside another worker's prompts a decode step begins as late as it may to end
in time, PATIENCE targets after the one before it. That leaves prompts about 60 %, and streams lose nothing over all:
the sooner prompts are gone, the sooner steps are short again. Beside prompts that have become OLD one step in
STEPS_A_PAUSE may end PAUSE targets after the one before, which leaves them nine tenths; so few do not show in the 99th
percentile.
"""

from baton.proto.messages import Prompts

PATIENCE, PAUSE = 1.25, 6
OLD = 8
"""Targets since the prompt came."""
STEPS_A_PAUSE, MOST_PAUSES = 500, 2
"""The second: as many as may be saved up."""
SLOWER = 2.2
"""A decode step beside prompts takes so many times as long."""


class DeviceShare:
    """What this worker knows of the others and they of it."""

    def __init__(self, target_s: float, shared: bool) -> None:
        self._target_s = target_s
        self.shared = shared
        """Whether there are others, and slices of time."""
        self._said: float | None = None
        self.prompts_since: float | None = None
        """When the oldest prompt came that another worker's steps compute; None without one."""
        self._ended_s = 0.0
        self._pauses = float(MOST_PAUSES)
        self._paused = False

    def news(self, since: float | None) -> Prompts | None:
        """What the others must hear, now that the oldest prompt in this worker's steps came at `since`."""
        if since == self._said:
            return None
        self._said = since
        return Prompts(since)

    def step_ended(self, at: float) -> None:
        """One of this worker's."""
        self._ended_s, self._paused = at, False
        self._pauses = min(self._pauses + 1 / STEPS_A_PAUSE, MOST_PAUSES)

    def begins_at(self, step_s: float, now: float) -> float:
        """When the next decode step, of `step_s`, should begin."""
        if self.prompts_since is None:
            self._paused = False
            return now
        old = now - self.prompts_since > OLD * self._target_s
        if old and not self._paused and self._pauses >= 1 and now - self._ended_s < PATIENCE * self._target_s:
            self._paused = True
            self._pauses -= 1
        return self._ended_s + (PAUSE if self._paused else PATIENCE) * self._target_s - SLOWER * step_s
