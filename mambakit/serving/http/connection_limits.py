"""The limits of a connection, and how many connections the limit of open files allows."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# Connections that may wait to be accepted. Of a burst of more a client is not answered, and tries again a second later.
BACKLOGS = (1024, 128)
UPLOADS = (b"/v1/states/import",)  # paths whose bodies are files


@dataclass(frozen=True)
class ConnectionLimits:
    """
    Attributes:
        connections: in all. A new one beyond them replaces the one that has been without a complete request longest,
            and gets a 503 where all have one.
        header_bytes: of a request's line and headers; also of the framing of a chunked body.
        headers: their number.
        url_bytes: of a request's target.
        body_bytes: of a request.
        upload_bytes: of one to `UPLOADS`.
        header_seconds: to receive the headers, counted from the connection or the first byte.
        body_seconds: to receive a body, plus one second for each ``rate`` bytes received.
        idle_seconds: between requests.
        write_seconds: for a client to read what was written, plus one second for each ``rate`` bytes of it.
        rate: bytes per second below which a client is too slow.
    """

    connections: int = 1000
    header_bytes: int = 16 << 10
    headers: int = 100
    url_bytes: int = 8 << 10
    body_bytes: int = 4 << 20
    upload_bytes: int = 0
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    idle_seconds: float = 15.0
    write_seconds: float = 30.0
    rate: int = 16 << 10


def connections_that_fit(asked: int | None, replicas: int) -> tuple[int, int]:
    """Raise the limit of open files as far as possible.

    Returns:
        The number of connections that it allows, and how many may wait to be accepted: the largest of `BACKLOGS` that
        leaves room for those that are ``asked`` for, or the default.

    Raises:
        ValueError: fewer than ``asked`` fit.
    """
    if sys.platform == "win32":  # has no such limit
        return asked or ConnectionLimits.connections, BACKLOGS[0]
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft
    # Without a hard limit the kernel has its own; that of macOS is the lower of these.
    for most in (1 << 20, 10240) if hard == resource.RLIM_INFINITY else (hard,):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError):
            continue
        limit = most
        break
    # The backlog is accepted before connections are refused; a replica has a pipe and a sentinel, and opens files to
    # load.
    for backlog in BACKLOGS:
        others = backlog + 64 + 8 * replicas
        room = limit - others
        if room >= (asked or ConnectionLimits.connections):
            break
    if room < (asked or 1):
        raise ValueError(
            f"--max-connections {asked or 1} and {replicas} replicas need {(asked or 1) + others} open files, and this "
            f"process may have {limit} (ulimit -n); raise that, or lower --max-connections"
        )
    return asked or min(ConnectionLimits.connections, room), backlog
