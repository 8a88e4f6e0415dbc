"""Discovery against a server that speaks the list and watch protocol of Kubernetes, in order and out of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import discovery
from serving.discovery import Discovery, DiscoveryError, kubernetes_api, wait_s
from serving.endpointslices import EndpointSlice, Listing
from tests.support.kube_api import TOKEN, KubeApi, Slice, endpoint, endpoint_slice, recorded_slices
from tests.support.waiting import eventually_async

CHAT = Listing("inference", "penstock.io/pool=chat")
WAIT_S = 10.0


class Followed:
    """A server and a discovery that follows it."""

    def __init__(self, api: KubeApi, found: Discovery) -> None:
        self.api, self.discovery = api, found

    def slices(self) -> dict[str, EndpointSlice]:
        return dict(self.discovery.slices().get(CHAT, {}))

    def addresses(self) -> set[str]:
        return {
            endpoint.addresses[0]
            for each in self.slices().values()
            for endpoint in each.endpoints or ()
            if endpoint.is_usable
        }

    async def until(self, what: Callable[[], object], called: str) -> None:
        async def probe() -> object:
            return what()

        await eventually_async(probe, WAIT_S, called)

    async def watching(self) -> None:
        await self.until(lambda: self.api.watches == 1, "a watch")


@asynccontextmanager
async def following(monkeypatch: pytest.MonkeyPatch, *slices: Slice) -> AsyncIterator[Followed]:
    async with KubeApi(slices) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        found = Discovery(lambda: None)
        found.watch([CHAT])
        try:
            yield Followed(api, found)
        finally:
            await found.stop()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits after failures are short here."""
    monkeypatch.setattr(discovery, "LEAST_WAIT_S", 0.01)
    monkeypatch.setattr(discovery, "MOST_WAIT_S", 0.05)


def chat(name: str, *addresses: str, pool: str = "chat") -> Slice:
    return endpoint_slice(name, [endpoint(address) for address in addresses], pool=pool)


async def test_what_is_there_is_listed_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing longer than a page is read whole, and of one version; other pools' slices are not in it."""
    monkeypatch.setattr(discovery, "PAGE_SLICES", 2)
    other = endpoint_slice("other", [endpoint("10.9.9.9")], pool="embeddings")
    async with following(monkeypatch, *recorded_slices(), chat("one", "10.0.0.1"), other) as followed:
        assert await followed.discovery.listed_once(WAIT_S)

        assert set(followed.slices()) == {"engine-h100-7kq2m", "engine-h100-x9d4t", "engine-h200-5hzlw", "one"}
        assert followed.api.lists == 2


async def test_changes_arrive_by_watch_from_the_version_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added, changed, removed, and relabelled out of the selection: each is seen without another list."""
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        api = followed.api
        await followed.watching()
        assert api.requests[-1]["resourceVersion"] == api.version
        api.apply(chat("b", "10.0.0.2"))
        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.2"}, "the addition")
        api.apply(chat("b", "10.0.0.3"))
        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.3"}, "the change")
        api.remove("a")
        await followed.until(lambda: followed.addresses() == {"10.0.0.3"}, "the removal")
        api.apply(chat("b", "10.0.0.3", pool="embeddings"))
        await followed.until(lambda: not followed.addresses(), "the end of the selection")
        assert api.lists == 1


@pytest.mark.parametrize("gone_as", ["status", "event"])
async def test_410_gone_is_mended_by_a_list(monkeypatch: pytest.MonkeyPatch, gone_as: str) -> None:
    """History that the server forgot is read anew, whether 410 comes as the answer or as an ERROR event."""
    monkeypatch.setattr(discovery, "WATCH_S", 2)
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        followed.api.apply_unseen(chat("b", "10.0.0.2"))
        followed.api.advance(10)
        followed.api.forget_history("status" if gone_as == "status" else "event")
        followed.api.cut_watches()

        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.2"}, "the second list")


async def test_a_watch_from_a_forgotten_version_lists_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that starts too late is told 410, and is no reason to give up or to be loud."""
    real = KubeApi._list

    forgets = iter(["status", "event"])

    def list_then_forget(self: KubeApi, *args: object) -> object:
        answer = real(self, *args)  # type: ignore[arg-type] # whatever the server hands on
        how = next(forgets, None)
        if how is not None:
            self.advance()
            self.forget_history("status" if how == "status" else "event")
        return answer

    monkeypatch.setattr(KubeApi, "_list", list_then_forget)
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.until(lambda: followed.api.lists == 3, "two more lists")
        await followed.watching()
        followed.api.apply(chat("a", "10.0.0.2"))
        await followed.until(lambda: followed.addresses() == {"10.0.0.2"}, "a watch that works")
        assert followed.discovery.failures == 2


async def test_bookmarks_advance_the_version_that_a_watch_is_taken_up_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing of ours changes, the next watch begins at the bookmark, not at a version long forgotten."""
    monkeypatch.setattr(discovery, "WATCH_S", 2)
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        api = followed.api
        await followed.watching()
        first = api.requests[-1]["resourceVersion"]
        assert api.requests[-1]["allowWatchBookmarks"].lower() == "true"
        api.advance(50)
        api.send_bookmark()
        await followed.until(lambda: len(api.requests) > 2, "the next watch")

        assert int(api.requests[-1]["resourceVersion"]) == int(first) + 50
        assert api.lists == 1


async def test_a_cut_watch_is_begun_anew_and_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed while no watch was open is there afterwards."""
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        followed.api.cut_watches()
        followed.api.apply_unseen(chat("b", "10.0.0.2"))

        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.2"}, "what was missed")


@pytest.mark.parametrize("fault", ["away", "hang", 500, 403, 429])
async def test_the_last_known_state_stays_while_the_api_server_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str | int
) -> None:
    """Refused, silent or failing, it changes nothing, is said once, makes the state older; and all is well after."""
    monkeypatch.setattr(discovery, "ANSWER_TIMEOUT_S", 0.2)
    caplog.set_level(logging.WARNING, "serving.discovery")
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        api = followed.api
        await followed.watching()
        version, before = followed.discovery.version, followed.discovery.failures
        if fault == "away":
            await api.go_away()
        else:
            api.answer("hang" if fault == "hang" else int(fault))
            api.cut_watches()
        api.apply_unseen(chat("b", "10.0.0.2"))
        await followed.until(lambda: followed.discovery.failures >= before + 4, "attempts")
        assert followed.addresses() == {"10.0.0.1"}
        assert followed.discovery.version == version
        assert followed.discovery.age_s() > 0.01
        said = [record.message for record in caplog.records]
        assert len(said) == 1
        assert "the last known state stays" in said[0]

        if fault == "away":
            await api.come_back()
        api.answer("serve")
        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.2"}, "the return")
        await followed.until(lambda: len(caplog.records) == 2, "a word of the return")
        assert "answers again" in caplog.records[1].message


async def test_a_server_that_was_never_there_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """``listed_once`` ends, and says that nothing was listed; the list comes later."""
    async with KubeApi([chat("a", "10.0.0.1")]) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
        await api.go_away()
        found = Discovery(lambda: None)
        found.watch([CHAT])
        try:
            assert not await found.listed_once(0.1)
            assert not found.slices()
            await api.come_back()
            assert await found.listed_once(WAIT_S)
        finally:
            await found.stop()


async def test_the_resync_mends_an_event_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that drops an event is not for ever wrong."""
    monkeypatch.setattr(discovery, "RESYNC_S", 2.0)
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        followed.api.apply_unseen(chat("b", "10.0.0.2"))

        await followed.until(lambda: followed.addresses() == {"10.0.0.1", "10.0.0.2"}, "the resync")
        assert followed.discovery.failures == 0


async def test_a_resync_that_finds_nothing_new_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same slices under newer versions are the same slices."""
    monkeypatch.setattr(discovery, "RESYNC_S", 1.5)
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        version = followed.discovery.version
        lists = followed.api.lists
        followed.api.advance()
        followed.api.apply(chat("a", "10.0.0.1"))
        await followed.until(lambda: followed.api.lists > lists, "a resync")
        await followed.watching()

        assert followed.discovery.version == version


async def test_watches_that_end_at_once_are_said_and_not_asked_for_without_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that breaks every watch makes discovery a slow poll, and people hear of it."""

    async def broken(_self: KubeApi, request: object, *_: object) -> object:
        raise ConnectionResetError

    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        monkeypatch.setattr(KubeApi, "_stream", broken)
        followed.api.cut_watches()
        await followed.until(lambda: "watches end at once" in caplog.text, "a word")


async def test_any_events_lead_to_what_a_list_of_the_end_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sequence of changes, cuts and forgotten history: in the end the slices are those that there are."""
    names, addresses = st.sampled_from("abc"), st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2"]), max_size=2)
    pools = st.sampled_from(["chat", "chat", "embeddings"])
    changes = st.tuples(st.just("apply"), names, addresses, pools)
    removals = st.tuples(st.just("remove"), names)
    faults = st.sampled_from([("cut",), ("forget",), ("bookmark",), ("pause",)])
    loop = asyncio.get_running_loop()
    async with following(monkeypatch) as followed:

        async def play(steps: list[tuple[object, ...]]) -> None:
            for step in steps:
                await _play(followed.api, step)
            wanted = {
                name: msgspec.convert(each, EndpointSlice)
                for (_, name), each in followed.api._objects.items()
                if each["metadata"]["labels"]["penstock.io/pool"] == "chat"
            }
            await followed.until(lambda: followed.slices() == wanted, f"the end of {steps}")

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.one_of(changes, removals, faults), max_size=8))
        def all_sequences(steps: list[tuple[object, ...]]) -> None:
            asyncio.run_coroutine_threadsafe(play(steps), loop).result(WAIT_S * 2)

        await asyncio.to_thread(all_sequences)


async def _play(api: KubeApi, step: tuple[object, ...]) -> None:
    match step:
        case ("apply", str(name), list(addresses), str(pool)):
            api.apply(chat(name, *addresses, pool=pool))
        case ("remove", str(name)):
            api.remove(name)
        case ("cut",):
            api.cut_watches()
        case ("forget",):
            api.forget_history()
        case ("bookmark",):
            api.send_bookmark()
        case _:
            await asyncio.sleep(0)


async def test_listings_come_and_go_with_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that is no longer wanted is let go of, its watch too; one that stays is not asked for again."""
    async with following(monkeypatch, chat("a", "10.0.0.1")) as followed:
        await followed.watching()
        embeddings = Listing("inference", "penstock.io/pool=embeddings")
        followed.discovery.watch([CHAT, embeddings])
        assert await followed.discovery.listed_once(WAIT_S)
        await followed.until(lambda: followed.api.watches == 2, "two watches")
        followed.discovery.watch([embeddings])
        await followed.watching()

        assert set(followed.discovery.slices()) == {embeddings}
        assert followed.api.lists == 2


async def test_the_address_of_the_api_that_nobody_knows_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a kubeconfig that can be read the error says where discovery looks."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(DiscoveryError, match="run in a pod with a service account, or set KUBECONFIG"):
        async with kubernetes_api():
            pass


PLUGIN = """
calls=$(ls {folder}/call-* 2>/dev/null | wc -l)
touch {folder}/call-$calls
case $calls in
0) echo the-plugins-secret >&2; exit 3 ;;
1) sleep 600 & echo $! > {folder}/slept; wait ;;
*) cat {folder}/credential ;;
esac
"""


async def test_a_credential_plugin_that_fails_or_hangs_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that hangs is ended with what it started; what one prints as it fails may be a secret and is not logged."""
    monkeypatch.setattr(discovery, "PLUGIN_TIMEOUT_S", 0.5)
    async with KubeApi([chat("a", "10.0.0.1")]) as api:
        api_version = {"apiVersion": "client.authentication.k8s.io/v1"}
        described = api_version | {"command": "sh", "args": ["-c", PLUGIN.format(folder=tmp_path)]}
        credential = api_version | {"kind": "ExecCredential", "status": {"token": TOKEN}}
        (tmp_path / "credential").write_text(json.dumps(credential))
        config = json.loads(api.kubeconfig.read_text())
        config["users"][0]["user"] = {"exec": described}
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        found = Discovery(lambda: None)
        found.watch([CHAT])
        try:
            assert await found.listed_once(WAIT_S)
        finally:
            await found.stop()

    assert not _runs((tmp_path / "slept").read_text().strip())
    assert "exec: process returned 3; run the plugin by hand" in caplog.text
    assert "the-plugins-secret" not in caplog.text


def _runs(pid: str) -> bool:
    """Whether there is such a process, and not only until somebody asks how it ended."""
    stat = Path("/proc", pid, "stat")
    return stat.exists() and " Z " not in stat.read_text()


async def test_a_client_that_does_not_get_ready_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To connect is bounded in time like every other wait, and tried again."""
    monkeypatch.setattr(discovery, "ANSWER_TIMEOUT_S", 0.01)

    @asynccontextmanager
    async def hanging() -> AsyncIterator[discovery.Api]:
        await asyncio.Event().wait()
        yield list

    found = Discovery(lambda: None, hanging)
    found.watch([CHAT])
    try:

        async def failed_twice() -> bool:
            return found.failures >= 2

        await eventually_async(failed_twice, WAIT_S, "two failures")
    finally:
        await found.stop()
    assert "the client is not ready within 0.01 s; check the credential plugin in KUBECONFIG" in caplog.text


async def test_a_pod_without_a_service_account_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster the service account is asked for, and a pod that mounts none hears of it."""
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    with pytest.raises(DiscoveryError, match="Service token file does not exist"):
        async with kubernetes_api():
            pass


def test_waits_double_up_to_a_bound_and_are_jittered() -> None:
    """No failure makes controllers ask in step, and none makes one wait for ever."""
    waits = [[wait_s(failures) for _ in range(50)] for failures in (1, 3, 10**6)]

    assert all(0.005 <= each <= 0.01 for each in waits[0])
    assert all(0.02 <= each <= 0.04 for each in waits[1])
    assert all(0.025 <= each <= 0.05 for each in waits[2])
    assert len(set(waits[2])) > 1
