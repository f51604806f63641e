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


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_that_slept_through_its_lease_does_not_decode_what_it_copied(seed: int) -> None:
    """The decode worker stands still in the middle of a copy. Meanwhile the lease expires, and the prefill worker,
    which can't tell the scheduler, computes the next prompt into the very blocks that are still being copied."""
    world, memories = World(seed), dict[str, Memory]()
    network = Network(world)
    network.conditions.dealers_keep = False
    scheduler = Scheduler(world, network, SchedulerConfig(endpoint="scheduler", heartbeat_timeout_s=60.0))
    prefill = Worker(world, network, spec("prefill-0", num_blocks=6), memories)
    decode = Worker(world, network, spec("decode-0", num_blocks=40), memories)
    frontend = Frontend(world, network, "frontend-0")
    for process in (scheduler, prefill, decode, frontend):
        process.start()
    world.run(until=1.0)
    first, second = call(world.rng, 80), call(world.rng, 80)
    for request in (first, second):
        frontend.submit(request)
    world.run(until=1.1)
    assert decode.copying
    decode.pause()
    network.cut("scheduler", "prefill-0", seconds=8.0)
    world.run(until=6.0)
    decode.resume()
    world.run(until=60.0)
    assert first.outcome is second.outcome is Outcome.LENGTH
    assert first.attempts > 1
