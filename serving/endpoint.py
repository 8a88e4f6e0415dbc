"""A live OpenAI-compatible endpoint as ``measure`` needs it: what it says of itself, and one timed, streamed answer.

Tokens are counted from the usage that the engine reports, never from chunks: under load one chunk carries several.
"""

from __future__ import annotations

import asyncio
from statistics import median
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from serving.enginefacts import Counters, EngineReport, cache_labels

#: English prose of known length, to ask the engine how many tokens it makes of a byte.
SAMPLE_TEXT = (
    "A replica that serves many callers at once spends its time in steps. Each step reads the weights of the model, "
    "computes some prompts, and gives every running answer its next token; the more it carries, the longer it takes. "
    "What the fleet can promise is therefore found by measuring it under the load that it will see."
)


#: vLLM closes a connection that was idle for 5 s; one reused at that very moment breaks off, and spoils a sweep.
KEEPALIVE_S = 2.0
#: What an engine, or a gateway before it, answers when it has too much to do.
BUSY_STATUSES = frozenset({429, 503, 529})
DRAIN_POLL_S = 0.1
NVIDIA_SMI_TIMEOUT_S = 10.0
#: Token ids from here on are ordinary even in a tiny vocabulary: the special ones come first or last.
FIRST_TOKEN_ID = 300
WAY_REQUESTS, WAY_TOKENS = 15, 8
_JSON = {"Content-Type": "application/json"}
_COUNTED = (
    "vllm:iteration_tokens_total_count",
    "vllm:prefix_cache_hits_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting{",
)


class EndpointError(RuntimeError):
    """The endpoint cannot be measured; the message says what it did and what is needed."""


class EngineBusyError(EndpointError):
    """The engine refused a request because it has too many: overload, and no fault of it."""


class Answer(NamedTuple):
    """One streamed answer: its moments on the monotonic clock, and the tokens that its usage states.

    ``cached_tokens`` of its prompt were in the prefix cache; None where the usage does not tell.
    """

    start_s: float
    first_token_s: float
    finish_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    fingerprint: str = ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: object = None
    system_fingerprint: str | None = None


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

    async def report(self, model: str | None = None) -> EngineReport:
        """Everything that the engine says of itself. Only ``/v1/models`` must be there, and serve that model."""
        listed = _json_or_empty((await self._get("/v1/models")).decode()).get("data", [])
        cards: dict[str, dict[str, Any]] = {card["id"]: card for card in listed}
        name = model or next(iter(cards), None)
        if name is None or name not in cards:
            raise EndpointError(f"{self.url} serves {', '.join(cards) or 'no model'}, not {name!r}")
        return EngineReport(
            model=name,
            max_model_len=int(cards[name].get("max_model_len") or 0),
            version=str(_json_or_empty(await self._get_if_there("/version")).get("version", "")),
            cache_config=_cache_config(await self._get_if_there("/metrics")),
            server_info=_json_or_empty(await self._get_if_there("/server_info?config_format=json")),
            fingerprint=(await self.complete(name, SAMPLE_TEXT, 1)).fingerprint,
            local_gpus=await _local_gpus(self.url),
        )

    async def counters(self) -> Counters:
        """What the engine counts, at this moment."""
        asked_s = monotonic()
        metrics = await self._get_if_there("/metrics")
        found: dict[str, list[float]] = {}
        for line in metrics.splitlines():  # vLLM's exposition is long, and parsing all of it would delay the senders
            if line.startswith(_COUNTED):
                found.setdefault(line.partition("{")[0].partition(" ")[0], []).append(float(line.rpartition(" ")[2]))
        running, waiting = found.get("vllm:num_requests_running"), found.get("vllm:num_requests_waiting")
        return Counters(
            time_s=(asked_s + monotonic()) / 2,
            steps=_total(found.get("vllm:iteration_tokens_total_count")),
            prefix_hit_tokens=_total(found.get("vllm:prefix_cache_hits_total")),
            open_requests=None if running is None or waiting is None else sum(running) + sum(waiting),
        )

    async def drained(self, timeout_s: float) -> None:
        """Wait until no request is open in the engine. Raises ``EndpointError`` after the timeout."""
        deadline_s = monotonic() + timeout_s
        while (left := (await self.counters()).open_requests or 0.0) > 0:
            if monotonic() > deadline_s:
                raise EndpointError(
                    f"{self.url} still has {left:.0f} requests open {timeout_s:g} s after the last one was left: "
                    "somebody else uses it, or it is stuck; measure an engine that serves nobody else"
                )
            await asyncio.sleep(DRAIN_POLL_S)

    async def tokens_per_byte(self, model: str) -> float:
        """Prompt tokens for each byte of English prose."""
        answer = await self.complete(model, SAMPLE_TEXT, 1)
        return answer.input_tokens / len(SAMPLE_TEXT.encode())

    async def turnaround_s(self, model: str) -> float:
        """Seconds that a lone request is on its way while the engine computes nothing, as the median of a few.

        A prompt of one token costs a step like the later ones, so what its first token takes longer is the way.
        """
        answers = [await self.complete(model, [FIRST_TOKEN_ID + k], WAY_TOKENS) for k in range(WAY_REQUESTS)]
        first = median(answer.first_token_s - answer.start_s for answer in answers)
        later = median(
            (answer.finish_s - answer.first_token_s) / max(1, answer.output_tokens - 1) for answer in answers
        )
        return max(0.0, first - later)

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
        data = msgspec.json.encode(body)
        start_s = monotonic()
        try:
            async with self._session.post(f"{self.url}/v1/completions", data=data, headers=_JSON) as response:
                if response.status != 200:
                    refused = EngineBusyError if response.status in BUSY_STATUSES else EndpointError
                    raise refused(await _refusal(response))
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
    usage, fingerprint = None, ""
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = msgspec.json.decode(line[6:], type=_Chunk)
        if chunk.error is not None:
            raise EndpointError(f"{response.url} failed within an answer: {str(chunk.error)[:300]}")
        if chunk.choices:
            last_token_s = monotonic()
            first_token_s = first_token_s or last_token_s
        if chunk.usage is not None:
            usage, fingerprint = chunk.usage, chunk.system_fingerprint or fingerprint
    if first_token_s is None or last_token_s is None:
        raise EndpointError(f"{response.url} ended an answer without a token")
    if usage is None:
        raise EndpointError(f"{response.url} reports no usage in its streams; stream_options.include_usage is needed")
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    return Answer(
        start_s, first_token_s, last_token_s, usage.prompt_tokens, usage.completion_tokens, cached, fingerprint
    )


async def _local_gpus(url: str) -> tuple[str, ...]:
    """What nvidia-smi lists, where the endpoint is on this machine; nothing where it is not, or there is none."""
    if urlsplit(url).hostname not in {"127.0.0.1", "localhost", "::1"}:
        return ()
    try:
        process = await asyncio.create_subprocess_exec(
            *("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ()
    try:
        output, _ = await asyncio.wait_for(process.communicate(), NVIDIA_SMI_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return ()
    return (
        tuple(line.strip() for line in output.decode().splitlines() if line.strip()) if not process.returncode else ()
    )


def _cache_config(metrics: str) -> dict[str, str]:
    """The labels of vLLM's ``cache_config_info``."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return cache_labels(sample.labels)
    return {}


def _total(values: list[float] | None) -> float | None:
    return None if values is None else sum(values)


def _json_or_empty(text: str) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return decoded if isinstance(decoded, dict) else {}
