"""A large file from an ordinary web address: resumable, checked at every use, never half there.

    from mim_refiner_hf.conversion.download import download
    path = download("https://ml.jku.at/research/mimrefiner/download/maerefined_l16.th", Path("weights/mae_refined_l16.th"))

While it comes in, a file is called `<path>.part`; `<path>.json` beside it records the address, the server's ETag and date, the size
and, at the end, the sha256. A broken connection is tried again from the byte where it broke, at once and at the next call. The
server is asked for the rest of that very version (`If-Range`); where it has another one, or cannot continue, the file starts over.
"""

import http.client
import importlib.metadata
import json
import logging
import shutil
import ssl
import time
import urllib.request
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.error import HTTPError, URLError

from huggingface_hub import constants
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # silent where the Hub's bars are

from ..runtime.files import CheckpointError, sha256_of

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a single byte
ATTEMPTS = 6  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second of them, doubled for each one after it
CHUNK = 1 << 20  # bytes
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that a later attempt may change


@dataclass(frozen=True)
class Record:
    """What is known about a file; kept as JSON beside it.

    Args:
        url: where it came from.
        etag, last_modified: the server's marks of this version of the file; empty where it gives none.
        size: bytes of the complete file; 0 while nobody has said how many.
        sha256: of the complete file, in hexadecimal; empty until it is complete.
    """

    url: str
    etag: str = ""
    last_modified: str = ""
    size: int = 0
    sha256: str = ""

    @staticmethod
    def beside(path: Path) -> Path:
        """Where the record of the file `path` lies."""
        return path.with_name(f"{path.name}.json")

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record of the file `path`; None where there is none that can be read."""
        try:
            return cls(**json.loads(cls.beside(path).read_text(encoding="utf-8")))
        except (
            FileNotFoundError,
            ValueError,
            TypeError,
        ):  # absent, or damaged: then nothing is known
            return None

    def write(self, path: Path) -> None:
        """Put this record beside the file `path`, atomically."""
        temporary = path.with_name(f"{path.name}.json.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.beside(path))

    @property
    def validator(self) -> str:
        """What `If-Range` may name: a strong ETag, else the date; empty where a change of the file could go unnoticed."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def contradicts(self, other: "Record") -> bool:
        """Whether two answers speak of different versions of the file: in a mark or a size that both give."""
        pairs = (
            (self.etag, other.etag),
            (self.last_modified, other.last_modified),
            (self.size, other.size),
        )
        return any(mine != theirs for mine, theirs in pairs if mine and theirs)


class Interrupted(Exception):
    """An attempt ended before the file did; another one may get further."""


def download(url: str, path: Path) -> Path:
    """`path` with the complete file from `url`: as it lies there, if it still is what its record says, else downloaded.

    Raises:
        CheckpointError: offline, for an answer that is no file, or when the connection keeps breaking; what has arrived is kept.
        OSError: when the disk is full or cannot be written.
    """
    record = Record.read(path)
    if path.is_file() and record is not None and record.url == url and is_intact(path, record):
        return path
    if constants.is_offline_mode():
        raise CheckpointError(
            f"{path} is not there (or damaged) and HF_HUB_OFFLINE=1 forbids the download; unset it once"
        )
    part = path.with_name(f"{path.name}.part")
    furthest, failures = size_of(part), 0
    while True:
        try:
            complete = attempt(url, part, path)
            break
        except Interrupted as interruption:
            arrived = size_of(part)
            failures = 1 if arrived > furthest else failures + 1
            furthest = max(furthest, arrived)
            if failures == ATTEMPTS:
                raise CheckpointError(
                    f"the download of {url} failed {ATTEMPTS} times in a row ({interruption}); {arrived} bytes are kept at {part}: "
                    "check the connection and run the same command again, which goes on from there"
                ) from interruption
            logger.info("%s: %s; trying again with %d bytes here", url, interruption, arrived)
            time.sleep(PAUSE * 2 ** (failures - 1))
    replace(complete, size=size_of(part), sha256=sha256_of(part)).write(
        path
    )  # first: without its record a file is not believed
    return part.replace(path)


def attempt(url: str, part: Path, path: Path) -> Record:
    """One request for what `part` still lacks; the record of the file if that is all of it, else Interrupted is raised."""
    known = Record.read(path)
    if known is None or known.url != url or not known.validator:
        start_over(part, f"nothing says which version of {url} it belongs to")
        known = Record(url)
    offset = size_of(part)
    if offset and offset == known.size:
        return known  # only the new name was missing
    request = urllib.request.Request(
        url,
        headers={"User-Agent": f"mim_refiner_hf/{importlib.metadata.version('mim_refiner_hf')}"},
    )
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", known.validator)
    try:
        with closing(ask(request, part)) as response:
            offset, now = starting_point(response, known, part)
            now.write(path)
            receive(response, part, offset, now.size)
    except (
        URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
    ) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise Interrupted(reason or type(error).__name__) from error
    if size_of(part) != now.size:
        raise Interrupted(f"the connection was closed at {size_of(part)} of {now.size} bytes")
    return now


def ask(request: urllib.request.Request, part: Path) -> http.client.HTTPResponse:
    """The answer to a request; Interrupted for a refusal that may pass, CheckpointError for one that will not."""
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        answer = f"{request.full_url} answered {error.code} {error.reason}"
        if error.code == 416:  # the file has become shorter than what is here
            start_over(part, "the file was changed on the server")
        if error.code == 416 or error.code in PASSING:
            raise Interrupted(answer) from error
        raise CheckpointError(
            f"{answer}; has the file moved? Get it from its authors' page and give its path instead of the name"
        ) from error
    if request.type == "https" and not response.url.startswith("https://"):
        response.close()
        raise CheckpointError(
            f"{request.full_url} leads to {response.url}, where anyone on the way could change the file"
        )
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise CheckpointError(
            f"{request.full_url} answered with a web page instead of a file; is there a login or proxy between?"
        )
    return response


def starting_point(
    response: http.client.HTTPResponse, known: Record, part: Path
) -> tuple[int, Record]:
    """(the byte at which this answer goes on, the record of the version it brings); 0 where it brings the whole file."""
    offset, partial, headers = size_of(part), response.status == 206, response.headers
    span, _, total = headers.get("Content-Range", "").partition("/")
    length = total if partial else headers.get("Content-Length", "")
    if not length.isdigit():
        raise CheckpointError(
            f"{known.url} states no size, so a broken file could pass for a whole one; download it by other means"
        )
    now = Record(known.url, headers.get("ETag", ""), headers.get("Last-Modified", ""), int(length))
    changed = now.contradicts(known)
    if partial and not changed and span.startswith(f"bytes {offset}-"):
        return offset, known
    start_over(
        part,
        "the file was changed on the server"
        if changed
        else "the server cannot continue a download",
    )
    if partial:
        raise Interrupted("the server sent a part that does not fit")
    return 0, now


def start_over(part: Path, reason: str) -> None:
    """Throw away what has arrived, and say so; nothing where nothing has."""
    if part.is_file():
        logger.warning(
            "%s, so the %d bytes in %s are thrown away and it starts over",
            reason,
            size_of(part),
            part,
        )
        part.unlink()


def receive(response: http.client.HTTPResponse, part: Path, offset: int, size: int) -> None:
    """Append the answer's body to the `offset` bytes of `part`, with a progress bar over the whole file."""
    free = shutil.disk_usage(part.parent).free
    if free < size - offset:
        raise OSError(f"{size - offset} bytes are still to come and only {free} are free")
    name = part.name.removesuffix(".part")
    with (
        part.open("ab" if offset else "wb") as file,
        tqdm(
            total=size, initial=offset, desc=name, unit="B", unit_scale=True, unit_divisor=1024
        ) as progress,
    ):
        while chunk := response.read(CHUNK):
            file.write(chunk)
            progress.update(len(chunk))


def size_of(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def is_intact(path: Path, record: Record | None) -> bool:
    """Whether the file `path` is still what its record says; a warning where it is not."""
    if record is None or not record.sha256:
        reason = "it has no complete record"
    elif size_of(path) != record.size:
        reason = f"it has {size_of(path)} bytes instead of {record.size}"
    elif (found := sha256_of(path)) != record.sha256:
        reason = f"it has sha256 {found} instead of {record.sha256}"
    else:
        return True
    logger.warning(
        "%s was changed or damaged since its download (%s) and is downloaded again", path, reason
    )
    return False


__all__ = ["Record", "download", "is_intact"]
