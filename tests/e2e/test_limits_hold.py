"""The promise itself: what passes through two gateways to real vLLM never exceeds what the limits allow."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.support.stack import MODEL, Stack, metric, penstock
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CALLERS = 200
MAX_TOKENS = 20
#: The length that a request's answer ends at by itself: below its maximum, so that some of its hold is given back.
NATURAL_LENGTH = 12


def completion(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "water", "max_tokens": max_tokens, **fields}


async def call(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[int, int]:
    """Status, and the completion tokens of the answer's usage."""
    answer = await client.post(url + "/v1/completions", json=body)
    if answer.status_code != 200:
        return answer.status_code, 0
    if not body.get("stream"):
        return 200, int(answer.json()["usage"]["completion_tokens"])
    last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
    return 200, int(httpx.Response(200, text=last.removeprefix("data: ")).json()["usage"]["completion_tokens"])


async def burst_of_calls(url: str, key: str) -> list[tuple[int, int]]:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [completion(MAX_TOKENS, ignore_eos=True, **(streamed if i % 2 else {})) for i in range(CALLERS)]
    limits = httpx.Limits(max_connections=CALLERS)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=120) as client:
        return await asyncio.gather(*(call(client, url, body) for body in bodies))


def worker_metrics(stack: Stack) -> list[str]:
    """The exposition of each of the two gateways."""
    host, port = stack.admin_url.rsplit(":", 1)
    urls = [f"{host}:{int(port) + worker}/metrics" for worker in range(2)]
    return [httpx.get(url, headers=stack.admin_headers(), timeout=10).text for url in urls]


def generated_by_engines(stack: Stack) -> float:
    pages = (httpx.get(url + "/metrics", timeout=10).text for url in stack.replica_urls())
    return sum(metric(page, "vllm:generation_tokens_total") for page in pages)


def settled_output(stack: Stack) -> float:
    return sum(metric(page, "penstock_tokens_total", tier="tiny", kind="output") for page in worker_metrics(stack))


async def test_200_callers_through_two_gateways_stay_within_one_keys_limit(stack: Stack) -> None:
    """Output tokens never exceed burst + rate × time, and both gateways settle what vLLM counted."""
    eventually(lambda: len(stack.replica_urls()) == 2, 120, "both replicas' presence")
    key = stack.create_key("tiny")
    eventually(lambda: stack.publication()["epoch"] == stack.get("/v1/limits", key).json()["epoch"], 10, "one epoch")
    limit = stack.limits(key)["output_tokens"]
    settled, generated, pages = settled_output(stack), generated_by_engines(stack), worker_metrics(stack)
    started_at_s = time.monotonic()

    answers = await burst_of_calls(stack.url, key)

    elapsed_s = time.monotonic() - started_at_s
    served = sum(tokens for _, tokens in answers)
    assert {status for status, _ in answers} == {200, 429}
    assert limit["burst"] - MAX_TOKENS < served <= limit["burst"] + limit["per_minute"] * elapsed_s / 60
    for before, after in zip(pages, worker_metrics(stack), strict=True):
        assert metric(after, "penstock_requests_total", tier="tiny") > metric(
            before, "penstock_requests_total", tier="tiny"
        )
    eventually(lambda: settled_output(stack) - settled == served, 5, "the settlement of what was served")
    eventually(lambda: generated_by_engines(stack) - generated == served, 5, "the engines' agreement")
    in_flight = stack.limits(key)["concurrency"]
    assert in_flight["remaining"] == in_flight["burst"]


def test_what_a_hold_took_too_much_is_given_back(stack: Stack) -> None:
    """A request that asks for the whole burst and uses a few tokens leaves room for another such."""
    key = stack.create_key("tiny")
    burst = stack.limits(key)["output_tokens"]["burst"]
    headers = {"authorization": f"Bearer {key}"}

    for _ in range(3):
        body = completion(burst - NATURAL_LENGTH * 3, seed=NATURAL_LENGTH)
        answer = httpx.post(stack.url + "/v1/completions", json=body, headers=headers, timeout=60)

        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == NATURAL_LENGTH


def test_a_client_that_leaves_ends_its_request_on_the_engine_and_pays_for_what_it_got(stack: Stack) -> None:
    """The upstream request is aborted at once; the meters keep the tokens that were made and let go of the rest."""
    key = stack.create_key("pro")
    before = stack.limits(key)
    headers = {"authorization": f"Bearer {key}"}
    body = completion(2000, ignore_eos=True, stream=True)
    with httpx.stream("POST", stack.url + "/v1/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)

    def running() -> float:
        pages = (httpx.get(url + "/metrics", timeout=10).text for url in stack.replica_urls())
        return sum(metric(page, "vllm:num_requests_running") for page in pages)

    eventually(lambda: running() == 0, 10, "the abort on the engine")
    eventually(
        lambda: stack.limits(key)["concurrency"]["remaining"] == before["concurrency"]["remaining"],
        10,
        "the release of the slot",
    )
    assert stack.limits(key)["output_tokens"]["remaining"] > before["output_tokens"]["burst"] - 1000


def test_an_override_takes_effect_and_says_who_set_it_until_when(stack: Stack) -> None:
    """`limits set` changes what gateways enforce, shows in `explain`, and ends when cleared."""
    key = stack.create_key("free")
    derived = stack.limits(key)["output_tokens"]["per_minute"]
    options = ("--tier", "free", "--for", "2h", "--reason", "incident 42", "--config", stack.config_path)
    made = penstock("limits", "set", "output_tokens", "777", *options)
    assert made.returncode == 0, made.stderr

    eventually(lambda: stack.limits(key)["output_tokens"]["per_minute"] == 777, 10, "the override's effect")
    explained = penstock("limits", "explain", "free", "--config", stack.config_path).stdout
    assert "incident 42" in explained
    assert f"{derived:,}/min" in explained

    override_id = made.stderr.split()[0]
    assert penstock("limits", "clear", override_id, "--config", stack.config_path).returncode == 0
    eventually(lambda: stack.limits(key)["output_tokens"]["per_minute"] == derived, 10, "the override's end")


def test_frozen_limits_do_not_follow_the_fleet(stack: Stack) -> None:
    """`limits freeze` keeps the published values while the number of keys, and so the derived value, changes."""
    stack.create_key("free")
    options = ("--tier", "free", "--for", "10m", "--reason", "freeze", "--config", stack.config_path)
    frozen_at = {limit["name"]: limit["per_minute"] for limit in stack.tier_limits("free")}
    made = penstock("limits", "freeze", *options)
    assert made.returncode == 0, made.stderr
    try:
        eventually(lambda: "frozen" in stack.tier_limits("free")[0]["explanation"], 10, "the freeze")
        key = stack.create_key("free")
        eventually(lambda: stack.tier("free")["active_keys"] >= 2, 10, "the new key's count")
        assert {name: limit["per_minute"] for name, limit in stack.limits(key).items()} == frozen_at
    finally:
        penstock("limits", "clear", made.stderr.split()[0], "--config", stack.config_path)
