"""A worker without a model, for scripts/bench_frontend.py: everything is real but the device, whose steps take no time.

    instant_worker.py STEPS_PER_SECOND --config FILE --supervisor-fd N

At 0 steps per second it goes as fast as it can. The tokens are those of an English text, over and over, so that
detokenising costs what it costs.
"""

import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

from baton.frontend.tokenizer import load_tokenizer
from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.sink import PeerSink
from baton.kv_transfer.source import PeerSource
from baton.proto.channels import LINGER_MS
from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.layout import Group, KVLayout
from baton.proto.network import Network, open_network
from baton.proto.supervision import Supervised, run_child
from baton.worker.backend import Backend, fill_batch
from baton.worker.blocks import Blocks
from baton.worker.device import Device
from baton.worker.grammar_compiler import GrammarCompiler
from baton.worker.plan import StepPlan, StepResult
from baton.worker.session import Session

TEXT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
NUM_BLOCKS = 65536
MAX_MODEL_LEN = 8192
OWN = BatchConfig(max_num_batched_tokens=8192, max_num_seqs=1024, target_itl_ms=0.0, depth=2)
"""As on a GPU."""
VECTOR = array("f", [0.5] * 4096).tobytes()
"""What every prompt's hidden states are pooled to."""


class Runner:
    """Executes steps by looking tokens up."""

    def __init__(self, tokens: list[int], step_s: float) -> None:
        self._tokens = tokens
        self._step_s = step_s
        self._next_s = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        """The step's tokens, `step_s` after those of the step before."""
        started = time.monotonic()
        self._next_s = max(self._next_s + self._step_s, started)
        time.sleep(self._next_s - started)
        tokens = [[self._token(row.slot + row.output_index)] if row.samples else [] for row in plan.rows]
        vectors = {index: VECTOR for index, row in enumerate(plan.rows) if row.mean_of}
        return StepResult(plan.step, tokens, {}, started, time.monotonic(), vectors=vectors)

    def _token(self, index: int) -> int:
        return self._tokens[index % len(self._tokens)]


class InstantBackend(Backend):
    """Blocks without bytes."""

    def __init__(self, config: WorkerConfig, steps_per_s: float) -> None:
        self.config = fill_batch(config, OWN)
        self.max_model_len, self.num_blocks, self.pool_blocks = MAX_MODEL_LEN, NUM_BLOCKS, NUM_BLOCKS
        self.blocks = Blocks(NUM_BLOCKS)
        group = Group("full", 1, config.cache.block_size, 64, ("token",), (16,), "float32")
        self.layout = KVLayout("instant", (group,))
        tokens = load_tokenizer(config.model).encode(TEXT.read_text(), add_special_tokens=False)
        self.grammars = GrammarCompiler(config.model, vocab_size=max(tokens) + 1)
        self._runner = Runner(tokens, 1 / steps_per_s if steps_per_s else 0.0)

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        return partial(self._runner.execute, plan)

    def open_transport(self, path: Path, greeting: Greeting, network: Network) -> tuple[Source, Sink]:
        return PeerSource(path, greeting, (), -1, network), PeerSink(greeting, (), network)

    def close(self) -> None:
        self.grammars.close()


def main(config: WorkerConfig, supervised: Supervised, steps_per_s: float) -> int:
    """One incarnation, until SIGTERM."""
    backend = InstantBackend(config, steps_per_s)
    device = Device(backend.launch)
    network = open_network(config.network)
    session = Session(backend, device, network, supervised)
    session.run()
    session.close()
    device.close()
    network.close(LINGER_MS)
    backend.close()
    return 0


if __name__ == "__main__":
    steps = float(sys.argv.pop(1))
    run_child(partial(main, steps_per_s=steps), WorkerConfig)
