"""Flags about who may call the HTTP API and how: keys, TLS, web pages. Names are vLLM's where it has them."""

import argparse
import json
import ssl
from pathlib import Path

from baton.frontend.cli import engine_args
from baton.proto.config import CorsConfig, TlsConfig
from baton.proto.errors import UserError
from baton.proto.keys import Keyring

_FILES = ("api_key_file", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """All of them."""
    group.add_argument(
        "--api-key", type=engine_args.non_empty, nargs="+", default=[], metavar="KEY", help="accepted bearer keys"
    )
    group.add_argument(
        "--api-key-file",
        default="",
        metavar="FILE",
        help="more keys, a line 'NAME KEY' for each, readable by its owner alone; read again when it changes",
    )
    group.add_argument("--ssl-keyfile", default="", metavar="FILE", help="private key in PEM")
    group.add_argument("--ssl-certfile", default="", metavar="FILE", help="certificate chain in PEM: serves HTTPS")
    group.add_argument("--ssl-ca-certs", default="", metavar="FILE", help="authorities for certificates of clients")
    group.add_argument(
        "--ssl-cert-reqs",
        type=int,
        default=0,
        choices=(0, 1, 2),
        help="certificates of clients: 0 not asked for, 1 checked if there is one, 2 required",
    )
    for what in ("origins", "methods", "headers"):
        group.add_argument(
            f"--allowed-{what}",
            type=names,
            nargs="+",
            default=[("*",)],
            metavar="LIST",
            help=f"CORS: {what} for web pages, as words or a JSON list; default: all",
        )
    group.add_argument("--allow-credentials", action="store_true", help="CORS: let web pages send cookies")


def names(text: str) -> tuple[str, ...]:
    """One word, or a JSON list of strings."""
    if not text.startswith("["):
        return (text,)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise argparse.ArgumentTypeError(f"expected a word, or a list like '[\"https://a.example\"]', got {text!r}")
    return tuple(found)


def check(args: argparse.Namespace) -> None:
    """Make paths absolute, and try keys and certificates before anything starts. Raises UserError."""
    for name in _FILES:
        if path := getattr(args, name):
            setattr(args, name, str(Path(path).absolute()))
    Keyring(tuple(args.api_key), args.api_key_file)
    if not args.ssl_certfile:
        if args.ssl_keyfile or args.ssl_ca_certs or args.ssl_cert_reqs:
            raise UserError("the --ssl flags need --ssl-certfile, the server's certificate")
        return
    if args.ssl_cert_reqs and not args.ssl_ca_certs:
        raise UserError(f"--ssl-cert-reqs {args.ssl_cert_reqs} needs --ssl-ca-certs to check certificates against")
    flags = "--ssl-certfile, --ssl-keyfile or --ssl-ca-certs"
    try_tls(flags, args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs)


def try_tls(flags: str, cert: str, key: str, ca: str = "") -> None:
    """Raises UserError, which names the flags, when a server could not use these files. `cert` may have the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key or None, password=_no_password)
        if ca:
            context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        wanted = "expected are files in PEM: a certificate, and the private key that belongs to it"
        raise UserError(f"{flags} can't be used: {error}; {wanted}") from error


def _no_password() -> str:
    raise ValueError("the private key has a password; give one without")


def tls(args: argparse.Namespace) -> TlsConfig:
    """Of the HTTP server."""
    return TlsConfig(args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs, args.ssl_cert_reqs)


def cors(args: argparse.Namespace) -> CorsConfig:
    """Of the HTTP server."""
    lists = (args.allowed_origins, args.allowed_methods, args.allowed_headers)
    origins, methods, headers = (tuple(name for part in parts for name in part) for parts in lists)
    return CorsConfig(origins, methods, headers, args.allow_credentials)
