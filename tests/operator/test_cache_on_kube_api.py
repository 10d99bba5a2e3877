"""The caches against a real API server: own writes show at once, those of others soon."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from kube_api import KubeApi, kube_api, needs_kube_api
from kvasir_operator.cache import CachedCluster
from kvasir_operator.cluster import KubeCluster
from kvasir_operator.core.manifests import Manifest, Owner, Ref, child, ref_of, role_labels
from kvasir_operator.core.store import Entry, Key
from kvasir_operator.watch import WATCHED, Reflector
from operator_builders import make_object

pytestmark = [needs_kube_api, pytest.mark.slow, pytest.mark.timeout(300)]
OWNER = Owner("kvasir.dev/v1alpha1", "DecodePool", "default", "chat", "uid-of-chat")
LABELS = role_labels(OWNER, "decode")
SERVICE = Ref("Service", "default", "chat")
LIMIT_S = 60
TLS_CLOSES_S = 0.5


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    with kube_api(tmp_path_factory.mktemp("kube")) as found:
        yield found


@pytest.fixture
async def kube(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubeCluster]:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    client = KubeCluster(timeout_s=30)
    yield client
    await close(client)


async def close(client: KubeCluster) -> None:
    """Close the connections; those with TLS end a moment later, in the background."""
    await client.close()
    await asyncio.sleep(TLS_CLOSES_S)


class Watching:
    """A cluster with caches, and what it has said is news."""

    def __init__(self, kube: KubeCluster) -> None:
        self.news: list[Ref] = []
        self.has_news = asyncio.Event()
        self.cluster = CachedCluster(kube, namespaces=(), on_news=self._tell)

    async def until(self, ref: Ref, holds: Callable[[Manifest | None], bool]) -> None:
        """Wait until what is read of an object is so."""
        async with asyncio.timeout(LIMIT_S):
            while not holds(await self.cluster.get(ref)):
                self.has_news.clear()
                await self.has_news.wait()

    def _tell(self, ref: Ref) -> None:
        self.news.append(ref)
        self.has_news.set()


@pytest.fixture
async def watching(api: KubeApi, kube: KubeCluster) -> AsyncIterator[Watching]:
    api("delete", "service", "chat", "--ignore-not-found")
    found = Watching(kube)
    running = asyncio.create_task(found.cluster.run())
    async with asyncio.timeout(LIMIT_S):
        await found.cluster.wait_until_synced()
    yield found
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def make_port(port: int) -> Manifest:
    spec = {"selector": LABELS, "ports": [{"name": "http", "port": port}]}
    service = child(OWNER, "v1", "Service", name="chat", labels=LABELS, spec=spec)
    del service["metadata"]["ownerReferences"]  # or it is collected: there is no such owner
    return service


async def test_own_writes_show_in_the_next_read(watching: Watching) -> None:
    cluster = watching.cluster
    for port in range(8001, 8021):
        await cluster.apply(make_port(port))
        found = await cluster.get(SERVICE)
        assert found is not None
        assert found["spec"]["ports"][0]["port"] == port
        assert [ref_of(o) for o in await cluster.list("Service", "default", labels=LABELS)] == [
            SERVICE
        ]
        await cluster.delete(SERVICE)
        assert await cluster.get(SERVICE) is None
    assert set(watching.news) == {OWNER.ref}


async def test_changes_of_others_arrive(api: KubeApi, watching: Watching) -> None:
    await watching.cluster.apply(make_port(8001))
    api("annotate", "service", "chat", "seen=1")
    await watching.until(SERVICE, lambda o: o is not None and "annotations" in o["metadata"])
    api("delete", "service", "chat")
    await watching.until(SERVICE, lambda o: o is None)
    assert watching.news[-1] == OWNER.ref


async def test_object_of_somebody_else_is_fetched_not_cached(
    api: KubeApi, watching: Watching
) -> None:
    api("create", "service", "clusterip", "chat", "--tcp=80:80")
    assert await watching.cluster.fetch(SERVICE) is not None
    assert await watching.cluster.get(SERVICE) is None


async def test_own_status_shows_and_is_news_for_the_owner(api: KubeApi, watching: Watching) -> None:
    pool = make_object(
        "DecodePool", "own", {"model": {"name": "m", "source": {"pvc": {"claimName": "c"}}}}
    )
    pool["metadata"] = {
        "name": "own",
        "namespace": "default",
        "labels": {"kvasir.dev/model-service": "chat"},
    }
    api.apply(pool)
    ref, service = Ref("DecodePool", "default", "own"), Ref("ModelService", "default", "chat")
    await watching.until(ref, lambda o: o is not None)
    watching.news.clear()
    await watching.cluster.apply_status(ref, {"observedGeneration": 1})
    assert service in watching.news
    found = await watching.cluster.get(ref)
    assert found is not None
    assert found["status"]["observedGeneration"] == 1


class Outdated(KubeCluster):
    """Its first list is one that the API server has long forgotten."""

    is_first = True

    async def pages(
        self, kind: str, namespace: str, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[list[Manifest], int]]:
        if self.is_first:
            self.is_first = False
            yield [make_object("DecodePool", "ghost", {}, resourceVersion="1")], 1
            return
        async for page in super().pages(kind, namespace, labels=labels, fields=fields):
            yield page


async def test_version_that_is_too_old_takes_a_new_list(kube: KubeCluster) -> None:
    client, is_gone = Outdated(timeout_s=30), asyncio.Event()
    news: list[str] = []

    def tell(entry: Entry) -> None:
        news.append(entry.key.name)
        if news.count("ghost") == 2:
            is_gone.set()

    # the API server keeps versions of a custom resource from its definition on: 1 was before it
    reflector = Reflector(client, "DecodePool", "", on_news=tell, watched=WATCHED["DecodePool"])
    running = asyncio.create_task(reflector.run())
    async with asyncio.timeout(LIMIT_S):
        await is_gone.wait()
    assert reflector.store.get(Key("default", "ghost")) is None
    assert reflector.store.version > 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await close(client)
