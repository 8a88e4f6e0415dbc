"""A live OpenAI-compatible endpoint as ``measure`` needs it: what it says of itself, and one timed, streamed answer.

Tokens are counted from the usage that the engine reports, never from chunks: under load one chunk carries several.
"""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

#: English prose of known length, to ask the engine how many tokens it makes of a byte.
SAMPLE_TEXT = (
    "A replica that serves many callers at once spends its time in steps. Each step reads the weights of the model, "
    "computes some prompts, and gives every running answer its next token; the more it carries, the longer it takes. "
    "What the fleet can promise is therefore found by measuring it under the load that it will see."
)


#: vLLM closes a connection that was idle for 5 s; one reused at that very moment breaks off, and spoils a sweep.
KEEPALIVE_S = 2.0


class EndpointError(RuntimeError):
    """The endpoint cannot be measured; the message says what it did and what is needed."""


class EndpointFacts(NamedTuple):
    """What an engine reports of itself; 0 for a KV cache that it does not report."""

    model: str
    engine_version: str
    max_model_len: int
    kv_tokens: int
    block_size: int


class Answer(NamedTuple):
    """One streamed answer: its moments on the monotonic clock, and the tokens that its usage states."""

    start_s: float
    first_token_s: float
    finish_s: float
    input_tokens: int
    output_tokens: int


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: object = None


class Endpoint:
    """A session with one endpoint. Enter it with ``async with``."""

    def __init__(self, url: str, api_key: str | None, request_timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s)

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def facts(self, model: str | None = None) -> EndpointFacts:
        """Ask ``/v1/models``, ``/version`` and ``/metrics``. The last two may be missing; the first may not."""
        listed = _json_or_empty((await self._get("/v1/models")).decode()).get("data", [])
        cards: dict[str, dict[str, Any]] = {card["id"]: card for card in listed}
        name = model or next(iter(cards), None)
        if name not in cards:
            raise EndpointError(f"{self.url} serves {', '.join(cards) or 'no model'}, not {name!r}")
        cache = _cache_config(await self._get_if_there("/metrics"))
        block_size = int(cache.get("block_size", 16))
        return EndpointFacts(
            model=name,
            engine_version=str(_json_or_empty(await self._get_if_there("/version")).get("version", "unknown")),
            max_model_len=int(cards[name].get("max_model_len") or 0),
            kv_tokens=int(cache.get("num_gpu_blocks", 0)) * block_size,
            block_size=block_size,
        )

    async def engine_steps(self) -> float | None:
        """Steps since the engine started, as vLLM counts them; None where it does not say."""
        metrics = await self._get_if_there("/metrics")
        counts = [
            sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "vllm:iteration_tokens_total_count"
        ]
        return sum(counts) if counts else None

    async def tokens_per_byte(self, model: str) -> float:
        """Prompt tokens for each byte of English prose."""
        answer = await self.complete(model, SAMPLE_TEXT, 1)
        return answer.input_tokens / len(SAMPLE_TEXT.encode())

    async def complete(self, model: str, prompt: str | list[int], output_tokens: int) -> Answer:
        """Stream exactly so many output tokens. Raises ``EndpointError`` for anything but a full, counted answer."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start_s = monotonic()
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise EndpointError(await _refusal(response))
                return await _timed(response, start_s)
        except TimeoutError as error:
            raise EndpointError(f"{self.url} did not finish an answer in {self._timeout.total:g} s") from error
        except aiohttp.ClientError as error:
            raise EndpointError(f"{self.url} broke off: {error}") from error
        except msgspec.MsgspecError as error:
            raise EndpointError(f"{self.url} streams what is not an OpenAI completion: {error}") from error

    async def _get(self, path: str) -> bytes:
        try:
            async with self._session.get(self.url + path) as response:
                if response.status != 200:
                    raise EndpointError(await _refusal(response))
                return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EndpointError(f"cannot reach {self.url}: {error or 'no answer in time'}") from error

    async def _get_if_there(self, path: str) -> str:
        try:
            return (await self._get(path)).decode()
        except EndpointError:
            return ""


async def _refusal(response: aiohttp.ClientResponse) -> str:
    text = " ".join((await response.text()).split())
    return f"{response.url} answered {response.status}: {text[:300]}"


async def _timed(response: aiohttp.ClientResponse, start_s: float) -> Answer:
    first_token_s = last_token_s = None
    usage = None
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = msgspec.json.decode(line[6:], type=_Chunk)
        if chunk.error is not None:
            raise EndpointError(f"{response.url} failed within an answer: {str(chunk.error)[:300]}")
        if chunk.choices:
            last_token_s = monotonic()
            first_token_s = first_token_s or last_token_s
        usage = chunk.usage or usage
    if first_token_s is None or last_token_s is None:
        raise EndpointError(f"{response.url} ended an answer without a token")
    if usage is None:
        raise EndpointError(f"{response.url} reports no usage in its streams; stream_options.include_usage is needed")
    return Answer(start_s, first_token_s, last_token_s, usage.prompt_tokens, usage.completion_tokens)


def _cache_config(metrics: str) -> dict[str, str]:
    """The labels of vLLM's ``cache_config_info`` that are numbers."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return {key: value for key, value in sample.labels.items() if value.isdigit()}
    return {}


def _json_or_empty(text: str) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return decoded if isinstance(decoded, dict) else {}
