"""Batchers side by side without sockets or tensors: a virtual clock, steps that end when the test says so."""

from collections import deque
from collections.abc import Callable

import numpy as np

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.messages import Message, Peer, PrefillDone, SamplingParams, Sid, StartDecode, StartPrefill
from baton.worker import effects
from baton.worker.batcher import Batcher
from baton.worker.plan import StepPlan, StepResult
from baton.worker.step_costs import StepCosts

BLOCK = 16
Tokens = list[int]


def sid(n: int) -> Sid:
    return (1, n)


class Bench:
    """One batcher, its clock, and a device that samples `token_of(position)`; its vectors say what they are made of."""

    def __init__(
        self,
        name: str = "worker-0",
        incarnation: int = 1,
        num_blocks: int = 64,
        budget: int = 64,
        max_num_seqs: int = 8,
        depth: int = 1,
        early_bind_tokens: int = 10**6,
        caching: bool = True,
        target_itl_ms: float = 0.0,
        prompts_first: bool = False,
        costs: StepCosts | None = None,
        token_of: Callable[[int], int] = lambda position: 1000 + position,
        first_block: int = 0,
        shared_pool: str = "",
        shares_device: bool = False,
        max_model_len: int = 4096,
    ) -> None:
        self.now = 100.0
        self.me = Peer(name, incarnation, f"ipc://{name}", f"shm:{name}", shared_pool)
        self.token_of = token_of
        self.batcher = Batcher(
            self.me,
            range(first_block, first_block + num_blocks),
            max_model_len=max_model_len,
            cache=CacheConfig(block_size=BLOCK, num_blocks=num_blocks, enable_prefix_caching=caching),
            batch=BatchConfig(budget, max_num_seqs, target_itl_ms, prompts_first, depth),
            lease=LeaseConfig(),
            early_bind_tokens=early_bind_tokens,
            costs=costs,
            shares_device=shares_device,
        )
        self.in_flight: deque[StepPlan] = deque()
        self.pooled: dict[int, int] = {}
        """Slot -> tokens pooled since its stream began."""
        self.cmd_seq = 0
        self.frames: dict[Sid, tuple[bytes, bytes]] = {}

    def handle(
        self, message: Message | PullDone | effects.Compiled, frames: tuple[bytes, ...] = ()
    ) -> list[effects.Effect]:
        self.batcher.handle(message, frames, self.now)  # type: ignore[arg-type]
        return self.take()

    def take(self) -> list[effects.Effect]:
        out = list(self.batcher.outbox)
        self.batcher.outbox.clear()
        return out

    def prefill(
        self,
        n: int,
        prompt: Tokens,
        max_tokens: int = 4,
        hand_over: bool = False,
        attempt: int = 1,
        prompt_len: int = 0,
        salt: str = "",
        priority: int = 0,
        **params: object,
    ) -> list[effects.Effect]:
        self.cmd_seq += 1
        tokens = np.asarray(prompt, dtype=np.int32)
        command = StartPrefill(
            epoch=1,
            cmd_seq=self.cmd_seq,
            sid=sid(n),
            attempt=attempt,
            prompt_len=prompt_len or len(prompt),
            params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
            reply_to="ipc://frontend",
            continue_decode=not hand_over,
            priority=priority,
        )
        self.frames[sid(n)] = (tokens.tobytes(), pack_hashes(hash_chain(tokens, *([salt] if salt else []))))
        return self.handle(command, self.frames[sid(n)])

    def decode(
        self,
        owner: "Bench",
        done: PrefillDone,
        max_tokens: int = 4,
        early: bool = False,
        priority: int = 0,
        **params: object,
    ) -> list[effects.Effect]:
        self.cmd_seq += 1
        frames = owner.frames[done.sid]
        command = StartDecode(
            epoch=1,
            cmd_seq=self.cmd_seq,
            sid=done.sid,
            attempt=done.attempt,
            prompt_len=len(frames[0]) // 4,
            params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
            reply_to="ipc://frontend",
            lease=done.lease,
            owner=owner.me,
            num_tokens=done.num_tokens,
            blocks=done.blocks,
            first_rows=None if early else done.first_rows,
            priority=priority,
        )
        return self.handle(command, frames)

    def launch(self) -> StepPlan | None:
        plan = self.batcher.schedule(self.now)
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def finish(self, after_s: float = 0.01) -> list[effects.Effect]:
        """The oldest step's result arrives."""
        plan = self.in_flight.popleft()
        self.now += after_s
        tokens = [[self.token_of(row.start + row.num_tokens)] if row.samples else [] for row in plan.rows]
        self.pooled |= dict.fromkeys([init.slot for init in plan.new_slots], 0)
        for row in plan.rows:
            self.pooled[row.slot] += row.pools
        vectors = {
            index: b"%d of %d" % (self.pooled[row.slot], row.mean_of)
            for index, row in enumerate(plan.rows)
            if row.mean_of
        }
        result = StepResult(plan.step, tokens, {}, self.now - after_s, self.now, vectors=vectors)
        self.batcher.complete(result, self.now)
        return self.take()

    def step(self) -> list[effects.Effect]:
        return self.finish() if self.launch() else self.take()

    def run(self, limit: int = 200) -> list[effects.Effect]:
        """Step until nothing can run."""
        out: list[effects.Effect] = []
        for _ in range(limit):
            while self.launch():
                pass
            if not self.in_flight:
                return out + self.take()
            out += self.finish()
        raise AssertionError("the batcher does not come to rest")


def rows(out: list[effects.Effect], n: int) -> list[effects.Emit]:
    return [effect for effect in out if isinstance(effect, effects.Emit) and effect.sid == sid(n)]


def tokens(out: list[effects.Effect], n: int) -> Tokens:
    return [token for row in rows(out, n) for token in row.tokens]


def to_scheduler(out: list[effects.Effect], kind: type) -> list[Message]:
    return [x.message for x in out if isinstance(x, effects.ToScheduler) and isinstance(x.message, kind)]


def carry(reader: Bench, owner: Bench, out: list[effects.Effect]) -> list[effects.Effect]:
    """Run the handoff's traffic between two benches until it falls silent; what else came out is returned."""
    rest: list[effects.Effect] = []
    queue = deque((reader, effect) for effect in out)
    while queue:
        bench, effect = queue.popleft()
        match effect:
            case effects.ToOwner():
                queue += [(owner, e) for e in owner.handle(effect.message)]
            case effects.ToHolder():
                queue += [(reader, e) for e in reader.handle(effect.message)]
            case Pull():
                queue += [(bench, e) for e in bench.handle(PullDone(effect.transfer, ok=True, transport="shm"))]
            case _:
                rest.append(effect)
    return rest
