"""The sample serves: chat, hand-over, reuse; and an idle operator does nothing."""

import time
from functools import partial

import pytest
from conftest import Images
from e2e_chat import QUESTION, chat, system, tell, user
from e2e_cluster import KINDS, SERVICE, operator_metric, patch, wait_until_settled
from e2e_shell import ROOT, Kubectl, say, wait_for
from kvasir_cli.demo import SYSTEM


@pytest.mark.timeout(600)
def test_sample_becomes_ready(kubectl: Kubectl, images: Images) -> None:
    sample = (ROOT / "docs/samples/smollm2.yaml").read_text()
    sample = sample.replace("kvasir-model-smollm2:dev", images.model)
    kubectl("apply", "-f", "-", stdin=sample)
    kubectl("wait", "--for=condition=Available", SERVICE, "--timeout=480s", limit_s=490)
    wait_until_settled(kubectl)
    kubectl("get", KINDS)
    kubectl("get", "pods", "-o", "wide")
    wait_for("2/2 decode workers", partial(_has_decode_workers, kubectl, "2/2"), limit_s=60)


def _has_decode_workers(kubectl: Kubectl, summary: str) -> bool:
    return bool(kubectl.json(SERVICE)["status"]["decode"]["summary"] == summary)


@pytest.mark.timeout(300)
def test_describe_tells_the_state(kubectl: Kubectl) -> None:
    words = "the router and every pool are ready"
    describe = partial(kubectl, "describe", SERVICE, quiet=True)
    wait_for(words, lambda: words in describe(), limit_s=60)
    text = kubectl("describe", SERVICE)
    assert "Endpoint:" in text
    assert "smollm2-router" in text


@pytest.mark.timeout(300)
def test_streamed_chat_through_the_service(router: str) -> None:
    answer = chat(router)
    tell(answer)
    assert "Paris" in answer.text
    assert answer.num_chunks > 3, "the answer came in one piece"
    tell(chat(router, max_tokens=None))  # bounded by the model and the workers' memory


@pytest.mark.timeout(300)
def test_long_prompt_is_handed_over_and_reused(router: str) -> None:
    """Several prompts: while the machine is busy a router may prefer one worker for both."""
    for manner in ("", "Be brief. ", "Be kind. ", "Be exact. "):
        told = system(manner + SYSTEM)
        first = chat(router, told, user(QUESTION))
        tell(first)
        if first.stats["kv_bytes_moved"] > 0:
            break
    assert "Paris" in first.text
    assert first.stats["prefill_worker"].startswith("smollm2-prefill-")
    assert first.stats["decode_worker"].startswith("smollm2-decode-")
    assert first.stats["kv_bytes_moved"] > 0
    answered = {"role": "assistant", "content": first.text}
    asked = user("What is the capital of Italy?")
    second = chat(router, told, user(QUESTION), answered, asked)
    tell(second)
    assert "Rome" in second.text
    assert second.usage["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.timeout(300)
def test_index_is_reached_with_a_certificate_only(kubectl: Kubectl) -> None:
    shell = partial(kubectl, "exec", "deployment/smollm2-redis", "--", "redis-cli")
    wait_for(
        "blocks in the index",
        lambda: int(shell("-s", "/tmp/redis.sock", "dbsize", quiet=True)) > 0,
        limit_s=60,
    )
    shell("-p", "6379", "ping", expect_failure=True)
    shell("--tls", "--cacert", "/tls/ca.crt", "-p", "6379", "ping", expect_failure=True)
    shown = ("--cert", "/tls/tls.crt", "--key", "/tls/tls.key")
    assert "PONG" in shell("--tls", "--cacert", "/tls/ca.crt", *shown, "-p", "6379", "ping")


@pytest.mark.timeout(600)
def test_idle_operator_writes_nothing(kubectl: Kubectl, operator: Kubectl) -> None:
    """Three tries: a probe that fails once on a busy machine is a change that must be written."""
    writes = [_writes_of_four_reconciles(kubectl, operator)]
    while writes[-1] and len(writes) < 3:
        writes.append(_writes_of_four_reconciles(kubectl, operator))
    say(f"writes in four reconciles: {writes}")
    assert writes[-1] == 0


def _writes_of_four_reconciles(kubectl: Kubectl, operator: Kubectl) -> float:
    writes = _num_writes(operator)
    reconciles = operator_metric(operator, "kvasir_operator_reconciles_total")
    kubectl("annotate", KINDS, "--all", "--overwrite", f"e2e/touched={time.time_ns()}")
    wait_for(
        "four more reconciles",
        lambda: operator_metric(operator, "kvasir_operator_reconciles_total") >= reconciles + 4,
        limit_s=120,
    )
    return _num_writes(operator) - writes


def _num_writes(operator: Kubectl) -> float:
    """Writes of the operator, but for the leader's Lease, which it renews every few seconds."""
    return operator_metric(operator, "kvasir_operator_api_writes_total", kind="!Lease")


@pytest.mark.timeout(300)
def test_drift_is_repaired_and_foreign_fields_stay(kubectl: Kubectl) -> None:
    labels = {"labels": {"team": "x"}}
    drift = {"spec": {"publishNotReadyAddresses": False}, "metadata": labels}
    patch(kubectl, "service/smollm2-decode", drift)

    def is_repaired() -> bool:
        service = kubectl.json("service/smollm2-decode")
        assert service["metadata"]["labels"]["team"] == "x"
        return bool(service["spec"].get("publishNotReadyAddresses"))

    wait_for("the Service to be repaired", is_repaired, limit_s=90)
