"""Certificates that the operator makes for its webhook: a CA of their own and one leaf each time.

The CA's key is thrown away after the leaf is signed; a rotation makes a new CA. The API server is
told the new CA and the one before, so that both replicas are trusted while they change over.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(days=90)
ROTATE_BEFORE = timedelta(days=30)
CLOCK_SKEW = timedelta(minutes=5)
EITHER_END = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A leaf with its key, and the CA that signed it, all as PEM."""

    ca: bytes
    certificate: bytes
    key: bytes


def make_bundle(dns_name: str, *, now: datetime) -> Bundle:
    """A new CA and a leaf for this name."""
    ca_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.DNSName(name) for name in (dns_name, "localhost")]  # the latter: port-forward
    ca_name = _name(f"{dns_name} CA")
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    authority = (
        _builder(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        _builder(_name(dns_name), ca_name, leaf_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(EITHER_END), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority_id, critical=False)  # which of two CAs of the same name
        .sign(ca_key, hashes.SHA256())
    )
    return Bundle(
        ca=authority.public_bytes(serialization.Encoding.PEM),
        certificate=leaf.public_bytes(serialization.Encoding.PEM),
        key=leaf_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def is_good_for(certificate: bytes, dns_name: str, *, now: datetime) -> bool:
    """Whether the leaf names this host and need not be rotated yet."""
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    is_fresh = leaf.not_valid_after_utc - now > ROTATE_BEFORE
    return is_fresh and dns_name in names.get_values_for_type(x509.DNSName)


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
