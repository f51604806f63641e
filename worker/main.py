"""The worker process: load the model once, then serve, one incarnation after the other."""

import logging
import time

from baton.proto.channels import LINGER_MS
from baton.proto.config import WorkerConfig
from baton.proto.network import open_network
from baton.proto.supervision import Supervised, run_child
from baton.worker.backend import backend_class, open_backend
from baton.worker.device import Device
from baton.worker.session import Session

log = logging.getLogger(__name__)


def main(config: WorkerConfig, supervised: Supervised) -> int:
    """Serve until SIGTERM. An exception in a step ends the process: its launcher starts another."""
    started = time.monotonic()
    backend = open_backend(config)
    log.info(
        "%s loaded in %.1f s; KV pool of %d blocks, %d tokens",
        config.model.served_names[0],
        time.monotonic() - started,
        backend.num_blocks,
        backend.num_blocks * config.cache.block_size,
    )
    device = Device(backend.launch)
    network = open_network(config.network)
    try:
        again = True
        while again:
            session = Session(backend, device, network, supervised)
            try:
                again = session.run()
            finally:
                session.close()
    finally:
        device.close()
        network.close(LINGER_MS)
        backend.close()
    return 0


if __name__ == "__main__":
    run_child(main, WorkerConfig, prepare=backend_class)
