"""Serve a model over an OpenAI-compatible HTTP API, prompts prefilled in some processes and decoded in others."""

import argparse
import asyncio
import errno
import logging
import socket
import sys
from pathlib import Path

from baton.frontend.cli import (
    edge_args,
    engine_args,
    network_args,
    pooling_args,
    rpc_args,
    sharing,
    sizing,
    tool_args,
)
from baton.frontend.launcher import Launcher
from baton.frontend.processes import specs
from baton.frontend.run_dir import RunDir
from baton.proto.address import bracketed
from baton.proto.config import (
    FrontendConfig,
    NetworkConfig,
    PlacementConfig,
    SchedulerConfig,
    ServeConfig,
    WorkerConfig,
)
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role
from baton.proto.supervision import name_process

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton serve`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; the command line wins")
    engine_args.add_model_arguments(parser)
    engine_args.add_worker_arguments(parser)
    engine_args.add_kv_transfer_arguments(parser)
    _add_processes(parser.add_argument_group("processes"))
    _add_http(parser.add_argument_group("HTTP"))
    tool_args.add_arguments(parser.add_argument_group("tools and reasoning"))
    pooling_args.add_arguments(parser.add_argument_group("embeddings"))
    rpc_args.add_arguments(parser.add_argument_group("gRPC"), port_number)
    _add_hosts(parser.add_argument_group("other hosts"))


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prefill", type=engine_args.count, metavar="N", help="prefill workers; default 1 without --unified"
    )
    group.add_argument(
        "--decode", type=engine_args.count, metavar="M", help="decode workers; default 1 without --unified"
    )
    group.add_argument("--unified", type=engine_args.count, default=0, metavar="K", help="workers that do both")
    group.add_argument(
        "--frontends",
        type=engine_args.positive,
        default=1,
        metavar="F",
        help="HTTP processes on the same port; one streams about 30,000 tokens per second",
    )
    group.add_argument(
        "--mps", action="store_true", help="workers on one GPU run at the same time, through NVIDIA's MPS, not in turns"
    )
    group.add_argument(
        "--mps-prefill-percentage",
        type=percentage,
        default=60,
        metavar="P",
        help="of the GPU's multiprocessors that prefill workers may use with --mps",
    )
    group.add_argument("--placement", default="least_loaded", choices=("least_loaded", "round_robin"))
    group.add_argument(
        "--max-waiting",
        type=engine_args.positive,
        default=4096,
        help="requests queued beyond those that workers have taken; one more is answered with 429",
    )
    group.add_argument(
        "--shutdown-timeout", type=seconds, default=15.0, metavar="S", help="running streams may take so long to finish"
    )


def _add_hosts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--listen",
        type=network_args.tcp,
        metavar="tcp://IP:PORT",
        help="let workers on other hosts join, over this address of this host; port 0 takes a free one",
    )
    network_args.add_key_argument(group)


def _add_http(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="0.0.0.0")
    group.add_argument("--port", type=port_number, default=8000, help="0 takes a free one")
    group.add_argument("--uds", default="", metavar="PATH", help="Unix socket instead of host and port")
    group.add_argument("--root-path", type=root_path, default="", help="prefix under which a proxy serves the API")
    text = engine_args.non_empty
    edge_args.add_arguments(group)
    group.add_argument(
        "--served-model-name", type=text, nargs="+", metavar="NAME", help="names for clients; default: MODEL"
    )
    group.add_argument(
        "--max-stored-responses",
        type=engine_args.count,
        default=1024,
        metavar="N",
        help="of /v1/responses, that can be retrieved and continued; the oldest leaves first, 0 keeps none",
    )
    group.add_argument(
        "--max-stored-response-mib",
        type=engine_args.count,
        default=64,
        metavar="MIB",
        help="what they may take together",
    )
    group.add_argument("--chat-template", default="", metavar="FILE", help="jinja2 file; default: the tokenizer's")
    group.add_argument("--max-logprobs", type=engine_args.count, default=20, help="most logprobs a client may ask for")


def seconds(text: str) -> float:
    """A finite time from 0."""
    value = engine_args.number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds from 0, for example 2.5, got {text!r}")
    return value


def percentage(text: str) -> int:
    """1 to 100."""
    value = engine_args.positive(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"expected a percentage up to 100, got {text!r}")
    return value


def root_path(text: str) -> str:
    """A prefix with a slash before it and none after; empty for the root itself."""
    inner = text.strip("/")
    return f"/{inner}" if inner else ""


def port_number(text: str) -> int:
    """0 to 65535."""
    value = engine_args.count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"a port is at most 65535, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, start everything, keep it running; the exit code."""
    roles = worker_roles(args)
    engine_args.check_kv_transfer(args, roles)
    sharing.check(args, len(roles))
    tool_args.check(args)
    edge_args.check(args)
    args.port = claim_address(args)
    listening = network_args.listen(args)
    directory = engine_args.resolve_model(args)
    pooling_args.check(args, directory)
    size = sizing.read_model_size(directory, args.dtype, args.load_format)
    plan = sizing.plan(args, size, len(roles))
    name_process("launcher")
    if plan.note:
        log.log(plan.note_level, plan.note)
    with RunDir(*([args.uds] if args.uds else [])) as run_dir:
        config = serve_config(args, directory, plan, roles, run_dir, *listening)
        for endpoint in config.scheduler.endpoint.split():
            log.info("more workers can join: baton worker --role ROLE --scheduler %s MODEL", endpoint)
        launcher = Launcher(specs(config), run_dir.path, lambda took: _announce(args, took), config.shutdown_timeout_s)
        return asyncio.run(launcher.run())


def worker_roles(args: argparse.Namespace) -> list[Role]:
    """The role of each worker. Raises UserError for a set that can't serve, unless others may join from other hosts."""
    default = 0 if args.unified else 1
    prefill = default if args.prefill is None else args.prefill
    decode = default if args.decode is None else args.decode
    if bool(prefill) != bool(decode) and not args.listen:
        raise UserError(
            f"--prefill {prefill} --decode {decode}: the two roles need each other; use --unified alone, or --listen "
            "for workers on other hosts"
        )
    if not prefill and not args.unified and not args.listen:
        raise UserError("no worker: give --prefill and --decode, or --unified")
    return [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.UNIFIED] * args.unified


def claim_address(args: argparse.Namespace) -> int:
    """The port to serve on, or 0 with --uds. Raises UserError when another process has it."""
    if args.uds and args.frontends > 1:
        raise UserError(f"--frontends {args.frontends} need a port to share: leave --uds out, or start one frontend")
    if args.uds:
        args.uds = str(Path(args.uds).absolute())
        _check_unix_socket(Path(args.uds))
        return 0
    return claim_port(args.host, args.port)


def claim_port(host: str, port: int, flag: str = "") -> int:
    """The port, a free one for 0. Raises UserError when it is taken; `flag` is the prefix of the flags to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        mend = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        text = f"can't serve on {host}:{port}: {error.strerror}; choose another --{flag}{mend}"
        raise UserError(text) from error


def check_ports_differ(args: argparse.Namespace) -> None:
    """Raises UserError for two servers on one: each would be told that it is free."""
    taken: list[tuple[str, str, int]] = [] if args.uds else [("--port", args.host, args.port)]
    for flag, host, port in (("--grpc", args.grpc_host, args.grpc_port), ("--admin", args.admin_host, args.admin_port)):
        for other, beside, number in taken:
            if port and port == number and (host == beside or {host, beside} & {"0.0.0.0", "::"}):
                raise UserError(f"{other} and {flag}-port are both {port}: each needs one of its own")
        taken.append((f"{flag}-port", host, port))


def _check_unix_socket(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"--uds {path}: {path.parent} is not a directory")
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        raise UserError(f"--uds {path} exists and is not a socket: give the path of a socket, or a new one")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise UserError(f"--uds {path}: {error.strerror or error}") from error
    raise UserError(f"--uds {path} is in use by another process")


def serve_config(
    args: argparse.Namespace,
    directory: Path,
    plan: sizing.Plan,
    roles: list[Role],
    run_dir: RunDir,
    listening: str = "",
    network: NetworkConfig = NetworkConfig(),
) -> ServeConfig:
    """The whole configuration tree, built here once; `listening` and `network` as from network_args.listen."""
    scheduler = run_dir.endpoint("scheduler")
    private = str(run_dir.path)
    model = engine_args.model_config(args, directory, plan.max_model_len)
    gpus = engine_args.gpus_of(args, len(roles))
    check_ports_differ(args)
    inference, admin = rpc_args.configs(args, claim_port)
    workers = tuple(
        WorkerConfig(
            name=f"{role}-{roles[:index].count(role)}",
            role=role,
            model=model,
            cache=engine_args.cache_config(args, plan.pool_bytes),
            batch=engine_args.batch_config(args),
            device=args.device,
            gpu=gpus[index],
            kv_transfer=args.kv_transfer,
            early_bind_tokens=args.early_bind_tokens,
            attention_backend=args.attention_backend,
            threads=args.threads or 0,
            scheduler=scheduler,
            run_dir=private,
            network=network,
        )
        for index, role in enumerate(roles)
    )
    workers, keepers = sharing.share(workers, run_dir.endpoint)
    if args.mps:
        workers, keepers = sharing.with_mps(workers, keepers, run_dir.path, args.mps_prefill_percentage)
    return ServeConfig(
        scheduler=SchedulerConfig(
            endpoint=f"{scheduler} {listening}".rstrip(),
            network=network,
            run_dir=private,
            max_waiting=args.max_waiting,
            placement=PlacementConfig(args.placement),
            expected_workers=len(roles),
            admin=admin,
        ),
        frontends=tuple(
            FrontendConfig(
                name=f"frontend-{index}",
                model=model,
                scheduler=scheduler,
                run_dir=private,
                network=network,
                host=args.host,
                port=args.port,
                shares_port=args.frontends > 1,
                uds=args.uds,
                root_path=args.root_path,
                api_keys=tuple(args.api_key),
                api_key_file=args.api_key_file,
                tls=edge_args.tls(args),
                cors=edge_args.cors(args),
                peers=tuple(f"frontend-{each}" for each in range(args.frontends)) if args.frontends > 1 else (),
                max_stored_responses=args.max_stored_responses,
                max_stored_response_bytes=args.max_stored_response_mib * 2**20,
                max_logprobs=args.max_logprobs,
                block_size=args.block_size,
                shutdown_timeout_s=args.shutdown_timeout,
                grpc=inference,
                enable_auto_tool_choice=args.enable_auto_tool_choice,
                tool_call_parser=args.tool_call_parser,
                reasoning_parser=args.reasoning_parser,
                tool_parser_plugin=str(Path(args.tool_parser_plugin).resolve()) if args.tool_parser_plugin else "",
                pooler=pooling_args.pooler_config(args),
            )
            for index in range(args.frontends)
        ),
        workers=workers,
        keepers=keepers,
        run_dir=private,
        shutdown_timeout_s=args.shutdown_timeout,
    )


def _announce(args: argparse.Namespace, took_s: float) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    url = (
        f"unix:{args.uds}"
        if args.uds
        else f"{'https' if args.ssl_certfile else 'http'}://{bracketed(host)}:{args.port}"
    )
    sys.stdout.write(f"ready at {url} after {took_s:.1f} s\n")
    sys.stdout.flush()
