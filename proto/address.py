"""Addresses: the endpoints of one socket, separated by spaces, the best first.

'ipc:///run/…/decode-0.peer tcp://10.0.0.5:41877' is a socket that peers on its host reach through the first and all
others through the second. A peer takes the first that it can reach; a path is there on one host only.
"""

import ipaddress
from pathlib import Path

LOCAL_SCHEMES = ("ipc://", "unix:")


def reachable(address: str) -> str:
    """The endpoint to connect to; the last one when none is known to be there."""
    endpoints = address.split()
    return next((endpoint for endpoint in endpoints if not is_local(endpoint) or _exists(endpoint)), endpoints[-1])


def is_local(endpoint: str) -> bool:
    """Whether it means something on its own host only."""
    return endpoint.startswith(LOCAL_SCHEMES)


def crosses_hosts(address: str) -> bool:
    """Whether a peer on another host finds an endpoint in it."""
    return any(not is_local(endpoint) for endpoint in address.split())


def tcp_endpoint(host: str, port: int | str) -> str:
    """`host` is an IP address; a port of '*' is any free one."""
    return f"tcp://{bracketed(host)}:{port}"


def tcp_host(endpoint: str) -> str:
    """The host in 'tcp://HOST:PORT'."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].removeprefix("[").removesuffix("]")


def is_loopback(host: str) -> bool:
    """Whether an IP address is of this machine alone; False for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _exists(endpoint: str) -> bool:
    path = endpoint
    for scheme in LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    try:
        return Path(path).is_socket()
    except OSError:
        return False


def bracketed(host: str) -> str:
    """IPv6 addresses stand in brackets before a port."""
    return f"[{host}]" if ":" in host else host
