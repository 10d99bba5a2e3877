"""The pods of every part: containers, probes, volumes and the security context.

All run one image as one unprivileged user, with a read-only root file system and without
capabilities (Pod Security "restricted").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvasir_operator.api import ImageSettings
from kvasir_operator.api_base import ApiModel
from kvasir_operator.api_pods import PodSettings, Resources
from kvasir_operator.api_types import Model, ModelSource
from kvasir_operator.core.manifests import POOL_LABEL, TLS_ANNOTATION, Manifest, without_empty
from kvasir_operator.core.problems import MODEL_CONTAINER, MODEL_VOLUME

USER_ID = 10001
MODEL_FOLDER = "/model"
TLS_FOLDER, TLS_VOLUME = "/tls", "kvasir-tls"
KV_SOCKET_FOLDER, KV_SOCKET_VOLUME = "/kv-sockets", "kvasir-kv-sockets"
KV_KEY_FOLDER, KV_KEY_VOLUME, KV_KEY_FILE = "/kv-key", "kvasir-kv-key", "kv.key"
TLS_FILES = ("tls.crt", "tls.key", "ca.crt")
SECRET_FILE_MODE = 0o440  # by fsGroup, the pod's user reads it
NEAR_WEIGHT = 100  # of 100: other preferences of the scheduler count less
GRACE_MARGIN_S = 15  # after a drain: closing connections and leaving
START_PERIOD_S, START_FAILURES_MAX = 2, 450  # a large model may take 15 minutes to load

COPY_ALL = 'cp -R "$0/." "$1/"'
COPY_SMALL = (  # the router needs the tokenizer, not the weights
    'cd "$0" && for f in *; do case "$f" in *.safetensors|*.gguf|*.bin|*.pt) ;; '
    '*) cp -R "$f" "$1/" || exit 1 ;; esac; done'
)


@dataclass(frozen=True, slots=True)
class Engine:
    """A server in the same pod that computes for the part: the part's settings are its own.

    It is a sidecar of Kubernetes (1.29 or newer): it starts before the part and, so that the part
    can drain, ends after it.
    """

    name: str
    image: str
    command: Sequence[str]
    args: Sequence[str]
    env: Mapping[str, str]
    alive: Sequence[str]  # a command that succeeds while it serves
    part_resources: Resources  # of the part itself


@dataclass(frozen=True, slots=True)
class Part:
    """What distinguishes the pods of one part from those of another."""

    name: str  # of the container
    args: Sequence[str]
    ports: Mapping[str, int]
    settings: PodSettings
    image: ImageSettings
    default_image: str
    service_account: str
    command: Sequence[str] = ()
    model: Model | None = None
    needs_weights: bool = False
    probe_port: str = "http"  # "" for none over HTTP
    tcp_probe_port: str = ""
    probe_command: Sequence[str] = ()  # instead of both
    grace_s: int = 30
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, Manifest] = field(default_factory=dict)
    """Keys of Secrets by the variables that take them; never in args: ps shows those."""
    engine: Engine | None = None
    near: tuple[str, str] | None = None  # a pool to be near to, and the label of the domains
    volumes: Sequence[Manifest] = ()  # of its own, besides those of its settings
    mounts: Sequence[Manifest] = ()
    tls_secret: str = ""  # whose certificate it shows to other parts; "" for plain links
    takes_links: bool = True  # it is told of the certificate as all of Kvasir's own programs are
    kv_key_secret: str = ""  # whose key encrypts KV blocks; "": they are not encrypted
    kv_socket_host_path: str = ""  # the node's folder of sockets; "": KV moves over TCP


def pod_template(part: Part, labels: dict[str, str]) -> Manifest:
    """The pod template of a part."""
    source = part.model.source if part.model else None
    marks = {"annotations": {TLS_ANNOTATION: part.tls_secret}} if part.tls_secret else {}
    return {
        "metadata": {"labels": {**labels, "app.kubernetes.io/component": part.name}, **marks},
        "spec": without_empty(
            {
                "serviceAccountName": part.service_account,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": part.grace_s,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": USER_ID,
                    "runAsGroup": USER_ID,
                    "fsGroup": USER_ID,
                    "fsGroupChangePolicy": "OnRootMismatch",
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "imagePullSecrets": [{"name": n} for n in part.image.image_pull_secrets],
                "nodeSelector": dict(part.settings.node_selector),
                "tolerations": [_as_written(t) for t in part.settings.tolerations],
                "affinity": _affinity(part),
                "topologySpreadConstraints": [
                    {
                        **spread.model_dump(by_alias=True),
                        "labelSelector": {"matchLabels": labels},
                    }
                    for spread in part.settings.topology_spread
                ],
                "initContainers": [
                    *_model_copier(part, source),
                    *_socket_folder_owner(part),
                    *_engine(part),
                ],
                "containers": [_container(part)],
                "volumes": [
                    {"name": "tmp", "emptyDir": {}},
                    *([_model_volume(source)] if source else []),
                    *_secret_volumes(part),
                    *_socket_volumes(part),
                    *part.volumes,
                    *(_as_written(volume) for volume in part.settings.volumes),
                ],
            }
        ),
    }


def _affinity(part: Part) -> Manifest:
    if part.near is None:
        return {}
    pool, key = part.near
    term = {"labelSelector": {"matchLabels": {POOL_LABEL: pool}}, "topologyKey": key}
    preferred = [{"weight": NEAR_WEIGHT, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def _container(part: Part) -> Manifest:
    """The part's own container; beside an engine, what users set is for the engine."""
    settings = part.settings
    if part.engine is not None:
        settings = PodSettings(resources=part.engine.part_resources)
    secure = ["--tls-dir", TLS_FOLDER] if part.tls_secret and part.takes_links else []
    if part.kv_key_secret:
        secure += ["--kv-key-file", f"{KV_KEY_FOLDER}/{KV_KEY_FILE}"]
    sockets = ["--kv-socket-dir", KV_SOCKET_FOLDER] if part.kv_socket_host_path else []
    return without_empty(
        {
            "name": part.name,
            "image": part.image.image or part.default_image,
            "imagePullPolicy": part.image.image_pull_policy,
            "command": list(part.command),
            "args": [*part.args, *secure, *sockets, *settings.args],
            "env": _env(part, settings),
            "ports": [
                {"name": name, "containerPort": port, "protocol": "TCP"}
                for name, port in part.ports.items()
            ],
            "resources": settings.resources.model_dump(exclude_defaults=True),
            "securityContext": _locked_down(),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                *_mounts(part, settings),
                *_secret_mounts(part),
                *_socket_mounts(part),
                *part.mounts,
            ],
            **_probes(part),
        }
    )


def _engine(part: Part) -> list[Manifest]:
    """The sidecar that computes, if there is one."""
    engine, settings = part.engine, part.settings
    if engine is None:
        return []
    alive = {"exec": {"command": list(engine.alive)}, "timeoutSeconds": 10}
    start = {"periodSeconds": START_PERIOD_S, "failureThreshold": START_FAILURES_MAX}
    env = {
        **{name: {"value": value} for name, value in engine.env.items()},
        **{v.name: without_empty(_as_written(v)) for v in settings.env},
    }
    container = {
        "name": engine.name,
        "image": engine.image,
        "imagePullPolicy": part.image.image_pull_policy,
        "restartPolicy": "Always",
        "command": list(engine.command),
        "args": [*engine.args, *settings.args],
        "env": [{"name": name, **value} for name, value in env.items()],
        "resources": settings.resources.model_dump(exclude_defaults=True),
        "securityContext": _locked_down(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(part, settings),
        "startupProbe": {**alive, **start},
        "livenessProbe": {**alive, "periodSeconds": 30, "failureThreshold": 4},
    }
    return [without_empty(container)]


def _mounts(part: Part, settings: PodSettings) -> list[Manifest]:
    mounts: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]
    if part.model is not None:
        mounts.append(_model_mount(part.model.source))
    return mounts + [_as_written(mount) for mount in settings.volume_mounts]


def _env(part: Part, settings: PodSettings) -> list[Manifest]:
    downward = {
        "KVASIR_POD_NAME": "metadata.name",
        "KVASIR_POD_UID": "metadata.uid",
        "KVASIR_POD_IP": "status.podIP",
    }
    given: dict[str, Manifest] = {
        **{
            name: {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
            for name, path in downward.items()
        },
        **{name: {"valueFrom": {"secretKeyRef": key}} for name, key in part.secret_env.items()},
        **{name: without_empty({"value": value}) for name, value in part.env.items()},
        **{variable.name: without_empty(_as_written(variable)) for variable in settings.env},
    }
    return [{"name": name, **value} for name, value in given.items()]


def _as_written(part: ApiModel) -> Manifest:
    """A piece of the spec that a pod has in the same form; false is not stored, so not said."""
    return _without_false(part.model_dump(mode="json", by_alias=True, exclude_none=True))


def _without_false(body: Manifest) -> Manifest:
    return {
        key: _without_false(value) if isinstance(value, dict) else value
        for key, value in body.items()
        if value is not False
    }


def _probes(part: Part) -> Manifest:
    if part.probe_command:  # a process each time: a busy node may take a while
        action: Manifest = {"exec": {"command": list(part.probe_command)}}
        return {
            "readinessProbe": {**action, "periodSeconds": 5, "timeoutSeconds": 10},
            "livenessProbe": {
                **action,
                "periodSeconds": 20,
                "timeoutSeconds": 20,
                "failureThreshold": 6,
            },
        }
    if not part.probe_port:
        action = {"tcpSocket": {"port": part.tcp_probe_port}}
        return {
            "readinessProbe": {**action, "periodSeconds": 2, "timeoutSeconds": 3},
            "livenessProbe": {**action, "periodSeconds": 10, "timeoutSeconds": 5},
        }
    alive = {"httpGet": {"path": "/healthz", "port": part.probe_port}}
    ready = {"httpGet": {"path": "/readyz", "port": part.probe_port}}
    return {
        "startupProbe": {
            **alive,
            "periodSeconds": START_PERIOD_S,
            "timeoutSeconds": 5,
            "failureThreshold": START_FAILURES_MAX,
        },
        "readinessProbe": {**ready, "periodSeconds": 2, "timeoutSeconds": 5},
        "livenessProbe": {
            **alive,
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 6,
        },
    }


def _locked_down() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _model_volume(source: ModelSource) -> Manifest:
    if source.host_path is not None:
        volume: Manifest = {"hostPath": {"path": source.host_path.path, "type": "Directory"}}
    elif source.pvc is not None:
        claim = {"claimName": source.pvc.claim_name, "readOnly": True}
        volume = {"persistentVolumeClaim": claim}
    elif source.image is not None and source.image.as_volume:
        image = {"reference": source.image.reference, "pullPolicy": source.image.pull_policy}
        volume = {"image": image}
    else:
        volume = {"emptyDir": {}}
    return {"name": MODEL_VOLUME, **volume}


def _secret_mounts(part: Part) -> list[Manifest]:
    mounts = []
    if part.tls_secret:
        mounts.append({"name": TLS_VOLUME, "mountPath": TLS_FOLDER, "readOnly": True})
    if part.kv_key_secret:
        mounts.append({"name": KV_KEY_VOLUME, "mountPath": KV_KEY_FOLDER, "readOnly": True})
    return mounts


def _secret_volumes(part: Part) -> list[Manifest]:
    """What parts read of Secrets: not the certificate that is still to come."""
    volumes = []
    if part.tls_secret:
        volumes.append(_secret_volume(TLS_VOLUME, part.tls_secret, TLS_FILES))
    if part.kv_key_secret:
        volumes.append(_secret_volume(KV_KEY_VOLUME, part.kv_key_secret, (KV_KEY_FILE,)))
    return volumes


def _secret_volume(name: str, secret: str, files: Sequence[str]) -> Manifest:
    items = [{"key": file, "path": file} for file in files]
    body = {"secretName": secret, "items": items, "defaultMode": SECRET_FILE_MODE}
    return {"name": name, "secret": body}


def _model_mount(source: ModelSource) -> Manifest:
    mount = {"name": MODEL_VOLUME, "mountPath": MODEL_FOLDER, "readOnly": True}
    if source.pvc is not None and source.pvc.path:
        mount["subPath"] = source.pvc.path
    if source.image is not None and source.image.as_volume:
        mount["subPath"] = source.image.path.strip("/")
    return mount


def _model_copier(part: Part, source: ModelSource | None) -> list[Manifest]:
    """The init container that copies the model out of its image into the pod."""
    if source is None or source.image is None or source.image.as_volume:
        return []
    script = COPY_ALL if part.needs_weights else COPY_SMALL
    return [
        {
            "name": MODEL_CONTAINER,
            "image": source.image.reference,
            "imagePullPolicy": source.image.pull_policy,
            "command": ["/bin/sh", "-c", script, source.image.path, "/copy"],
            "securityContext": _locked_down(),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{"name": MODEL_VOLUME, "mountPath": "/copy"}],
        }
    ]


def _socket_volumes(part: Part) -> list[Manifest]:
    """The node's folder where pods find one another's sockets."""
    if not part.kv_socket_host_path:
        return []
    folder = {"path": part.kv_socket_host_path, "type": "DirectoryOrCreate"}
    return [{"name": KV_SOCKET_VOLUME, "hostPath": folder}]


def _socket_mounts(part: Part) -> list[Manifest]:
    if not part.kv_socket_host_path:
        return []
    return [{"name": KV_SOCKET_VOLUME, "mountPath": KV_SOCKET_FOLDER}]


def _socket_folder_owner(part: Part) -> list[Manifest]:
    """The init container that gives the folder, made by the kubelet as root's, to the pods' user.

    Only that user may enter it: whoever connects to a socket may read the blocks behind it.
    """
    if not part.kv_socket_host_path:
        return []
    owner = ["-o", str(USER_ID), "-g", str(USER_ID)]
    capabilities = {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}
    as_root = {"runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}
    return [
        {
            "name": "kv-sockets",
            "image": part.image.image or part.default_image,
            "imagePullPolicy": part.image.image_pull_policy,
            "command": ["install", "-d", "-m", "0700", *owner, KV_SOCKET_FOLDER],
            "securityContext": {**_locked_down(), **as_root, "capabilities": capabilities},
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": _socket_mounts(part),
        }
    ]
