"""The gRPC flags of `baton serve`, checked before anything starts."""

import argparse
import importlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from baton.frontend.cli.edge_args import try_tls
from baton.proto.address import bracketed
from baton.proto.config import RpcConfig
from baton.proto.errors import UserError

log = logging.getLogger(__name__)

Claim = Callable[[str, int, str], int]
"""(host, port, the flags' prefix) -> the port, claimed; raises UserError when it is taken."""


def add_arguments(group: argparse._ArgumentGroup, port_number: Callable[[str], int]) -> None:
    """Both services share their TLS flags, and the HTTP server's keys."""
    group.add_argument("--grpc-port", type=port_number, help="serve Inference here; 0 takes a free one; default: off")
    group.add_argument("--grpc-host", default="127.0.0.1")
    group.add_argument("--admin-port", type=port_number, help="serve Admin, for `baton ctl`, here; default: off")
    group.add_argument("--admin-host", default="127.0.0.1")
    group.add_argument("--grpc-tls-cert", default="", metavar="FILE", help="certificate chain in PEM")
    group.add_argument("--grpc-tls-key", default="", metavar="FILE", help="its private key in PEM")
    group.add_argument(
        "--grpc-allow-plaintext", action="store_true", help="serve without TLS also on addresses beyond loopback"
    )


def configs(args: argparse.Namespace, claim: Claim) -> tuple[RpcConfig, RpcConfig]:
    """For Inference and for Admin. Raises UserError."""
    if args.grpc_port is None and args.admin_port is None:
        return RpcConfig(), RpcConfig()
    importlib.import_module("baton.proto.rpc")  # says which extra is missing
    cert, key = _tls_files(args)
    return _config(args, "grpc", cert, key, claim), _config(args, "admin", cert, key, claim)


def _config(args: argparse.Namespace, name: str, cert: str, key: str, claim: Claim) -> RpcConfig:
    host, port = getattr(args, f"{name}_host"), getattr(args, f"{name}_port")
    if port is None:
        return RpcConfig()
    if not cert and not args.grpc_allow_plaintext and not _is_loopback(host, name):
        raise UserError(
            f"--{name}-host {host}: gRPC beyond loopback needs --grpc-tls-cert and --grpc-tls-key, or "
            "--grpc-allow-plaintext where something else protects the network"
        )
    port = claim(host, port, f"{name}-")
    log.info("%s at %s:%d", {"grpc": "gRPC Inference", "admin": "gRPC Admin"}[name], bracketed(host), port)
    shares_port = name == "grpc" and args.frontends > 1
    keys = tuple(args.api_key)
    return RpcConfig(host, port, cert, key, keys, shares_port=shares_port, api_key_file=args.api_key_file)


def _tls_files(args: argparse.Namespace) -> tuple[str, str]:
    cert, key = args.grpc_tls_cert, args.grpc_tls_key
    if bool(cert) != bool(key):
        raise UserError("--grpc-tls-cert and --grpc-tls-key belong together: give both, or neither")
    for path in filter(None, (cert, key)):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    if not cert:
        return "", ""
    try_tls("--grpc-tls-cert or --grpc-tls-key", cert, key)
    return str(Path(cert).absolute()), str(Path(key).absolute())


def _is_loopback(host: str, name: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--{name}-host {host}: {error.strerror}") from error
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
