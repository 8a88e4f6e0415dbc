"""The models of a key, with both official clients: lists, single ones, and those that it may not know of."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.integration.gateway_bench import Bench
from tests.support.gateway import MODEL


def anthropic_client(bench: Bench, **options: Any) -> anthropic.AsyncAnthropic:
    """Anthropic's official client with the bench's key."""
    return anthropic.AsyncAnthropic(base_url=bench.url, **{"api_key": bench.secret, "max_retries": 0, **options})


async def test_openais_client_reads_a_model(bench: Bench) -> None:
    """One model is found by its id, and is what the list says of it."""
    async with bench.client() as client:
        listed = [model async for model in client.models.list()]
        assert [await client.models.retrieve(MODEL)] == listed


@pytest.mark.parametrize("model", ["unknown", "org/unknown", "tiny/", "tiny?a=b", "%2e%2e/limits"])
async def test_openais_client_is_told_of_an_unknown_model(bench: Bench, model: str) -> None:
    """The refusal is the one that a request to that model gets, whatever stands in its name."""
    async with bench.client() as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve(model)
        with pytest.raises(openai.NotFoundError) as asked:
            await client.completions.create(model=model, prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.body == asked.value.body


async def test_anthropics_client_reads_models(bench: Bench) -> None:
    """Both calls give Anthropic's own form, with a request id."""
    async with anthropic_client(bench) as client:
        page = await client.models.list()
        model = await client.models.retrieve(MODEL)
    assert [listed.model_dump() for listed in page.data] == [model.model_dump()]
    assert (model.type, model.id, model.display_name, model.created_at.year) == ("model", MODEL, MODEL, 1970)
    assert model.lifecycle == "active"
    assert (page.has_more, page.first_id, page.last_id) == (False, MODEL, MODEL)
    assert model._request_id


async def test_anthropics_client_reads_refusals(bench: Bench) -> None:
    """Errors have Anthropic's form: an unknown model, an unknown key, a method that is not served."""
    async with anthropic_client(bench) as client:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.models.retrieve("unknown")
    async with anthropic_client(bench, api_key="pn-unknown") as client:
        with pytest.raises(anthropic.AuthenticationError) as unkeyed:
            await client.models.list()
    headers = {"anthropic-version": "2023-06-01"}
    async with httpx.AsyncClient(base_url=bench.url, headers=headers) as http:
        method = (await http.delete("/v1/models")).json()
    told = [unknown.value.body, unkeyed.value.body, method]
    kinds = ["not_found_error", "authentication_error", "invalid_request_error"]
    assert [body["error"]["type"] for body in told if isinstance(body, dict)] == kinds
    assert all(isinstance(body, dict) and body["type"] == "error" for body in told)


async def test_one_call_in_a_moment_reads_the_limits(bench: Bench) -> None:
    """Asking for limits as fast as possible asks the store at most once in the time a reading is fresh."""
    async with bench.http() as http:
        before = (await bench.redis.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
        answers = await asyncio.gather(*(http.get("/v1/limits") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        after = (await bench.redis.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
    assert after - before < 50
