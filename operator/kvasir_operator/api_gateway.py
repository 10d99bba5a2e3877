"""The API of gateways: what of a service they are told, and how."""

from typing import Literal

from pydantic import Field

from kvasir_operator.api_base import NAME_PATTERN, ApiModel

HOST_PATTERN = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
SECTION_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
PARENTS_MAX = 8
HOSTNAMES_MAX = 16


class GatewayParent(ApiModel):
    """A Gateway, or one of its listeners."""

    name: str = Field(pattern=SECTION_PATTERN, max_length=253, description="Name of the Gateway.")
    namespace: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        max_length=63,
        description="Its namespace, whose Gateway must admit routes of this one; absent: the same.",
    )
    section_name: str | None = Field(
        default=None,
        pattern=SECTION_PATTERN,
        max_length=253,
        description="Name of one of its listeners; absent: all of them.",
    )


class GatewayRoute(ApiModel):
    """An HTTPRoute from gateways to the service."""

    parents: tuple[GatewayParent, ...] = Field(
        min_length=1, max_length=PARENTS_MAX, description="The Gateways that requests come from."
    )
    hostnames: tuple[str, ...] = Field(
        default=(),
        max_length=HOSTNAMES_MAX,
        description="Requests to these hosts are for this service; none: whatever the host.",
    )
    timeout_seconds: int = Field(
        default=600,
        ge=1,
        le=86_400,
        description="What a request may take at the gateway, until its last token.",
    )


class GatewaySettings(ApiModel):
    """A service behind a gateway that speaks the Gateway API Inference Extension."""

    picker_port: int = Field(
        default=9002,
        ge=1024,
        le=65535,
        description="Port of the router's endpoint picker (Envoy's external processing, gRPC).",
    )
    picker_tls: bool = Field(
        default=True,
        description="The picker shows the certificate of the service's parts; gateways need show "
        "none. Most gateways talk TLS to pickers and take whatever certificate they show.",
    )
    failure_mode: Literal["FailClose", "FailOpen"] = Field(
        default="FailClose",
        description="What a gateway does when no picker answers. FailClose: it refuses requests. "
        "FailOpen: it sends them to any router, which serves them as well.",
    )
    route: GatewayRoute | None = Field(
        default=None,
        description="Makes an HTTPRoute for /v1 to the InferencePool; absent: routes are yours.",
    )


class GatewayStatus(ApiModel):
    """What there is for gateways."""

    inference_pool: str | None = Field(
        default=None, description="Name of the InferencePool; absent: it could not be made."
    )
    http_route: str | None = Field(
        default=None, description="Name of the HTTPRoute; absent: none is asked for, or made."
    )
