"""The proxy that the environment names for outgoing connections, if any: one that cannot be used is refused first."""

from __future__ import annotations

import ssl
import urllib.request

import httpx

from conclave.base.errors import BadInputError
from conclave.deployment.host.environment import reach_loopback_directly


def check_outward_proxy() -> None:
    """Keep loopback from the proxy, and refuse one that cannot be used.

    Flower's own processes take the same variables, and would fail at every start. An address may hold a password, so it
    is not shown.

    Raises:
        BadInputError: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY`` or ``NO_PROXY`` cannot be used.
    """
    reach_loopback_directly()
    named = urllib.request.getproxies()
    if "*" in (host.strip() for host in named.get("no", "").split(",")):  # then the others count for nothing
        return
    for kind in ("https", "http", "all"):
        if named.get(kind) and not _usable(named[kind]):
            raise BadInputError(f"{kind.upper()}_PROXY in the environment: cannot be used, must be http://host:port")
    try:
        httpx.Client(verify=_no_certificates()).close()
    except (httpx.InvalidURL, ValueError) as error:
        raise BadInputError(
            f"NO_PROXY in the environment: cannot be used ({error}), must be names and addresses with commas between"
        ) from error


def _usable(proxy: str) -> bool:
    """Say whether requests could be sent to a proxy; SOCKS, for one, needs a package that Conclave does not require."""
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        httpx.HTTPTransport(proxy=url, verify=_no_certificates()).close()
        return bool(httpx.URL(url).raw_host.decode("ascii").encode("idna"))  # as a socket will look it up
    except (httpx.InvalidURL, ImportError, ValueError):
        return False


def _no_certificates() -> ssl.SSLContext:
    """Avoid reading the system's certificates: nothing is sent."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
