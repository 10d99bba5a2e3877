"""Certificates that the operator makes, for its webhook and for services: a CA and one leaf each.

The CA's key is thrown away after the leaf is signed; a rotation makes a new CA. For a while the new
CA and the one before are trusted, so that all who show a certificate can change over.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvasir_operator.core.secrets import Leaf

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


def make_bundle(dns_name: str, *others: str, now: datetime) -> Bundle:
    """A new CA and a leaf for this name, and others."""
    ca_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.DNSName(name) for name in (dns_name, *others)]
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


def read_leaf(certificate: bytes, key: bytes) -> Leaf | None:
    """What a certificate says; None: it says too little, or the key is not its own."""
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        private = serialization.load_pem_private_key(key, password=None)
        if private.public_key() != leaf.public_key():
            return None
        return Leaf(
            name=next(iter(names.get_values_for_type(x509.DNSName)), ""),
            authority=_signer(leaf),
            expires_ms=int(leaf.not_valid_after_utc.timestamp() * 1000),
        )
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return None


def read_authorities(bundle: bytes) -> dict[str, bytes]:
    """CAs by what leaves call them."""
    try:
        found = x509.load_pem_x509_certificates(bundle)
    except ValueError:
        return {}
    return {_id(ca): ca.public_bytes(serialization.Encoding.PEM) for ca in found}


def _signer(leaf: x509.Certificate) -> str:
    """The id of the CA that a leaf names; "": it names none."""
    try:
        named = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:
        return ""
    return (named.key_identifier or b"").hex()


def _id(authority: x509.Certificate) -> str:
    return x509.SubjectKeyIdentifier.from_public_key(authority.public_key()).digest.hex()


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
