"""Pools that stand alone and the ModelServices that select them, on a real API server."""

from collections.abc import Iterator

import pytest
from kube_api import KubeApi, kube_api, needs_kube_api
from kube_operator import is_quiet, operator, wait_for
from operator_builders import condition_of, make_object

pytestmark = [needs_kube_api, pytest.mark.slow, pytest.mark.timeout(300)]

MODEL = {"name": "tiny", "source": {"hostPath": {"path": "/models/tiny"}}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("selection")) as found:
        yield found


SECRETS = {"tlsSecret": "chat-kvasir-tls", "kvKeySecret": "chat-kvasir-kv-key"}


def apply(api: KubeApi, kind: str, name: str, *, check: bool = True, **spec: object) -> str:
    made = make_object(kind, name, {"model": MODEL, **spec})
    made["metadata"] = {"name": name, "namespace": "default"}
    return str(api.apply(made, check=check))


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_template_and_a_selection_are_refused(api: KubeApi, part: str) -> None:
    both = {part: {"replicas": 2}, f"{part}Pools": [{"name": "gpu"}]}
    message = f"only one of {part} and {part}Pools may be set"
    assert message in apply(api, "ModelService", "bad", check=False, **both)
    twice = [{"name": "gpu"}, {"name": "gpu"}]
    refusal = apply(api, "ModelService", "bad", check=False, **{f"{part}Pools": twice})
    assert "Duplicate value" in refusal


def test_a_selected_pool_that_comes_goes_and_differs_is_told(api: KubeApi) -> None:
    def problem() -> tuple[str, str]:
        status = api.json("msvc", "chat").get("status", {})
        found = condition_of(status, "Degraded") if status.get("conditions") else {}
        return found.get("reason", ""), found.get("message", "")

    with operator(api, "a") as process:
        pools = {"prefillPools": [{"name": "l40"}, {"name": "a100"}], "networkPolicy": False}
        apply(api, "PrefillPool", "a100", replicas=2, **SECRETS)
        apply(api, "ModelService", "chat", **pools)
        missing = ("PoolNotFound", "PrefillPool l40 does not exist")
        wait_for("the missing pool to be told", lambda: problem() == missing)
        apply(api, "PrefillPool", "l40", replicas=3, **SECRETS)
        wait_for("both pools", lambda: problem()[0] == "NoProblem")
        counts = api.json("msvc", "chat")["status"]["prefill"]
        assert counts == {"replicas": 5, "readyReplicas": 0, "summary": "0/5"}
        pool = api.json("pfp", "l40")
        assert "ownerReferences" not in pool["metadata"]
        assert pool["spec"]["replicas"] == 3
        router = api.json("deployment", "chat-router")["spec"]["template"]["spec"]["containers"][0]
        assert "dns:l40.default.svc:50051" in router["args"]
        apply(api, "ModelService", "late", prefillPools=[{"name": "l40"}])
        api("wait", "--for=condition=Degraded", "msvc/late", "--timeout=30s")
        late = condition_of(api.json("msvc", "late")["status"], "Degraded")
        assert (late["reason"], late["message"]) == (
            "PoolTaken",
            "PrefillPool l40 takes part in ModelService chat",
        )
        api("delete", "msvc", "late", "--wait=true")
        wait_for("nothing left to write", lambda: is_quiet(api, process))
        api("delete", "pfp", "l40")
        wait_for("the deleted pool to be told", lambda: problem() == missing)
        api("delete", "msvc", "chat")
        assert api.json("pfp", "a100")["spec"]["replicas"] == 2, "it stays without the service"
        wait_for("a pool to keep the Secrets", lambda: owners(api) == ["a100"] * 2)
        apply(api, "ModelService", "chat", prefillPools=[{"name": "a100"}])
        wait_for("them to be taken over", lambda: owners(api) == ["a100", "a100", "chat", "chat"])
        wait_for("no problem", lambda: problem()[0] == "NoProblem")


def owners(api: KubeApi) -> list[str]:
    secrets = api.json("secret", *SECRETS.values())["items"]
    references = [r for secret in secrets for r in secret["metadata"]["ownerReferences"]]
    return sorted(reference["name"] for reference in references)
