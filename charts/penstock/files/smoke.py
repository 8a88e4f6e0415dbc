"""What `helm test` runs: the gateways are ready, and their data port answers as an OpenAI server with keys does.

Takes the URL of the admin port and that of the data port. Exits 0, or 1 with what is wrong.
"""

import json
import sys
import time
import urllib.error
import urllib.request

ATTEMPTS = 30
PAUSE_S = 2.0
TIMEOUT_S = 5.0


def fetch(url: str) -> tuple[int, bytes]:
    """The status and the body of a GET, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310 - URLs that the chart writes
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def problem(admin_url: str, data_url: str) -> str | None:
    """What is wrong now; None if nothing is."""
    try:
        ready, body = fetch(f"{admin_url}/health")
        if ready != 200:
            return f"{admin_url}/health: {ready} {body[:200]!r}; `kubectl logs` of the gateway and controller say why"
        status, body = fetch(f"{data_url}/v1/models")
    except OSError as error:
        return f"no answer: {error}; is a NetworkPolicy in the way?"
    if status != 401:
        return f"{data_url}/v1/models without a key: {status}, not 401"
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{data_url}/v1/models: not an OpenAI error: {body[:200]!r}"
    print(f"ready, and a caller without a key is told: {message}")
    return None


def main(admin_url: str, data_url: str) -> str | None:
    """Try until all is well or the attempts are used up; what was wrong last, or None."""
    found = problem(admin_url, data_url)
    for _ in range(ATTEMPTS - 1):
        if found is None:
            break
        time.sleep(PAUSE_S)
        found = problem(admin_url, data_url)
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
