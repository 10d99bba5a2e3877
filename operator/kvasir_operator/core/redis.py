"""The Redis that the operator runs for a service: its URL, and the objects around its pod.

Where the parts of the service show certificates, Redis does, too, and demands them; it then has no
plain port. Its own socket, in its pod, lets it be told of renewed certificates: it would read them
at its start only. Probes ask there as well: Redis logs a connection without TLS as an error.
"""

from collections.abc import Sequence

from kvasir_operator.api import ModelServiceSpec
from kvasir_operator.api_pods import PodSettings
from kvasir_operator.core import children as make
from kvasir_operator.core.manifests import REDIS_PORT, Manifest, Owner, role_labels
from kvasir_operator.core.pods import TLS_FOLDER, Part
from kvasir_operator.core.slots import link_secret, own_redis_url
from kvasir_operator.core.world import World

SOCKET = "/tmp/redis.sock"
RENEW_INTERVAL_S = 10
SERVE_AND_RENEW = """\
folder=$0 socket=$1 interval=$2; shift 3
redis-server "$@" & server=$!
trap 'kill -TERM $server $!; wait $server; exit $?' TERM INT
files() { cat "$folder/tls.crt" "$folder/tls.key" "$folder/ca.crt" | cksum; }
seen=$(files)
while kill -0 $server 2>/dev/null; do
  sleep "$interval" & wait $!
  now=$(files)
  [ "$now" = "$seen" ] && continue
  told=$(redis-cli -s "$socket" config set tls-ca-cert-file "$folder/ca.crt" 2>&1)
  echo "certificates changed: $told"
  [ "$told" = OK ] && seen=$now
done
wait $server
"""


def index_of(owner: Owner, spec: ModelServiceSpec) -> Manifest:
    """Where the pools find the index of blocks."""
    if spec.kv_cache is None:
        return {}
    if spec.redis.url_secret_ref is not None:
        return {"redisUrlSecretRef": spec.redis.url_secret_ref.model_dump()}
    return {"redisUrl": spec.redis.url or own_redis_url(owner, spec)}


def redis_children(world: World, spec: ModelServiceSpec) -> list[Manifest]:
    """Its Deployment, Service and NetworkPolicy; none where there is a Redis already."""
    if spec.kv_cache is None or spec.redis.url or spec.redis.url_secret_ref:
        return []
    owner, name = world.owner, f"{world.owner.name}-redis"
    labels = role_labels(owner, "redis")
    secret = link_secret(owner.name, spec)
    settings = (
        *(tls_args(TLS_FOLDER, SOCKET) if secret else ("--port", str(REDIS_PORT))),
        *("--bind", "0.0.0.0"),
        *("--protected-mode", "no"),  # reached by workers and KV nodes, from other pods
        *("--save", ""),  # the index is rebuilt from the workers' snapshots
        *("--appendonly", "no"),
        *("--maxmemory", f"{spec.redis.max_memory_mb}mb"),
        *("--maxmemory-policy", "allkeys-lru"),
        *("--dir", "/tmp"),
    )
    command = renewing_command(TLS_FOLDER, SOCKET) if secret else ("redis-server",)
    part = Part(
        name="redis",
        command=command,
        args=settings,
        ports={"redis": REDIS_PORT},
        settings=PodSettings(resources=spec.redis.resources),
        image=spec,
        default_image=world.default_image,
        service_account=owner.name,
        probe_port="",
        tcp_probe_port="redis",
        probe_command=("redis-cli", "-s", SOCKET, "ping") if secret else (),
        tls_secret=secret,
        takes_links=False,
    )
    made = [
        make.deployment(owner, name, labels, part, replicas=1),
        make.cluster_service(owner, name, labels, {"redis": REDIS_PORT}),
    ]
    if spec.network_policy:
        made.append(make.network_policy(owner, name, labels, inner_ports=("redis",)))
    return made


def tls_args(folder: str, socket: str, *, port: int = REDIS_PORT) -> tuple[str, ...]:
    """Settings of a redis-server that only those reach who show a certificate."""
    return (
        *("--port", "0"),
        *("--tls-port", str(port)),
        *("--tls-cert-file", f"{folder}/tls.crt"),
        *("--tls-key-file", f"{folder}/tls.key"),
        *("--tls-ca-cert-file", f"{folder}/ca.crt"),
        *("--tls-auth-clients", "yes"),
        *("--tls-protocols", "TLSv1.3"),
        *("--unixsocket", socket),
        *("--unixsocketperm", "700"),
    )


def renewing_command(
    folder: str, socket: str, *, interval_s: float = RENEW_INTERVAL_S
) -> Sequence[str]:
    """A command that runs redis-server with the arguments that follow, and renews its files."""
    return ("/bin/sh", "-c", SERVE_AND_RENEW, folder, socket, str(interval_s), "--")
