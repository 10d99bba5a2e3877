"""The API of links between parts: who shows which certificate."""

from pydantic import Field

from kvasir_operator.api_base import ApiModel, Rule

SECRET_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
ROUTER_PEER_PORT = 50054  # other replicas and the operator, where links are secure


class SecretName(ApiModel):
    """A Secret in the same namespace."""

    name: str = Field(pattern=SECRET_PATTERN, max_length=253, description="Name of the Secret.")


class SecuritySettings(ApiModel):
    """How the parts of a service know one another."""

    RULES = (
        Rule(
            "!has(self.secretName) || !has(self.mtls) || self.mtls",
            "secretName needs mtls: set mtls or remove secretName",
        ),
        Rule(
            "!has(self.encryptKv) || !self.encryptKv || !has(self.mtls) || self.mtls",
            "encryptKv needs mtls: set mtls or remove encryptKv",
        ),
    )
    mtls: bool | None = Field(
        default=None,
        description="Router, workers and KV nodes talk over TLS and show one another certificates. "
        "A change replaces all pods; until they are replaced, fewer of them serve together. "
        "Absent: on, but a service that runs without stays so.",
    )
    encrypt_kv: bool | None = Field(
        default=None,
        description="KV blocks are encrypted, too, and move between parts that hold the same key "
        "only: the operator makes it, Secret NAME-kvasir-kv-key. A change replaces workers and KV "
        "nodes. Absent: as mtls.",
    )
    secret_name: str | None = Field(
        default=None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="An existing Secret with tls.crt, tls.key and ca.crt, as cert-manager makes; "
        "its owner renews it. Absent: the operator makes NAME-kvasir-tls and renews it.",
    )

    @property
    def has_kv_key(self) -> bool:
        """Whether KV blocks are encrypted."""
        return self.has_certificates and self.encrypt_kv is not False

    @property
    def has_certificates(self) -> bool:
        """Whether the parts show certificates."""
        return self.mtls is not False


class LinkSettings(ApiModel):
    """How a pool's pods are linked to other parts."""

    tls_secret: str | None = Field(
        default=None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Secret with tls.crt, tls.key and ca.crt: the pods talk to other parts over "
        "TLS and demand certificates of these authorities. Absent: links are plain.",
    )
    kv_key_secret: str | None = Field(
        default=None,
        pattern=SECRET_PATTERN,
        max_length=253,
        description="Secret with kv.key, 32 bytes or more that parts which exchange KV have in "
        "common: KV blocks are encrypted with it. Absent: they are not.",
    )
