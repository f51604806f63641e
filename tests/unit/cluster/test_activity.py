"""The line that says what the cluster does."""

import logging

import msgspec
import pytest

from baton.proto.messages import Load
from baton.scheduler_proc.activity import Activity


def test_tokens_of_before_a_restart_of_the_scheduler_are_not_counted(
    bench, idle: Load, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton")
    activity = Activity(bench.cluster, 10.0)
    activity.tick(bench.now)
    worker = bench.worker("unified-0")
    busy = msgspec.structs.replace(idle, running=1)
    for generated, said in ((5000, "0.0 tokens/s, 1 running"), (5300, "30.0 tokens/s, 1 running")):
        bench.tell(worker, msgspec.structs.replace(busy, generated_tokens=generated))
        bench.frontend()
        bench.submit(generated)
        bench.now += 10.0
        activity.tick(bench.now)
        assert caplog.messages[-1].startswith(said)
