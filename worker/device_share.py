"""Workers that take turns on one device let each other know of prompts on it, and decode steps give way to them.

    steps with prompts begin, end ─► Prompts(since) ─► keeper ─► Prompts(since) to the other workers

Processes share a GPU in slices of time, as many for each. Decode steps one right behind the other would leave prompts
half of it for as long as streams run. So beside another worker's prompts a decode step begins as late as it may to end
in time: PATIENCE targets after the one before it, or MOST_HURRY once the oldest of those prompts is OLD. That leaves
prompts about two thirds, and costs streams nothing: once the prompts are gone, steps are short again.
"""

from baton.proto.messages import Prompts
from baton.worker.step_costs import MOST_HURRY

PATIENCE = 1.4
OLD = 8
"""Targets since the prompt came."""
SLOWER = 2.2
"""A decode step beside prompts takes so many times as long."""


class DeviceShare:
    """What this worker knows of the others and they of it. `shared`: whether there are others, and slices of time."""

    def __init__(self, target_s: float, shared: bool) -> None:
        self._target_s = target_s
        self._shared = shared
        self._said: float | None = None
        self.prompts_since: float | None = None
        """When the oldest prompt came that another worker's steps compute; None without one."""

    def news(self, since: float | None) -> Prompts | None:
        """What the others must hear, now that the oldest prompt in this worker's steps came at `since`."""
        if not self._shared or since == self._said:
            return None
        self._said = since
        return Prompts(since)

    def begins_at(self, last_s: float, step_s: float, now: float) -> float:
        """When a decode step of `step_s` should begin; the one before it ended at `last_s`."""
        if self.prompts_since is None:
            return now
        old = now - self.prompts_since > OLD * self._target_s
        return last_s + (MOST_HURRY if old else PATIENCE) * self._target_s - SLOWER * step_s
