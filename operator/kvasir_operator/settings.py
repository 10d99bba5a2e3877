"""Settings of the operator process; each has a unit in its name and a reason beside it."""

from dataclasses import dataclass


class SettingsError(ValueError):
    """A setting is missing, unknown or out of range; the message names it."""


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """How one operator process runs."""

    image: str  # what pods run where the resource names no image: the operator's own
    namespaces: tuple[str, ...] = ()  # namespaces to watch; empty: all of them
    host: str = "127.0.0.1"  # address that /metrics, /healthz and /readyz listen on
    http_port: int = 8080
    lease_namespace: str = ""  # where the Lease of the leader is; empty: this process leads alone
    identity: str = ""  # this process in the Lease: the pod's name; empty: host name and a number
    webhook_port: int = 0  # of the validating webhook; 0: none. Needs lease_namespace
    webhook_service: str = "kvasir-operator-webhook"  # its Service, Secret and configuration
    shutdown_linger_s: float = 0.0  # the webhook answers on: the API server hears late of a stop
    resync_interval_s: float = 60.0  # what routers say of workers is looked at this often
    num_reconcilers: int = 16  # objects reconciled at the same time: most of it is waiting
    api_timeout_s: float = 15.0  # deadline of one call to the Kubernetes API

    def __post_init__(self) -> None:
        if not self.image:
            raise SettingsError("image: the image that pods run must be given")
        if not 0 <= self.http_port <= 65535:
            raise SettingsError(f"http_port: {self.http_port} is not a port")
        if not 0 <= self.webhook_port <= 65535:
            raise SettingsError(f"webhook_port: {self.webhook_port} is not a port")
        if self.webhook_port and not self.lease_namespace:
            raise SettingsError("webhook_port: needs lease_namespace, where its Secret is")
        if self.shutdown_linger_s < 0:
            raise SettingsError("shutdown_linger_s: must not be negative")
        if self.resync_interval_s < 1:
            raise SettingsError("resync_interval_s: must be at least 1 second")
        if not 1 <= self.num_reconcilers <= 64:
            raise SettingsError("num_reconcilers: must be between 1 and 64")
        if self.api_timeout_s <= 0:
            raise SettingsError("api_timeout_s: must be positive")
