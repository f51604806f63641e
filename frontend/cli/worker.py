"""Start one worker for a running `baton serve` on this host or another; it rejoins when the scheduler restarts."""

import argparse
import asyncio
import logging
import re
import secrets
import socket
import sys

from baton.frontend.cli import engine_args, network_args, sizing
from baton.frontend.launcher import Launcher
from baton.frontend.processes import worker_spec
from baton.frontend.run_dir import RunDir
from baton.proto.address import is_local
from baton.proto.config import WorkerConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role
from baton.proto.supervision import name_process

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton worker`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; the command line wins")
    parser.add_argument("--role", choices=[role.value for role in Role], help="what the scheduler sends it")
    parser.add_argument(
        "--scheduler",
        type=endpoint,
        metavar="ENDPOINT",
        help="the scheduler's: ipc:///run/…/scheduler on this host, tcp://HOST:PORT as `baton serve --listen` has it",
    )
    parser.add_argument(
        "--host", default="", metavar="IP", help="where others reach this worker; default: towards a tcp:// scheduler"
    )
    network_args.add_key_argument(parser)
    parser.add_argument(
        "--name",
        type=name,
        default=None,
        help="unique in the cluster; default: from role, host unless it is this one, and a random number",
    )
    engine_args.add_model_arguments(parser)
    engine_args.add_worker_arguments(parser)
    engine_args.add_kv_transfer_arguments(parser)


def name(text: str) -> str:
    """Of a worker: files and sockets are called so."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}", text):
        raise argparse.ArgumentTypeError(f"expected 1 to 48 letters, digits, '.', '_' and '-', got {text[:80]!r}")
    return text


def endpoint(text: str) -> str:
    """A scheduler's."""
    if text.startswith("tcp://"):
        return network_args.tcp(text)
    if not text.removeprefix("ipc://") or not text.startswith("ipc://"):
        kinds = "ipc:///run/…/scheduler or tcp://10.0.0.5:5555"
        raise argparse.ArgumentTypeError(f"expected an endpoint such as {kinds}, got {text!r}")
    return text


def run(args: argparse.Namespace) -> int:
    """Start the worker and keep it running; the exit code."""
    if not args.role or not args.scheduler:
        raise UserError("--role and --scheduler are needed: what this worker does, and for whom")
    engine_args.check_kv_transfer(args, [Role(args.role)])
    if args.kv_transfer == "local" and args.role != Role.UNIFIED:
        raise UserError("--kv-transfer local needs a pool that workers share; one that joins has a pool of its own")
    scheduler, network = network_args.join(args)
    # A number of its own, since containers share pids and the begin of their names; a socket's path must stay short.
    here = "" if is_local(scheduler) else f"{socket.gethostname().partition('.')[0][:12]}-"
    name = args.name or f"{args.role}-{here}{secrets.token_hex(3)}"
    directory = engine_args.resolve_model(args)
    plan = sizing.plan(args, sizing.read_model_size(directory, args.dtype, args.load_format), num_workers=1)
    name_process(f"launcher of {name}")
    if plan.note:
        log.log(plan.note_level, plan.note)
    with RunDir() as run_dir:
        config = WorkerConfig(
            name=name,
            role=args.role,
            model=engine_args.model_config(args, directory, plan.max_model_len),
            cache=engine_args.cache_config(args, plan.pool_bytes),
            batch=engine_args.batch_config(args),
            device=args.device,
            gpu=engine_args.gpus_of(args, 1)[0],
            kv_transfer=args.kv_transfer,
            early_bind_tokens=args.early_bind_tokens,
            attention_backend=args.attention_backend,
            threads=args.threads or 0,
            scheduler=scheduler,
            run_dir=str(run_dir.path),
            network=network,
        )
        launcher = Launcher([worker_spec(config)], run_dir.path, lambda took: _announce(name, took), drain_s=0.0)
        return asyncio.run(launcher.run())


def _announce(name: str, took_s: float) -> None:
    sys.stdout.write(f"{name} is ready after {took_s:.1f} s\n")
    sys.stdout.flush()
