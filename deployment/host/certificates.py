"""A server's own certificate authority, and what it signs: the server's certificate, operators', and revocations."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically
from conclave.clients.folder.server_address import is_host_name

_CLOCK_SKEW = timedelta(minutes=10)


class Authority:
    """A CA in two files, ``ca.pem`` and ``ca.key``; the key is readable by its owner only."""

    def __init__(self, folder: Path) -> None:
        """Open the CA in ``folder``.

        Raises:
            BadInputError: there is none that can be read.
        """
        self.certificate_path, self._key_path = folder / "ca.pem", folder / "ca.key"
        try:
            self.certificate = x509.load_pem_x509_certificate(self.certificate_path.read_bytes())
            key = serialization.load_pem_private_key(self._key_path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise BadInputError(f"{folder}: holds no certificate authority, must have ca.pem and ca.key") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise BadInputError(f"{self._key_path}: another kind of key, must be an elliptic curve's")
        self._key = key

    @classmethod
    def create(cls, folder: Path, *, days: int) -> Authority:
        """Make a CA, or complete one that an interrupted attempt began; a complete one stays as it is.

        Raises:
            BadInputError: there is a certificate without its key.
        """
        if not (folder / "ca.pem").exists():
            _make(folder, days)
        authority = cls(folder)
        if not (folder / "revoked.pem").exists():
            authority.revoke(())
        return authority

    def issue_server(self, path: Path, hosts: Sequence[str], *, days: int) -> None:
        """Write ``path``.pem and ``path``.key for a server that is reached under these names and addresses.

        Where there are such files they are replaced, the key first.

        Raises:
            BadInputError: a host is neither a name nor an address.
        """
        names = [_general_name(host) for host in hosts]
        self._issue(path, hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, days, x509.SubjectAlternativeName(names))

    def issue_operator(self, path: Path, name: str, *, days: int) -> None:
        """Write ``path``.pem and ``path``.key for an operator, who may register nodes and start runs."""
        self._issue(path, name, ExtendedKeyUsageOID.CLIENT_AUTH, days, None)

    def revoke(self, certificates: Iterable[Path]) -> None:
        """Write ``revoked.pem``: from now on exactly these certificates are refused, whatever their dates say.

        Raises:
            BadInputError: one cannot be read.
        """
        now = datetime.now(UTC)
        listed = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - _CLOCK_SKEW)
            .next_update(self.certificate.not_valid_after_utc)
        )
        for path in certificates:
            found = x509.RevokedCertificateBuilder().serial_number(_load(path)[0].serial_number).revocation_date(now)
            listed = listed.add_revoked_certificate(found.build())
        signed = listed.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        write_atomically(self.certificate_path.with_name("revoked.pem"), signed)

    def _issue(
        self,
        path: Path,
        subject: str,
        usage: x509.ObjectIdentifier,
        days: int,
        names: x509.SubjectAlternativeName | None,
    ) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(
                _name(subject), self.certificate.subject, key, min(_end(days), self.certificate.not_valid_after_utc)
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        write_atomically(path.with_name(f"{path.name}.key"), _private_pem(key), mode=0o600)
        write_atomically(path.with_name(f"{path.name}.pem"), certificate.public_bytes(serialization.Encoding.PEM))


def days_left(certificates: Path) -> float:
    """Return for how many days all certificates of a file are still valid; below 0, one has expired.

    Raises:
        BadInputError: there is none.
    """
    first = min(found.not_valid_after_utc for found in _load(certificates))
    return (first - datetime.now(UTC)) / timedelta(days=1)


def _load(certificates: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(certificates.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{certificates}: cannot be read, must be a certificate in PEM") from error


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read. Raises FileExistsError if there is one."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
        stream.write(content)


def _make(folder: Path, days: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Conclave CA")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key, _end(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    # A key without a certificate, from an interrupted attempt, has signed nothing.
    write_atomically(folder / "ca.key", _private_pem(key), mode=0o600)
    write_atomically(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _end(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _CLOCK_SKEW)
        .not_valid_after(end)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def check_host(host: str) -> None:
    """Check that a certificate can be for a host.

    Raises:
        BadInputError: it is neither a name nor an address.
    """
    _general_name(host)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not is_host_name(host):
        raise BadInputError(f"host {host!r}: must be a name like fed.example.org, or an IP address")
    return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
