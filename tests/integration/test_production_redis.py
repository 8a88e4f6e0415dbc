"""A Redis as in production: TLS, a user who may do only what docs/redis.md lists, its URL in a variable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ratelimit.embedded_redis import redis_server_executable
from tests.support.callers import ask
from tests.support.installation import MODEL, Installation
from tests.support.servers import Server, valkey_server_executable
from tests.support.slow_replica import SlowReplica
from tests.support.stack import PENSTOCK
from tests.support.tls import tls_in_front_of
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.slow

PASSWORD = "hunter2/&%@:#"
ESCAPED = "hunter2%2F%26%25%40%3A%23"
NOWHERE = "redis://127.0.0.1:1/0"
NO_REPLICA = "http://127.0.0.1:2"
LONG_S = 30.0
TOKEN_S = 0.01
DOCS = Path(__file__).parents[2] / "docs/redis.md"
KINDS = pytest.mark.parametrize(
    "executable", [redis_server_executable, valkey_server_executable], ids=["redis", "valkey"]
)


def documented_rules() -> str:
    """What docs/redis.md has an operator allow."""
    rules = " ".join(re.findall(r"^ACL SETUSER penstock (.*)$", DOCS.read_text(), re.MULTILINE))
    return rules.removeprefix("reset on >PASSWORD ")


def guarded(executable: str, rules: str) -> Server:
    """A server with a user penstock of these rights; the test's own user may do anything."""
    users = f'user penstock on ">{PASSWORD}" {rules}\nuser default on nopass ~* &* +@all\n'
    return Server(executable, config=users)


@pytest.mark.slow
@KINDS
async def test_gateway_and_controller_over_tls_as_a_user_of_few_rights(
    executable: Callable[[], str], certificate: Path, tmp_path: Path
) -> None:
    """Limits are derived, published, enforced and settled, usage is drained, and no command was refused."""
    with guarded(executable(), documented_rules()) as server:
        async with (
            tls_in_front_of(server.url.removeprefix("unix://"), certificate) as port,
            SlowReplica(TOKEN_S) as replica,
        ):
            url = f"rediss://penstock:{ESCAPED}@localhost:{port}/0?ssl_ca_certs={certificate / 'cert.pem'}"
            installation = Installation(tmp_path, NOWHERE, [replica.url], controllers=1, gateways=1)
            for process in installation.processes:
                process.environment = {"PENSTOCK_REDIS_URL": url}
            async with installation:
                (gateway,) = installation.gateways
                said = [{"role": "user", "content": "x"}]
                body = {"model": MODEL, "stream": True, "max_tokens": 300, "messages": said}
                answer = await ask(gateway.url, installation.secret, body)
                assert answer.complaint == "", (answer.complaint, gateway.log())

                async def drained() -> bool:
                    return any(line.output_tokens == 300 for line in installation.ledger())

                await eventually_async(drained, LONG_S, "the usage record in its day file")
                for process in reversed(installation.processes):
                    await process.end(signal.SIGTERM)
                told = "".join(process.log() for process in installation.processes)
        denied = server.call("ACL", "LOG")
    assert denied == []
    assert "hunter2" not in told
    assert "no permissions" not in told


@pytest.mark.parametrize(
    ("rules", "password", "told"),
    [
        (documented_rules(), "hunter3", "WRONGPASS|invalid username-password"),
        (documented_rules().replace("+hgetall", ""), ESCAPED, "no permissions"),
        (documented_rules().replace("~penstock:*", ""), ESCAPED, "No permissions|no permissions"),
    ],
    ids=["password", "command", "keys"],
)
async def test_a_redis_that_refuses_ends_the_start(rules: str, password: str, told: str, tmp_path: Path) -> None:
    """A gateway says what is missing and where it is written, without the password, and does not go on."""
    with guarded(redis_server_executable(), rules) as server:
        url = server.url.replace("unix://", f"unix://penstock:{password}@")
        installation = Installation(tmp_path, NOWHERE, [NO_REPLICA], controllers=0, gateways=1)
        (gateway,) = installation.gateways
        gateway.environment = {"PENSTOCK_REDIS_URL": url}
        gateway.start()
        try:

            async def has_ended() -> bool:
                return gateway.has_ended

            await eventually_async(has_ended, LONG_S, "the gateway's end")
        finally:
            status = await gateway.end()
    log = gateway.log()
    assert status == 1
    assert "refuses this gateway" in log.replace("\n", " ")
    assert re.search(told, log)
    assert "docs/redis.md" in log
    assert "hunter" not in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_help_and_mistakes_do_not_show_the_variable(tmp_path: Path) -> None:
    """The name of the variable is told; its value is not, neither in help nor where it is no Redis at all."""
    installation = Installation(tmp_path, NOWHERE, [NO_REPLICA], controllers=0, gateways=1)
    config = str(installation.gateways[0].config)
    urls = [
        "redis://:hunter/2@h:6379",
        "redis+cluster://:hunter2@h",
        "hunter2",
        "redis+sentinel://:hunter2@h",
        "embedded",
    ]
    said = [run({"PENSTOCK_REDIS_URL": url}, "gateway", "--config", config) for url in urls]
    said += [run({"PENSTOCK_REDIS_URL": urls[1]}, "controller", "--config", config)]
    help_ = [run({"PENSTOCK_REDIS_URL": urls[0]}, command, "--help") for command in ("gateway", "controller")]
    assert all("PENSTOCK_REDIS_URL" in each.stdout for each in help_)
    assert [each.returncode for each in help_] == [0, 0]
    assert all(each.returncode in (1, 2) for each in said), said
    for each in (*said, *help_):
        assert "hunter" not in each.stdout + each.stderr
        assert "Traceback" not in each.stderr
    assert "Redis Cluster cannot" in said[1].stderr
    assert "Redis Cluster cannot" in said[-1].stderr
    assert "name the service" in said[3].stderr


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that is expected to end soon."""
    wide = {"COLUMNS": "200", "TERM": "dumb"}
    env = {**os.environ, **wide, **environment}
    return subprocess.run([*PENSTOCK, *arguments], env=env, capture_output=True, text=True, timeout=LONG_S, check=False)
