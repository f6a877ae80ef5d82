"""Ask the Hub again while its trouble may pass: a few times, and saying so.

    folder = patiently(lambda: snapshot_download("user/name"), "loading user/name")

What may pass: rate limits, server errors, broken connections. `huggingface_hub` repeats most
uploads and downloads by itself, but not every request (2.4: not the one that makes a repository,
nor those that look a repository up). What is not waited for: a host that cannot even be found, or
refuses the connection, at the first attempt, as where there is no network.
"""

import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 5
# seconds before the second attempt; twice as long before each further one
PAUSE = 2.0
# seconds that a server may ask to be left alone
_LONGEST_PAUSE = 60.0
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})


def patiently(call: Callable[[], Result], what: str) -> Result:
    """What `call` returns; repeated up to `ATTEMPTS` times while what it raises may pass.

    Args:
        call: something that may be done twice.
        what: in words, for the log.

    Raises:
        ConnectionError: with the last answer in a line, when the trouble lasts, or at once when
            there is no way to the host. Whatever will not pass is raised as it is.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        # each library has classes of its own
        except Exception as error:
            if not may_pass(error):
                raise
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            # a host that was reached before will be found again
            if attempt == 1 and has_no_way(error):
                raise ConnectionError(
                    f"{reason}: no way to that host, so it was asked only once"
                ) from error
            if attempt == ATTEMPTS:
                raise ConnectionError(reason) from error

            seconds = _pause_asked_for(error, PAUSE * 2 ** (attempt - 1))
            message = "%s: %s; trying again in %.0f s (%d of %d)"
            logger.warning(message, what, reason, seconds, attempt + 1, ATTEMPTS)
            time.sleep(seconds)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later.

    That is: the network or the server failed, and nobody asked to stay offline.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in _PASSING_STATUS
        if _is_of_the_network(cause):
            return True
    return False


def _is_of_the_network(cause: BaseException) -> bool:
    # huggingface_hub's threads share a client, which the first that cannot connect closes under the
    # others
    if isinstance(cause, RuntimeError) and "client has been closed" in str(cause):
        return True
    # the name of the library depends on huggingface_hub's version
    library = type(cause).__module__.partition(".")[0]
    if library in ("httpx", "httpx2"):
        return True
    return isinstance(cause, ConnectionResetError | BrokenPipeError | TimeoutError)


def has_no_way(error: BaseException) -> bool:
    """Whether the host cannot be found or reached, or refuses to be talked to."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror | ConnectionRefusedError):
            return True
        if isinstance(cause, OSError) and cause.errno in _NO_ROUTE:
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The innermost cause first: libraries wrap what the network said."""
    if error is not None:
        yield from _causes(error.__cause__ or error.__context__)
        yield error


def _pause_asked_for(error: BaseException, otherwise: float) -> float:
    """Seconds to wait: what a Retry-After header says, within limits."""
    for cause in _causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", {})
        seconds = headers.get("Retry-After", "")
        if seconds.isdigit():
            return min(float(seconds), _LONGEST_PAUSE)
    return otherwise
