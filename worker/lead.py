"""When a step is planned: shortly before the device has nothing left to do.

    device  ├──── step n ────┼──── step n+1 ────┤
    planned                ▲ n+1
                           └ lead: what planning and launching take, and by how much the end of step n is misjudged

A prompt that comes while step n runs is in step n+1. Planned at once, when step n-1 ended, n+1 would be without it. How
long the lead must be is learned: a launch that came late makes it longer at once, those in time shorter by and by.

Where only prompts are computed a step is planned at once, but not in the way of those who read what the last one has
computed: a launch of prompts takes the loop several times as long as a handoff.
"""

_LEAST_S, _MOST_S = 0.002, 0.1
ANSWERS_S = 0.008
"""Whoever reads a prompt's KV has said Confirm within so long of its last step, unless there is no room there."""
LAUNCH_S = 0.015
"""What a step of thousands of prompt tokens takes to be launched, kernel by kernel; the loop hears nobody meanwhile."""
_MARGIN_S = 0.002
"""A launch is late when it begins less than this before the device needs it: what a mixed step takes to be launched."""
_LONGER_S, _SHORTER_S = 0.001, 0.00002
"""So one launch in fifty is late when the lead has settled."""


class Lead:
    """Knows when the steps in flight should end."""

    def __init__(self) -> None:
        self.lead_s = 2 * _LEAST_S
        self._ends_at = 0.0
        self._last_ended = 0.0

    @property
    def plan_at(self) -> float:
        """When the step behind those in flight is to be planned."""
        return self._ends_at - self.lead_s

    def answers_until(self, since: float) -> float:
        """Until when its launch leaves the loop to readers of prompts that were computed at `since`."""
        return min(since + ANSWERS_S, self._ends_at - LAUNCH_S)

    def planned(self, now: float, expected_s: float) -> None:
        """A step that should take so long will be launched."""
        self._ends_at = max(now, self._ends_at) + expected_s

    def ended(self, started: float, at: float, followed: bool, still_s: float) -> None:
        """A step, launched at `started`, has ended; the steps in flight should take `still_s`.

        `followed`: it was planned while another was in flight, so the device could have gone on without a pause.
        """
        if followed:
            late = started > self._last_ended - _MARGIN_S
            self.lead_s = min(self.lead_s + _LONGER_S, _MOST_S) if late else max(self.lead_s - _SHORTER_S, _LEAST_S)
        self._last_ended = at
        self._ends_at = at + still_s
