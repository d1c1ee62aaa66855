"""Options of `mambakit serve` for those who run it: keys, TLS, logs, the playground."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from mambakit.commands.options import require_with

if TYPE_CHECKING:
    from mambakit.serving.http.keys import Keys
    from mambakit.serving.http.tls import TlsOptions
    from mambakit.serving.logs import LogOptions


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", metavar="KEY", action="append",
        help="bearer token that clients must send (default: $MAMBAKIT_API_KEY, or none); may be repeated",
    )  # fmt: skip
    access.add_argument(
        "--api-key-file", metavar="FILE",
        help="a file with a key on each line, or a .toml file of hashed keys with limits; read again on SIGHUP",
    )  # fmt: skip
    access.add_argument("--make-key", metavar="NAME", help="print a new key and its table for a file of keys, and exit")
    access.add_argument(
        "--allowed-host", metavar="NAME", action="append", default=[],
        help="a host name of this server, besides its addresses and localhost; * for any",
    )  # fmt: skip
    access.add_argument(
        "--allowed-origin", metavar="ORIGIN", action="append", default=[],
        help="a site whose pages may send requests, as https://example.org (default: none); * for any",
    )  # fmt: skip


def add_operation_arguments(parser: argparse.ArgumentParser) -> None:
    tls = parser.add_argument_group("TLS")
    tls.add_argument("--tls-cert", metavar="FILE", help="serve https with this certificate and its chain (PEM)")
    tls.add_argument("--tls-key", metavar="FILE", help="its key (PEM), where the certificate's file has none")
    tls.add_argument("--tls-key-password-file", metavar="FILE", help="a file with the password of an encrypted key")
    tls.add_argument(
        "--tls-client-ca", metavar="FILE", help="clients must have a certificate that one of these has signed (PEM)"
    )
    parser.add_argument("--no-playground", action="store_true", help="no page at /, the API alone")
    logs = parser.add_argument_group("logs, on standard error")
    logs.add_argument("--log-format", choices=("text", "json"), default="text", help="lines, or JSON objects")
    logs.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="the least that is written: info has a line for each request, debug also those of probes",
    )  # fmt: skip
    logs.add_argument("--log-prompts", action="store_true", help="prompts, too, in the lines of requests")


def make_key(name: str) -> int:
    from mambakit.serving.http.keys import make_key

    key, table = make_key(name)
    print(f"{key}\n\n# the key's table, for --api-key-file keys.toml\n{table}", end="")
    return 0


def log_options(args: argparse.Namespace) -> LogOptions:
    from mambakit.serving.logs import LogOptions

    return LogOptions(args.log_format, args.log_level, args.log_prompts)


def tls_options(args: argparse.Namespace) -> TlsOptions | None:
    """Raises a ValueError where the files do not serve."""
    from mambakit.serving.http.tls import TlsOptions, make_context

    for name in ("tls_key", "tls_key_password_file", "tls_client_ca"):
        given = getattr(args, name) is not None
        require_with(f"--{name.replace('_', '-')}", given, "--tls-cert", args.tls_cert is not None)
    if args.tls_cert is None:
        return None
    options = TlsOptions(args.tls_cert, args.tls_key, args.tls_key_password_file, args.tls_client_ca)
    make_context(options)
    return options


def keys_of(args: argparse.Namespace) -> Keys:
    from mambakit.serving.http.keys import read_keys

    return read_keys(args.api_key, args.api_key_file, os.environ)


def key_reader(args: argparse.Namespace) -> Any:
    """What reads the keys again; None where they are not from a file."""
    return None if args.api_key_file is None else lambda: keys_of(args)
