"""TLS of the server's address: its certificate, and the clients' where they must have one."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TlsOptions:
    """
    Attributes:
        certificate: a PEM file, with the chain after the server's own.
        key: a PEM file; None where the certificate's has it, too.
        password_file: whose first line opens an encrypted key.
        client_ca: a PEM file: clients must have a certificate that one of these has signed.
    """

    certificate: str
    key: str | None = None
    password_file: str | None = None
    client_ca: str | None = None


def make_context(options: TlsOptions) -> ssl.SSLContext:
    """TLS 1.2 or later.

    Raises:
        ValueError: a file cannot be read, or is none of its kind.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, options)
    if options.client_ca is not None:
        try:
            context.load_verify_locations(options.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(
                f"--tls-client-ca {options.client_ca} cannot be used ({error}); name a PEM file of certificates"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load_certificate(context: ssl.SSLContext, options: TlsOptions) -> None:
    """Read the certificate and its key, also again while the server runs: connections from then on have it.

    Raises:
        ValueError: they cannot be read, or do not belong together; the context is as it was.
    """
    password = _password(options.password_file)
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for one in (trial, context):  # a context with a new certificate and an old key would refuse everybody
        try:
            one.load_cert_chain(options.certificate, options.key, lambda: password)
        except (OSError, ssl.SSLError) as error:
            named = f"--tls-cert {options.certificate}" + (f" --tls-key {options.key}" if options.key else "")
            remedy = "name PEM files of a certificate and its key, and --tls-key-password-file for an encrypted one"
            raise ValueError(f"{named} cannot be used ({error}); {remedy}") from None


def _password(file: str | None) -> str:
    if file is None:
        return ""  # an empty one opens no key: OpenSSL would ask the terminal
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--tls-key-password-file {file} cannot be read ({error}); name a file with the password on its first line"
        ) from None
    if not lines or not lines[0]:
        raise ValueError(f"--tls-key-password-file {file} is empty; write the password on its first line")
    return lines[0]
