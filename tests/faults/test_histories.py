"""Histories too particular for chance, told step by step."""

from random import Random

import pytest
from sim.frontend import Call, Frontend
from sim.model import NOISE, OUTCOMES, Memory, Reference
from sim.network import Network
from sim.scheduler import Scheduler
from sim.worker import Worker, WorkerSpec
from sim.world import World

from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig, SchedulerConfig
from baton.proto.lifecycle import Outcome
from baton.proto.messages import SamplingParams

BLOCK_SIZE = 16


def spec(name: str, num_blocks: int) -> WorkerSpec:
    return WorkerSpec(
        name=name,
        role=name.split("-")[0],
        num_blocks=num_blocks,
        cache=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False),
        batch=BatchConfig(max_num_batched_tokens=256, max_num_seqs=8),
        lease=LeaseConfig(unbound_s=3.0, holder_s=1.5, renew_interval_s=0.3),
        early_bind_tokens=1000,
        max_model_len=9 * BLOCK_SIZE,
        step_s=0.01,
        copy_s=2.0,
        noisy=False,
    )


def call(rng: Random, tokens: int) -> Call:
    prompt = [rng.randrange(NOISE, NOISE * OUTCOMES) for _ in range(tokens)]
    return Call(prompt, SamplingParams(max_tokens=8), Reference(prompt, 8, BLOCK_SIZE))


class Split:
    """One prefill and one decode worker, a scheduler and a frontend, all there after a second."""

    def __init__(self, seed: int, prefill_blocks: int) -> None:
        self.world = World(seed)
        self.network = Network(self.world)
        self.network.conditions.dealers_keep = False
        memories: dict[str, Memory] = {}
        config = SchedulerConfig(endpoint="scheduler", heartbeat_timeout_s=60.0)
        self.scheduler = Scheduler(self.world, self.network, config)
        self.prefill = Worker(self.world, self.network, spec("prefill-0", prefill_blocks), memories)
        self.decode = Worker(self.world, self.network, spec("decode-0", num_blocks=40), memories)
        self.frontend = Frontend(self.world, self.network, "frontend-0")
        for process in (self.scheduler, self.prefill, self.decode, self.frontend):
            process.start()
        self.world.run(until=1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_that_slept_through_its_lease_does_not_decode_what_it_copied(seed: int) -> None:
    """The decode worker stands still in the middle of a copy. Meanwhile the lease expires, and the prefill worker,
    which can't tell the scheduler, computes the next prompt into the very blocks that are still being copied."""
    split = Split(seed, prefill_blocks=6)
    first, second = call(split.world.rng, 80), call(split.world.rng, 80)
    for request in (first, second):
        split.frontend.submit(request)
    split.world.run(until=1.1)
    assert split.decode.copying
    split.decode.pause()
    split.network.cut("scheduler", "prefill-0", seconds=8.0)
    split.world.run(until=6.0)
    split.decode.resume()
    split.world.run(until=60.0)
    assert first.outcome is second.outcome is Outcome.LENGTH
    assert first.attempts > 1


@pytest.mark.parametrize("seed", range(5))
def test_a_reader_whose_source_died_together_with_the_scheduler_gives_up_by_itself(seed: int) -> None:
    """The new scheduler adopts the decode leg and can't know that it waits for somebody who is no more."""
    split = Split(seed, prefill_blocks=40)
    request = call(split.world.rng, 80)
    sid = split.frontend.submit(request)
    split.world.run(until=1.1)
    assert split.decode.copying
    for process in (split.prefill, split.scheduler):
        process.kill()
        process.start()
    split.world.run(until=3.5)
    assert split.decode.batcher is not None
    assert (sid, 1) not in [(holding.sid, holding.attempt) for holding in split.decode.batcher.holdings()]
    split.world.run(until=60.0)
    assert request.outcome is Outcome.LENGTH
    assert request.attempts == 2
