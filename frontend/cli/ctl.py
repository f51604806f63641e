"""Look at a running deployment and change it, over the Admin service that `baton serve --admin-port` opens."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from baton.frontend.cli import engine_args
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role

DEFAULT_ADDRESS = "127.0.0.1:8002"
DEFAULT_TIMEOUT_S = 10.0
MAX_TIMEOUT_S = 86400.0

WORKER_COLUMNS = (
    "name",
    "role",
    "state",
    "running",
    "waiting",
    "queued_tokens",
    "used_blocks",
    "num_blocks",
    "leases",
    "host",
    "incarnation",
)
REQUEST_COLUMNS = (
    "id",
    "state",
    "age_seconds",
    "prompt_tokens",
    "attempt",
    "priority",
    "frontend",
    "prefill_worker",
    "decode_worker",
    "request_id",
)
LINK_COLUMNS = ("reader", "owner", "transport", "reason")
EVENT_COLUMNS = ("unix_seconds", "kind", "subject", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each RPC of admin.proto."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"default {DEFAULT_ADDRESS}")
    common.add_argument("--api-key", default="", metavar="KEY", help="one of the server's --api-key")
    common.add_argument("--tls-ca", default="", metavar="FILE", help="certificates to trust, in PEM; default: no TLS")
    common.add_argument("--timeout", type=seconds, metavar="S", help="default 10 s; none for events and --wait")
    common.add_argument("--json", action="store_true", help="JSON, one object a line")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, run: Callable[["Ctl", argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, parents=[common])
        added.set_defaults(call=run)
        return added

    command("workers", "every worker with its role, load and blocks", Ctl.workers)
    links = command("links", "how workers read KV blocks from each other, and why not in a better way", Ctl.links)
    links.add_argument("--worker", default="", help="only those of this reader")
    drain = command("drain", "give a worker no new streams", Ctl.drain)
    drain.add_argument("--move", action="store_true", help="its streams go on elsewhere at once")
    drain.add_argument("--wait", action="store_true", help="until it is drained")
    resume = command("resume", "undo drain", Ctl.resume)
    remove = command("remove", "end a drained worker for good", Ctl.remove)
    remove.add_argument("--force", action="store_true", help="also when it has streams, which go on elsewhere")
    role = command("role", "change what the scheduler sends to a drained worker", Ctl.role)
    for named in (drain, resume, remove, role):
        named.add_argument("worker", metavar="WORKER")
    role.add_argument("role", choices=[role.value for role in Role])
    requests = command("requests", "output streams that have not ended, oldest first", Ctl.requests)
    requests.add_argument("--worker", default="", help="only those with a leg there")
    requests.add_argument(
        "--limit", type=engine_args.count, default=0, metavar="N", help="at most so many; default 1,000"
    )
    cancel = command("cancel", "end an output stream, or all of a request", Ctl.cancel)
    cancel.add_argument("id", help="as `requests` lists it, or as the client's answer names it")
    flush = command("flush", "empty prefix caches", Ctl.flush)
    flush.add_argument("worker", nargs="?", default="", metavar="WORKER", help="default: all")
    level = command("log-level", "change how much processes log", Ctl.log_level)
    level.add_argument("level", choices=("debug", "info", "warning", "error"))
    level.add_argument("process", nargs="?", default="", help="a worker, a frontend or scheduler; default: all")
    command("events", "what happens in the cluster, until Ctrl-C", Ctl.events)


def run(args: argparse.Namespace) -> int:
    """The exit code; what the server refuses is a UserError."""
    # The extra `grpc` is needed from here on.
    from baton.proto.rpc.client import RpcClient, RpcError

    try:
        with RpcClient("Admin", args.address, api_key=args.api_key, tls_ca=args.tls_ca) as client:
            args.call(Ctl(client.call, args), args)
    except RpcError as error:
        raise UserError(_explained(error, args.address)) from error
    except ValueError as error:  # text that is none, and the like
        raise UserError(f"that can't be sent: {error}") from error
    return 0


def seconds(text: str) -> float:
    """A time limit."""
    value = engine_args.number(text)
    if not 0 < value <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and up to {MAX_TIMEOUT_S:.0f}, got {text!r}")
    return value


class Ctl:
    """The subcommands: a call, and its answer on stdout."""

    def __init__(self, call: Callable[..., Any], args: argparse.Namespace) -> None:
        self._call = call
        self._json = args.json
        self._timeout_s = args.timeout

    def workers(self, _args: argparse.Namespace) -> None:
        """ListWorkers"""
        answer = self._ask("list_workers")
        self._show(answer.workers, WORKER_COLUMNS)
        if not answer.ready and not self._json:
            print(f"not ready: {answer.not_ready_reason}")

    def links(self, args: argparse.Namespace) -> None:
        """ListLinks"""
        self._show(self._ask("list_links", worker=args.worker).links, LINK_COLUMNS)

    def drain(self, args: argparse.Namespace) -> None:
        """Drain"""
        timeout_s = self._timeout_s if args.wait else self._timeout_s or DEFAULT_TIMEOUT_S
        fields = {"name": args.worker, "move_streams": args.move, "wait": args.wait}
        self._show([self._call("drain", timeout_s, **fields)], WORKER_COLUMNS)

    def resume(self, args: argparse.Namespace) -> None:
        """Resume"""
        self._show([self._ask("resume", name=args.worker)], WORKER_COLUMNS)

    def remove(self, args: argparse.Namespace) -> None:
        """Remove"""
        self._ask("remove", name=args.worker, force=args.force)
        self._say(f"{args.worker} has left")

    def role(self, args: argparse.Namespace) -> None:
        """SetRole"""
        self._show([self._ask("set_role", name=args.worker, role=f"ROLE_{args.role.upper()}")], WORKER_COLUMNS)

    def requests(self, args: argparse.Namespace) -> None:
        """ListRequests"""
        answer = self._ask("list_requests", worker=args.worker, limit=args.limit)
        self._show(answer.requests, REQUEST_COLUMNS)
        if len(answer.requests) < answer.total and not self._json:
            print(f"{answer.total} in all")

    def cancel(self, args: argparse.Namespace) -> None:
        """Cancel"""
        self._ask("cancel", id=args.id)
        self._say(f"{args.id} is cancelled")

    def flush(self, args: argparse.Namespace) -> None:
        """FlushPrefixCaches"""
        self._say(f"emptied: {', '.join(self._ask('flush_prefix_caches', worker=args.worker).workers)}")

    def log_level(self, args: argparse.Namespace) -> None:
        """SetLogLevel"""
        answer = self._ask("set_log_level", level=args.level, process=args.process)
        self._say(f"{args.level}: {', '.join(answer.processes)}")

    def events(self, _args: argparse.Namespace) -> None:
        """WatchEvents"""
        for event in self._call("watch_events", self._timeout_s):
            if self._json:
                self._show([event], EVENT_COLUMNS)
            else:
                print("  ".join(_cells(event, EVENT_COLUMNS)), flush=True)

    def _ask(self, rpc: str, **fields: Any) -> Any:
        return self._call(rpc, self._timeout_s or DEFAULT_TIMEOUT_S, **fields)

    def _say(self, text: str) -> None:
        """What there is to say when nothing is listed; the exit code is enough for programs."""
        if not self._json:
            print(text)

    def _show(self, messages: Iterable[Any], columns: tuple[str, ...]) -> None:
        if self._json:
            for message in messages:
                print(_as_json(message), flush=True)
            return
        rows = [columns, *(_cells(message, columns) for message in messages)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _as_json(message: Any) -> str:
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(
        message, indent=None, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _cells(message: Any, columns: tuple[str, ...]) -> list[str]:
    return [_cell(message, column) for column in columns]


def _cell(message: Any, column: str) -> str:
    field = message.DESCRIPTOR.fields_by_name[column]
    value = getattr(message, column)
    if field.enum_type is not None:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return str(field.enum_type.values_by_number[value].name).removeprefix(prefix).lower()
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _explained(error: Any, address: str) -> str:
    code, details = error.code().name, error.details()
    if code == "UNAVAILABLE":
        hint = "`baton serve --admin-port` opens one; one with TLS needs --tls-ca"
        return f"no Admin service at {address} ({details}): {hint}"
    if code == "DEADLINE_EXCEEDED":
        return f"{address} did not answer in time; --timeout gives it longer"
    return str(details)
