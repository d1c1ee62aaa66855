"""Access: the API keys that clients send, the host that a request names, and the web page that it comes from.

A web page can send requests to addresses of its visitor's machine. Its `Origin` shows that, or its own name in `Host`
where the page's name was made to resolve to this address (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mambakit.quoting import cut
from mambakit.serving.errors import ApiError
from mambakit.serving.http.keys import Key, Keys

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._~*-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::[0-9]{1,5})?")


def check_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """The names of --allowed-host in lower case.

    Raises:
        ValueError: one is neither a host nor *.
    """
    checked = []
    for host in hosts:
        name = host.lower().removesuffix(".")
        found = _HOST.fullmatch(name)
        if name != "*" and (found is None or found[2] is not None or "*" in name):
            raise ValueError(f"--allowed-host is {host!r}; give a host's name or address without scheme or port, or *")
        checked.append(name)
    return tuple(checked)


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """The origins of --allowed-origin in lower case.

    Raises:
        ValueError: one is neither an origin nor *.
    """
    checked = []
    for origin in origins:
        if origin != "*" and _ORIGIN.fullmatch(origin.lower()) is None:
            raise ValueError(
                f"--allowed-origin is {origin!r}; give scheme and host as https://example.org, without a path, or *"
            )
        checked.append(origin.lower())
    return tuple(checked)


@dataclass(frozen=True)
class AccessRules:
    """
    Attributes:
        keys: any of them is accepted as a bearer token; without keys none is required.
        hosts: names of this server besides its addresses and localhost; "*" for any.
        origins: of web pages that may send requests; "*" for any.
        loopback: whether the address is reached from this machine only.
    """

    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    loopback: bool = True

    def require_key(self, authorization: str) -> Key | None:
        """The key that the header holds; None where none is required.

        Raises:
            ApiError: the header holds no key of this server.
        """
        if not self.keys:
            return None
        found = self.keys.find(authorization)
        if found is None:
            message = "the API key is missing, wrong or expired; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        return found

    def allows_host(self, host: str) -> bool:
        """Whether ``host``, without port, is a name of this server."""
        name = host.lower().removesuffix(".")
        if "*" in self.hosts or name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _address(name)
        if address is not None:
            # An address cannot be rebound; on loopback only loopback addresses are this server's.
            return not self.loopback or address.is_loopback
        if self.loopback:
            return False
        # With keys any name is allowed: a page that was rebound to this address does not know one.
        return name == socket.gethostname().lower() or bool(self.keys and not self.hosts)

    def allows_origin(self, origin: str, host: str, scheme: str = "http") -> bool:
        """Whether ``origin`` is allowed, or this server's own: behind a proxy with TLS that is https, too."""
        origin, host = origin.lower(), host.lower()
        return "*" in self.origins or origin in self.origins or origin in (f"{scheme}://{host}", f"https://{host}")

    def check(self, headers: Iterable[tuple[bytes, bytes]], scheme: str = "http", path: str = "") -> None:
        """Raises an `ApiError` for a request to another host name, or from another site's page."""
        found: dict[bytes, list[str]] = {b"host": [], b"origin": [], b"sec-fetch-site": []}
        for name, value in headers:
            if name in found:
                found[name].append(value.decode("latin-1"))
        hosts, origins, sites = found.values()
        parsed = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if parsed is None:
            raise ApiError(
                400, f"the request has {len(hosts)} Host headers, or one that is no host; send one Host: NAME[:PORT]"
            )
        if not self.allows_host(parsed[1]):
            asked = cut(parsed[1])
            message = f"{asked!r} is no name of this server; use one of its addresses, or add --allowed-host NAME"
            raise ApiError(403, message, code="host_not_allowed")
        for origin in origins:
            if not self.allows_origin(origin, hosts[0], scheme):
                message = f"pages of {cut(origin)!r} may not use this server; serve with --allowed-origin ORIGIN"
                raise ApiError(403, message, code="origin_not_allowed")
        followed = path == "/"  # a link to the playground's page, which does nothing by itself
        foreign = any(site in ("cross-site", "same-site") for site in sites)
        if not origins and "*" not in self.origins and foreign and not followed:
            message = "pages of other sites may not use this server; serve with --allowed-origin ORIGIN"
            raise ApiError(403, message, code="origin_not_allowed")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(address: str) -> bool:
    found = _address(address.partition("%")[0])
    return found is not None and found.is_loopback


class Access:
    """Middleware: checks host and origin on every path."""

    def __init__(self, app: ASGIApp, rules: AccessRules):
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._rules.check(scope["headers"], scope.get("scheme", "http"), scope["path"])
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
