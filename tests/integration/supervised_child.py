"""A program that speaks the child's side of supervision; the environment says how it behaves."""

import os
import select
import sys
from pathlib import Path

from baton.proto.config import SchedulerConfig
from baton.proto.errors import UserError
from baton.proto.supervision import Supervised, run_child


def main(config: SchedulerConfig, supervised: Supervised) -> int:
    """BEHAVIOUR: serve | renew (ready twice) | stubborn | fail | fail_by_user | either of these + _after_restart."""
    behaviour = os.environ["BEHAVIOUR"]
    marker = Path(config.endpoint)
    starts = int(marker.read_text() or 0) if marker.exists() else 0
    marker.write_text(str(starts + 1))
    if behaviour == "fail" or (behaviour == "fail_after_restart" and starts > 0):
        raise ValueError(f"cannot work, start {starts + 1}")
    if behaviour == "fail_by_user" or (behaviour == "fail_by_user_after_restart" and starts > 0):
        raise UserError("this flag is wrong")
    say(f"{config.name} {os.getpid()}")
    supervised.ready()
    if behaviour == "renew":
        supervised.ready()
    while behaviour == "stubborn" or not supervised.stopping:
        select.select([supervised.stop_fd], [], [])
        if behaviour == "stubborn":
            select.select([], [], [])
    say(f"{config.name} stopped")
    return 0


def say(line: str) -> None:
    """One write, so that lines of several processes don't mix even when Python's output is unbuffered."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(run_child(main, SchedulerConfig))
