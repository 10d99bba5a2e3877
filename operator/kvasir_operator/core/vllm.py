"""Workers whose engine is vLLM: the server's container.

vLLM listens on the pod's loopback alone: only the worker beside it can ask it anything.
"""

import json

from kvasir_operator.api import WorkerPoolSpec
from kvasir_operator.api_types import VllmSettings
from kvasir_operator.core.pods import MODEL_FOLDER, Engine

PORT = 8000
VLLM_URL = f"http://127.0.0.1:{PORT}"
EVENTS_URL, REPLAY_URL = "ipc:///tmp/kv-events", "ipc:///tmp/kv-replay"
"""Sockets in the folder that both containers have; nobody else reaches them."""

BLOCK_TOKENS = 32  # as Kvasir's blocks: vLLM's can then be named
KV_EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": EVENTS_URL,
        "replay_endpoint": REPLAY_URL,
    }
)
ALIVE = f"import urllib.request as r; r.urlopen('{VLLM_URL}/health', timeout=8)"
ENV = {  # the root file system is read-only, and the user has no name in the image
    "HOME": "/tmp",
    "USER": "kvasir",
    "XDG_CACHE_HOME": "/tmp/cache",
    "XDG_CONFIG_HOME": "/tmp/config",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_engine(spec: WorkerPoolSpec, vllm: VllmSettings) -> Engine:
    """The container of vLLM."""
    return Engine(
        name="vllm",
        image=vllm.image,
        command=("vllm", "serve"),
        args=(
            MODEL_FOLDER,
            *("--served-model-name", spec.model.name),
            *("--host", "127.0.0.1"),
            *("--port", str(PORT)),
            "--enable-prompt-tokens-details",
            *("--block-size", str(BLOCK_TOKENS)),
            *("--kv-events-config", KV_EVENTS),
        ),
        env=ENV,
        alive=("python3", "-c", ALIVE),
        part_resources=vllm.worker_resources,
    )
