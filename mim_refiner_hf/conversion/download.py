"""A large file from an ordinary web address: goes on where it broke, and is checked at every use.

    path = download("https://dl.fbaipublicfiles.com/capi/capi_vitl14_lvd.pth", Path("capi.pth"))

While it comes in, a file is called `<path>.part`. `<path>.json` beside it records the address, the
server's ETag and date, the size and, at the end, the sha256.

`http_get` of huggingface_hub brings the bytes, with a progress bar, and goes on at most 10 MB
before the byte where a connection broke. It does not know whether all bytes are of one version of
the file. So the server is asked before and after which version it has (HEAD), and for the rest of
that very version (`If-Range`).
"""

import io
import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

from ..runtime.files import CheckpointError, sha256_of, write_json
from ..runtime.retry import patiently

logger = logging.getLogger(__name__)

# compressed on the way, a file would come in another number of bytes than was stated
_UNCOMPRESSED = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Record:
    """What is known about a file; kept as JSON beside it.

    Args:
        url: where it came from.
        etag, last_modified: the server's marks of this version; empty where it gives none.
        size: bytes of the complete file.
        sha256: of the complete file, in hexadecimal; empty until it is complete.
    """

    url: str = ""
    etag: str = ""
    last_modified: str = ""
    size: int = 0
    sha256: str = ""

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record of the file `path`; an empty one where it is absent or damaged."""
        try:
            text = path.with_name(f"{path.name}.json").read_text(encoding="utf-8")
            return cls(**json.loads(text))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        """Put this record beside the file `path`."""
        write_json(path.with_name(f"{path.name}.json"), asdict(self))

    @property
    def validator(self) -> str:
        """What `If-Range` may name: a strong ETag, else the date, else nothing."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified

    def describes(self, path: Path) -> bool:
        """Whether the file `path` is still what was downloaded; a warning where it is not."""
        if _bytes_in(path) == self.size and sha256_of(path) == self.sha256:
            return True
        logger.warning("%s was changed or damaged since its download and is downloaded again", path)
        return False


class BrokenDownload(ConnectionResetError):
    """What has arrived is not the file; as after a broken connection, another attempt may help."""


class _AppendOnly(io.BufferedWriter):
    """A file that `http_get` may continue but not empty.

    A server that cannot continue a download sends all of it. `http_get` would empty the file and
    begin again, for ever if the connection breaks each time.
    """

    def truncate(self, size: int | None = None) -> int:
        raise BrokenDownload("the server cannot continue a download")


def download(url: str, path: Path) -> Path:
    """`path` with the file from `url`: what lies there if its record fits it, else downloaded.

    Raises:
        CheckpointError: offline, for an answer that is no file, or when the connection keeps
            breaking; what has arrived is kept.
        OSError: when the disk is full or cannot be written.
    """
    record = Record.read(path)
    if path.is_file() and record.url == url and record.describes(path):
        return path
    if constants.is_offline_mode():
        raise CheckpointError(
            f"{path} is not there (or damaged) and HF_HUB_OFFLINE=1 forbids the download; "
            "unset it once"
        )

    part = path.with_name(f"{path.name}.part")
    version = None
    while version is None:
        before = _bytes_in(part)
        try:
            version = patiently(lambda: _complete(part, url, path), f"downloading {url}")
        except ConnectionError as error:
            arrived = _bytes_in(part)
            # as long as a round of attempts brings something, the next one may bring the rest
            if arrived <= before:
                raise CheckpointError(
                    f"the download of {url} keeps failing ({error}); {arrived} bytes are kept at "
                    f"{part}: check the connection and run the same command again, which goes on "
                    "from there"
                ) from error
        except HfHubHTTPError as error:
            answer = f"{error.response.status_code} {error.response.reason_phrase}"
            raise CheckpointError(
                f"{url} answered {answer}; has the file moved? Get it from its authors' page and "
                "give its path instead of the name"
            ) from error

    # the record comes first: without it a file is not believed
    replace(version, sha256=sha256_of(part)).write(path)
    return part.replace(path)


def _complete(part: Path, url: str, path: Path) -> Record:
    """One attempt to bring what `part` lacks: the version that it then is, else BrokenDownload."""
    version, address = _ask_for_version(url)
    known = replace(Record.read(path), sha256="")
    if known != version or not version.validator:
        _start_over(part)
    version.write(path)

    arrived = _bytes_in(part)
    missing = version.size - arrived
    free = shutil.disk_usage(part.parent).free
    if free < missing:
        raise OSError(f"{missing} bytes are still to come and only {free} are free")

    # an `If-Range` that is no version's asks for all of the file
    headers = {**_UNCOMPRESSED, "If-Range": version.validator or '"none"'}
    is_whole = True
    try:
        with _AppendOnly(io.FileIO(part, "ab")) as file:
            http_get(
                address,
                file,
                resume_size=arrived,
                headers=headers,
                expected_size=version.size,
                displayed_filename=path.name,
            )
    except OSError as error:
        # of the disk (these have a number) or a refusal, but for 416: the part is too long
        status = getattr(getattr(error, "response", None), "status_code", 416)
        if error.errno is not None or status != 416:
            raise
        is_whole = False

    later, _ = _ask_for_version(url)
    if is_whole and later == version:
        return version
    arrived = _bytes_in(part)
    _start_over(part)
    raise BrokenDownload(f"the connection was closed at {arrived} of {version.size} bytes")


def _ask_for_version(url: str) -> tuple[Record, str]:
    """Which version of the file the server has now, and the address to which `url` leads.

    Raises:
        CheckpointError: for a redirection from https to http, a web page, or no size.
        HfHubHTTPError: for a refusal.
    """
    response = get_session().head(
        url,
        headers=_UNCOMPRESSED,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    for hop in (*response.history, response):
        if url.startswith("https://") and hop.url.scheme != "https":
            raise CheckpointError(
                f"{url} leads to {hop.url}, where anyone on the way could change the file"
            )
    hf_raise_for_status(response)

    headers = response.headers
    if headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError(
            f"{url} answered with a web page instead of a file; is there a login or proxy between?"
        )
    size = headers.get("Content-Length", "")
    if not size.isdigit():
        raise CheckpointError(
            f"{url} states no size, so a broken file could pass for a whole one; download it by "
            "other means"
        )
    version = Record(url, headers.get("ETag", ""), headers.get("Last-Modified", ""), int(size))
    return version, str(response.url)


def _start_over(part: Path) -> None:
    """Throw away what has arrived, and say so; nothing where nothing has."""
    if part.is_file():
        logger.warning(
            "the file was changed on the server, or its download cannot be continued: the %d bytes "
            "in %s are thrown away and it starts over",
            _bytes_in(part),
            part,
        )
        part.unlink()


def _bytes_in(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
