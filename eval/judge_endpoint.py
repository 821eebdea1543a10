"""A URL that speaks OpenAI's chat protocol: one request at a time, with retries; what fails is one line of text."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tap_llm.errors import InputError

LONGEST_WAIT = 60.0  # seconds
_MOST_BYTES = 1 << 24
_PATH = "/chat/completions"
_RETRIED = (408, 409, 425, 429)


class JudgeError(Exception):
    """There is no usable reply; the message says why, in one line.

    Args:
        reason: why.
        down: the judge as a whole does not work, as far as one request can tell.
    """

    def __init__(self, reason: str, down: bool = False) -> None:
        super().__init__(" ".join(reason.split()))
        self.down = down


class _Again(Exception):
    """Worth another try, after so many seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_open = urllib.request.build_opener(_NoRedirects).open


@dataclass(frozen=True)
class Endpoint:
    """Where a judge answers.

    Attributes:
        url: base URL such as "http://localhost:8000/v1", or that of the chat completions themselves.
        key: sent as a bearer token; None for servers without one.
        timeout: seconds that one reply may take.
        retries: further tries after a busy server, a broken connection or a timeout.
        wait: seconds before the first retry; doubled for each further one, unless the server names a time itself.

    Raises:
        InputError: not a URL of http or https.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 4
    wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the judge's URL must begin with http:// or https://, got {self.url!r}")

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request.

        Args:
            body: of the chat completions.

        Returns:
            The reply, as the server sent it.

        Raises:
            JudgeError: no reply after all tries, or one that refuses the request.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(body)
            except _Again as error:
                if attempt == self.retries:
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    raise JudgeError(f"the judge does not answer: {error}{tries}", down=True) from error
                time.sleep(min(error.after or self.wait * 2**attempt, LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _once(self, body: dict[str, Any]) -> dict[str, Any]:
        url = self.url.rstrip("/")
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            url if url.endswith(_PATH) else url + _PATH, json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with _open(request, timeout=self.timeout) as response:
                data = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Again(str(getattr(error, "reason", "") or error) or type(error).__name__) from error
        try:
            reply = json.loads(data)
        except ValueError as error:
            raise _Again(f"its reply is not JSON: {error}") from error
        if not isinstance(reply, dict):
            raise JudgeError(f"the judge's reply is not a JSON object: {str(reply)[:80]}")
        return reply


def _refusal(error: urllib.error.HTTPError) -> Exception:
    """What to make of an HTTP status. Refusals of this one request do not mean that the judge is down."""
    text = error.read(300).decode("utf-8", "replace").strip() or str(error.reason)
    reason = f"HTTP {error.code}: {text}"
    if error.code in _RETRIED or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        return _Again(reason, float(after) if after.isdigit() else 0.0)
    return JudgeError(f"the judge refuses: {reason}", down=error.code not in (400, 413, 422))
