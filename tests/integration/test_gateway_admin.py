"""Two credentials, two ports: neither opens the other, and neither is in what a gateway prints."""

from __future__ import annotations

import httpx
import msgspec
from redis.asyncio import Redis

from ratelimit.publisher import KEYS_USED_KEY
from tests.support.gateway import GatewayProcess, gateway_settings, make_key, publication, publish
from tests.support.waiting import eventually

TOKEN = "a-token-of-our-own"


def get(url: str, secret: str | None = None) -> httpx.Response:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return httpx.get(url, headers=headers, timeout=10)


async def test_each_credential_opens_its_own_port(redis_url: str, redis_client: Redis) -> None:
    """The token reads the admin port, a key the data port; the log of a busy gateway holds neither."""
    secret, record = make_key()
    await publish(redis_client, publication(["http://127.0.0.1:9"]), record)
    await redis_client.hset(KEYS_USED_KEY, record.id, 100)
    settings = msgspec.structs.replace(gateway_settings(redis_url), admin_token=TOKEN)
    with GatewayProcess(settings) as gateway:
        admin, data = gateway.admin_url, gateway.url
        eventually(lambda: get(data + "/v1/models", secret).status_code == 200, 10, "the key's acceptance")

        assert [get(admin + path).status_code for path in ("/health", "/metrics", "/limits", "/keys")] == [
            200,
            401,
            401,
            401,
        ]
        assert {get(admin + path, secret).status_code for path in ("/metrics", "/limits", "/keys")} == {401}
        assert {get(admin + path, TOKEN).status_code for path in ("/health", "/metrics", "/limits", "/keys")} == {200}
        assert get(data + "/v1/models", TOKEN).status_code == 401
        assert get(data + "/metrics", TOKEN).status_code == 404
        (key,) = get(admin + "/keys", TOKEN).json()
        assert (key["id"], key["status"]) == (record.id, "active")
        assert key["last_used_at"] >= 100
        told = gateway.log() + get(admin + "/metrics", TOKEN).text

    assert TOKEN not in told
    assert secret not in told
