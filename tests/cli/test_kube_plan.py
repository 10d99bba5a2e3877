"""kvasir kube plan: objects and numbers without a cluster."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from kvasir_cli.commands.kube import kube
from kvasir_cli.errors import RefusedError

SERVICE = {
    "apiVersion": "kvasir.dev/v1alpha1",
    "kind": "ModelService",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"name": "m", "source": {"hostPath": {"path": "/m"}}},
        "prefill": {"replicas": 2, "resources": {"limits": {"memory": "2Gi"}}},
        "planner": {
            "assumedProfile": {
                "prefillUsPerToken": 160,
                "decodeBaseUs": 20_000,
                "decodeUsPerRequest": 500,
                "kvTokens": 200_000,
            }
        },
    },
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def plan(folder: Path, *args: str, **spec: object) -> Result:
    file = folder / "service.yaml"
    file.write_text(yaml.safe_dump({**SERVICE, "spec": {**SERVICE["spec"], **spec}}))
    return CliRunner().invoke(kube, ["plan", "-f", str(file), *args])


def test_everything_that_would_be_made_is_listed(tmp_path: Path) -> None:
    result = plan(tmp_path)
    assert result.exit_code == 0
    for name in ("Deployment chat-router x 1", "PrefillPool chat-prefill x 2", "ReplicaSet chat-"):
        assert name in result.output


def test_yaml_output_can_be_read_back(tmp_path: Path) -> None:
    documents = [d for d in yaml.safe_load_all(plan(tmp_path, "--yaml").output) if d]
    assert {"Deployment", "ReplicaSet", "Service"} <= {d["kind"] for d in documents}


def test_load_gives_numbers(tmp_path: Path) -> None:
    result = plan(tmp_path, "--rate", "12", "--prompt", "2000")
    assert "Growing" in result.output
    assert "prefill: 2 -> " in result.output
    assert "predicted ttftMs" in result.output


def test_worker_that_cannot_fit_is_a_problem(tmp_path: Path) -> None:
    model = {"name": "m", "source": {"hostPath": {"path": "/m"}}, "memoryMb": 4_000}
    result = plan(tmp_path, model=model)
    assert result.exit_code == 1
    assert "chat-prefill: no worker is made: a worker needs 4812 MiB" in result.output
    assert "chat-decode: no worker" not in result.output


def test_memory_is_counted_by_the_format_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    taken = {}
    for weights in ("bf16", "int8", "int4"):
        output = plan(tmp_path, "--model", str(tmp_path), weights=weights).output
        taken[weights] = int(re.findall(r"model takes (\d+) MiB", output)[0])
    weights_mb = 2 * 16 * 2048 * (4 * 2048 + 3 * 8192) >> 20
    assert weights_mb < taken["bf16"] < 1.3 * weights_mb
    assert taken["bf16"] - taken["int8"] > 0.45 * weights_mb
    assert taken["int8"] - taken["int4"] > 0.1 * weights_mb


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("apiVersion: v1\nkind: Pod\n", "no resource of kvasir.dev"),
        ("apiVersion: kvasir.dev/v1alpha1\nkind: Nothing\n", "has no kind Nothing"),
        (
            "apiVersion: kvasir.dev/v1alpha1\nkind: ModelService\nmetadata: {name: a}\n"
            "spec: {modle: {}}\n",
            "ModelService a: spec.",
        ),
    ],
    ids=["yaml", "foreign", "kind", "field"],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    result = CliRunner().invoke(kube, ["plan", "-f", str(file)])
    assert isinstance(result.exception, RefusedError)
    assert words in str(result.exception)


def test_rate_without_a_planner_is_refused(tmp_path: Path) -> None:
    result = plan(tmp_path, "--rate", "1", planner=None)
    assert isinstance(result.exception, RefusedError)


def test_secrets_are_told_by_name_and_type_only(tmp_path: Path) -> None:
    result = plan(tmp_path)
    assert "Secret chat-kvasir-tls (kubernetes.io/tls)" in result.output
    assert "Secret chat-kvasir-kv-key (Opaque)" in result.output
    output = plan(tmp_path, "--yaml").output
    assert "# Secret chat-kvasir-tls (kubernetes.io/tls)" in output
    assert "BEGIN" not in output
    given = plan(tmp_path, security={"secretName": "own"}).output
    assert "Secret chat-kvasir-kv-key" in given
    assert "Secret own" not in given
    assert "Secret" not in plan(tmp_path, security={"mtls": False}).output
