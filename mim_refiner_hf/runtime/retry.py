"""Ask the Hub again while its trouble may pass: rate limits, server errors, broken connections; a few times, and saying so.

    folder = patiently(lambda: snapshot_download("user/name"), "loading user/name")

`huggingface_hub` repeats most uploads and downloads by itself, but not every request (2.4: not the one that makes a repository, nor
the ones that look a repository up).
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 5
PAUSE = 2.0  # seconds before the second attempt; twice as long before each further one
LONGEST = 60.0  # that a server may ask to be left alone, in seconds
PASSING = frozenset({408, 429, 500, 502, 503, 504})


def patiently(call: Callable[[], Result], what: str) -> Result:
    """What `call` returns; repeated up to `ATTEMPTS` times while what it raises may pass.

    Args:
        call: something that may be done twice.
        what: in words, for the log.

    Raises:
        ConnectionError: with the last answer in a line, when the trouble lasts. Whatever will not pass is raised as it is.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:  # each library has classes of its own
            if not may_pass(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            if attempt == ATTEMPTS:
                raise ConnectionError(reason) from error
            seconds = _asked_for(error, PAUSE * 2 ** (attempt - 1))
            logger.warning(
                "%s: %s; trying again in %.0f s (%d of %d)",
                what,
                reason,
                seconds,
                attempt + 1,
                ATTEMPTS,
            )
            time.sleep(seconds)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network or the server failed, and nobody asked to stay offline."""
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in PASSING
        of_http = type(cause).__module__.partition(".")[0] in (
            "httpx",
            "httpx2",
        )  # the name depends on huggingface_hub's version
        # huggingface_hub's threads share a client, which the first that cannot connect closes under the others
        closed = isinstance(cause, RuntimeError) and "client has been closed" in str(cause)
        if (
            of_http
            or closed
            or isinstance(cause, ConnectionResetError | BrokenPipeError | TimeoutError)
        ):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost cause first: libraries wrap what the network said."""
    if error is not None:
        yield from _causes(error.__cause__ or error.__context__)
        yield error


def _asked_for(error: BaseException, otherwise: float) -> float:
    """Seconds to wait: what a Retry-After header says, at most `LONGEST`."""
    for cause in _causes(error):
        header = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
        if header.isdigit():
            return min(float(header), LONGEST)
    return otherwise


__all__ = ["patiently"]
