"""The flags for deployments that span hosts: what is refused before anything starts, and how it is said."""

import argparse
import ipaddress
import socket
from pathlib import Path

from baton.proto.address import is_loopback, tcp_endpoint, tcp_host
from baton.proto.config import NetworkConfig
from baton.proto.curve import load_key
from baton.proto.errors import UserError
from baton.proto.network import open_network, refusal

ANSWER_S = 5.0
"""A scheduler that does not answer in this time is not there."""
ACROSS_HOSTS = ("auto", "tcp", "local")
"""Values of --kv-transfer that work between hosts."""


def add_key_argument(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """The same for all processes of a cluster."""
    group.add_argument("--key-file", default="", metavar="FILE", help="the cluster's key, from `baton keys new DIR`")


def tcp(text: str) -> str:
    """'tcp://HOST:PORT'."""
    port = text.rpartition(":")[2]
    well_formed = text.startswith("tcp://") and tcp_host(text) and port.isascii() and port.isdigit()
    if not well_formed or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected an endpoint such as tcp://10.0.0.5:5555, got {text!r}")
    return text


def listen(args: argparse.Namespace) -> tuple[str, NetworkConfig]:
    """The endpoint for workers on other hosts, empty without --listen, and how processes here are reached from there.

    Raises UserError.
    """
    if not args.listen:
        if args.key_file:
            raise UserError("--key-file is for deployments that span hosts: give --listen tcp://IP:PORT too")
        return "", NetworkConfig()
    where = f"--listen {args.listen}"
    host = _own_address(tcp_host(args.listen), where)
    network = _network(args, where, host)
    return tcp_endpoint(host, _claim(host, _port(args.listen), where)), network


def join(args: argparse.Namespace) -> tuple[str, NetworkConfig]:
    """The scheduler's endpoint, and how this worker is reached from other hosts.

    Raises UserError, also when nobody is there, or refuses this worker's key.
    """
    where = f"--scheduler {args.scheduler}"
    if args.scheduler.startswith("ipc://"):
        _check_socket(args.scheduler)
        if not args.host:
            if args.key_file:
                raise UserError("--key-file is for a worker that others reach over a network: give --host IP too")
            return args.scheduler, NetworkConfig()
        return args.scheduler, _network(args, f"--host {args.host}", _own_address(args.host, f"--host {args.host}"))
    if args.kv_transfer not in ACROSS_HOSTS:
        raise UserError(f"--kv-transfer {args.kv_transfer} works within one host: with {where} give auto or tcp")
    scheduler, port = _resolve(tcp_host(args.scheduler), where), _port(args.scheduler)
    host = _own_address(args.host, f"--host {args.host}") if args.host else _address_towards(scheduler, where)
    network = _network(args, where, scheduler, host)
    endpoint = tcp_endpoint(scheduler, port)
    probe = open_network(network)
    try:
        why = refusal(probe, endpoint, ANSWER_S)
    finally:
        probe.close()
    if why:
        raise UserError(f"{where}: {why}")
    return endpoint, network


def _network(args: argparse.Namespace, where: str, *hosts: str) -> NetworkConfig:
    """The last of `hosts` is this process's own. Raises UserError unless traffic with all of them is as it must be."""
    if not args.key_file:
        if not all(map(is_loopback, hosts)):
            raise UserError(f"{where}: beyond loopback a key is needed: --key-file FILE, from `baton keys new DIR`")
        return NetworkConfig(hosts[-1])
    load_key(args.key_file)
    return NetworkConfig(hosts[-1], str(Path(args.key_file).absolute()))


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _claim(host: str, port: int, where: str) -> int:
    """The port, a free one for 0. Raises UserError when it is taken, or the host is another one."""
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give an address of this host, and a free port") from error


def _check_socket(scheduler: str) -> None:
    """Raises UserError unless the endpoint's socket exists; ZeroMQ itself would wait for it forever."""
    try:
        found = Path(scheduler.removeprefix("ipc://")).is_socket()
    except OSError as error:
        raise UserError(f"--scheduler {scheduler}: {error.strerror}") from error
    if not found:
        raise UserError(f"--scheduler {scheduler}: no such socket; `baton serve` logs its scheduler's endpoint")


def _own_address(host: str, where: str) -> str:
    """As an IP address that others can connect to."""
    address = _resolve(host, where)
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        raise UserError(f"{where}: give the address of this host that the others connect to, not all of them")
    return address


def _resolve(host: str, where: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error


def _address_towards(host: str, where: str) -> str:
    """This host's address on the way to another one; nothing is sent."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from error
        return str(probe.getsockname()[0])


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
