"""Load and check the certificate chain and private key for C2PA signing."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from config.section import SettingsError

# C2PA's algorithms by the curve of an ECDSA key (C2PA specification, "Digital signatures").
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
MIN_RSA_BITS = 2048
MAX_PEM_BYTES = 1_000_000


@dataclass(frozen=True)
class Credentials:
    """PEM of a chain and of its first certificate's key (PKCS #8), and the key's signature algorithm."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    subject: str
    expires_at: datetime

    @property
    def days_left(self) -> int:
        return (self.expires_at - datetime.now(UTC)).days


def read_credentials(certificate: Path, private_key: Path) -> Credentials:
    """Read both files. Raises `SettingsError`, one sentence that names the setting, where they cannot sign."""
    content = _read("C2PA_CERTIFICATE", certificate)
    try:
        chain = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise SettingsError(f"C2PA_CERTIFICATE: {certificate} holds no chain of certificates in PEM") from error
    key = _load_key(private_key)
    signer = chain[0]
    if signer.public_key() != key.public_key():
        belongs = "does not belong to the first certificate of C2PA_CERTIFICATE"
        raise SettingsError(f"C2PA_PRIVATE_KEY: {private_key} {belongs}: the chain begins with the one that signs")
    _check_validity(signer, certificate)
    return Credentials(
        chain=b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain),
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        algorithm=_algorithm_of(key, private_key),
        subject=signer.subject.rfc4514_string(),
        expires_at=signer.not_valid_after_utc,
    )


def _load_key(path: Path) -> PrivateKeyTypes:
    content = _read("C2PA_PRIVATE_KEY", path)
    try:
        return serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise SettingsError(f"C2PA_PRIVATE_KEY: {path} needs a passphrase: store it without one") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"C2PA_PRIVATE_KEY: {path} holds no private key in PEM") from error


def _read(setting: str, path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def _check_validity(signer: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > signer.not_valid_after_utc:
        raise SettingsError(f"C2PA_CERTIFICATE: {path} expired on {signer.not_valid_after_utc:%Y-%m-%d}: renew it")
    if now < signer.not_valid_before_utc:
        begins = f"is valid only from {signer.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
        raise SettingsError(f"C2PA_CERTIFICATE: {path} {begins}: look at this machine's clock")


def _algorithm_of(key: PrivateKeyTypes, path: Path) -> str:
    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in CURVES:
            return CURVES[key.curve.name]
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey() if key.key_size >= MIN_RSA_BITS:
            return "ps256"
        case _:
            allowed = f"ECDSA on P-256, P-384 or P-521, Ed25519, or RSA of {MIN_RSA_BITS} bits or more"
            raise SettingsError(f"C2PA_PRIVATE_KEY: {path} is no key that C2PA signs with: {allowed}")
