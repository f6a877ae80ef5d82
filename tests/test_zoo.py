"""The zoo: the table of official names, and downloads from a local server that cuts, changes,
refuses and misstates its file.
"""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from mim_refiner_hf import load_encoder
from mim_refiner_hf.conversion import CheckpointError, download, zoo
from mim_refiner_hf.conversion.layouts import LAYOUTS
from mim_refiner_hf.conversion.zoo import ZOO, ZooEntry, fetch, find_entry
from mim_refiner_hf.runtime import retry

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
CHANGED = CONTENT[::-1]


class Server(ThreadingHTTPServer):
    """Serves one file; its fields say how well, `requests` what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        # bytes after which the connection of the next GETs breaks
        self.cuts: list[int] = []
        # status codes of the next HEADs; 0 answers as usual
        self.heads: list[int] = []
        # status codes of the next GETs
        self.gets: list[int] = []
        # the content after the next GET
        self.then: bytes | None = None
        # overrides; an empty value leaves the header out
        self.headers: dict[str, str] = {}
        self.ranges = True  # whether it can continue
        self.if_range = True  # whether it looks at If-Range
        self.requests: list[str] = []  # the Range header of each GET

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.th"


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET from its server's fields."""

    server: Server

    def do_HEAD(self) -> None:
        status = self.server.heads.pop(0) if self.server.heads else 0
        if status:
            self.send_error(status)
        else:
            self.send_headers(self.server.content, 0)

    def do_GET(self) -> None:
        server, content = self.server, self.server.content
        asked = self.headers.get("Range", "")
        server.requests.append(asked)
        if server.then is not None:
            server.content, server.then = server.then, None
        start = int(re.findall(r"\d+", asked)[0]) if asked and server.ranges else 0
        known = (etag_of(content), server.headers.get("Last-Modified"))
        if server.if_range and self.headers.get("If-Range") not in known:
            start = 0
        status = server.gets.pop(0) if server.gets else 0
        if start >= len(content):
            status = 416
        if status:
            self.send_error(status)
            return
        self.send_headers(content, start)
        body = content[start:]
        # HTTP/1.0: closes after each answer
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def send_headers(self, content: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        headers = {
            "ETag": etag_of(content),
            "Content-Length": str(len(content) - start),
            "Content-Type": "application/octet-stream",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in (headers | self.server.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def etag_of(content: bytes) -> str:
    return '"' + hashlib.md5(content).hexdigest() + '"'


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server on this machine, an empty cache folder, and no waiting between attempts."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(retry, "PAUSE", 0.0)
    # `http_get` loses the chunk in which a connection breaks, and waits a second before the next
    # attempt
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 200)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with Server() as running:
        threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        yield running
        running.shutdown()


def entry(server: Server) -> ZooEntry:
    """An entry of the zoo whose file this server holds."""
    return replace(ZOO["mae-refined-l16"], url=server.url)


def state(folder: Path) -> set[str]:
    """What lies in a cache folder, without the lock."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# --- the table ------------------------------------------------------------------------------------


def test_names_and_addresses_are_those_of_the_method(shared: Path) -> None:
    """Every name of the last table of METHOD.md, the authors' spelling, with the address that its
    row spells out, and beyond them only those of MAE-CT's authors and of birder.
    """
    stated: dict[str, str] = {}
    for line in (
        (shared / "METHOD.md").read_text().partition("## Where the weights live")[2].splitlines()
    ):
        if not line.startswith("| `"):
            continue
        names, (first, *more) = (re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:3])
        names = [name for name in names if "*" not in name]
        if "` + `" in line:
            files = [first + file for file in more]
        elif "<name>" in first:
            files = [first.replace("<name>", name) for name in names]
        elif braces := re.search(r"\{(.+)\}", first):
            files = [first.replace(braces[0], choice) for choice in braces[1].split(",")]
        else:
            files = [
                first if first.startswith("https") else f"{first}/{more[0]}"
            ]  # the latter on the Hub
        stated |= dict(zip(names, files, strict=True))
    assert len(stated) == 26
    ours = {}
    for entry in ZOO.values():
        if not re.match(r"mae-ct-(b|l|h)|mae-reimpl-(b|l|h)16$|rope_vit_", entry.name):
            ours[entry.name] = entry.url or f"{entry.repo}/{entry.filename}"
    named = {name: find_entry(name) for name in stated}
    for name, address in stated.items():
        # what the authors' refined files are called
        if "_refined_" in name:
            assert find_entry(Path(address).stem) == named[name]
    assert ours == {entry.name: stated[name] for name, entry in named.items() if entry}


def test_entries_state_what_the_package_can_use() -> None:
    families = {layout.family for layout in LAYOUTS}
    for entry in ZOO.values():
        assert entry.family in families, entry.name
        assert bool(entry.url) != bool(entry.repo and entry.filename)
        assert str(entry.patch_size) in entry.name and re.fullmatch(
            r"ViT-(B|L|H|2B|So150M)/(14|16)", entry.architecture
        )


# --- one file, once -------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_recorded(server: Server) -> None:
    path = fetch(entry(server))
    assert (
        path == Path(constants.HF_HOME) / "mim_refiner_hf" / "mae-refined-l16.th"
        and path.read_bytes() == CONTENT
    )
    record = json.loads(path.with_name("mae-refined-l16.th.json").read_text())
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest() and record["size"] == len(
        CONTENT
    )
    assert record["url"] == server.url and record["etag"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert fetch(entry(server)) == path and server.requests == [""]
    assert state(path.parent) == {"mae-refined-l16.th", "mae-refined-l16.th.json"}


def test_a_broken_connection_is_resumed(server: Server) -> None:
    server.cuts = [1000, 50_000, 0]
    assert fetch(entry(server)).read_bytes() == CONTENT
    assert server.requests == ["", "bytes=1000-", "bytes=51000-", "bytes=51000-"]


def test_a_connection_that_keeps_breaking_leaves_a_start_for_the_next_call(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [1000] + [0] * 1000
    with pytest.raises(
        CheckpointError, match=r"keeps failing.*1000 bytes are kept.*same command again"
    ):
        fetch(entry(server), tmp_path)
    assert (tmp_path / "mae-refined-l16.th.part").read_bytes() == CONTENT[:1000] and not (
        tmp_path / "mae-refined-l16.th"
    ).exists()
    server.requests, server.cuts = [], []
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT and server.requests == [
        "bytes=1000-"
    ]
    assert state(tmp_path) - {"home"} == {"mae-refined-l16.th", "mae-refined-l16.th.json"}


def test_a_file_of_an_earlier_spelling_is_not_downloaded_again(
    server: Server, tmp_path: Path
) -> None:
    """Nor what came of it before the connection broke."""
    for suffix in ("", ".part"):
        folder = tmp_path / f"kept{suffix}"
        kept = fetch(entry(server), folder)
        for path in (kept, kept.with_name(f"{kept.name}.json")):
            name = path.name.replace("mae-refined-l16.th", f"mae_refined_l16.th{suffix}")
            path.rename(folder / name.replace(".part.json", ".json"))
        server.requests.clear()
        found = fetch(entry(server), folder)
        assert (found.name, found.read_bytes()) == ("mae_refined_l16.th", CONTENT)
        assert server.requests == [], suffix
    # another model's is none of it
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mae_refined_h14.th").write_bytes(b"")
    assert fetch(entry(server), tmp_path / "other").name == "mae-refined-l16.th"


def test_no_server_at_all(server: Server, tmp_path: Path) -> None:
    server.server_close()
    with pytest.raises(CheckpointError, match=r"keeps failing \(.*refused.*0 bytes are kept"):
        fetch(entry(server), tmp_path)


def test_a_crash_before_the_renaming_costs_no_download(server: Server, tmp_path: Path) -> None:
    path = fetch(entry(server), tmp_path)
    path.rename(tmp_path / "mae-refined-l16.th.part")
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT and server.requests == [""]


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("changed", [CHANGED, CHANGED[:500], CHANGED + b"more"])
def test_a_file_changed_on_the_server_starts_over(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: bytes, if_range: bool
) -> None:
    """Also by a server that continues blindly.

    Its ETag, its size, or a range that is not there any more tell.
    """
    server.cuts, server.then, server.if_range = [1000], changed, if_range
    assert fetch(entry(server), tmp_path).read_bytes() == changed
    assert "changed on the server" in caplog.text and "first" not in caplog.text
    assert (
        json.loads((tmp_path / "mae-refined-l16.th.json").read_text())["sha256"]
        == hashlib.sha256(changed).hexdigest()
    )


@pytest.mark.parametrize("headers", [{}, {"ETag": ""}, {"ETag": 'W/"weak"'}])
def test_a_server_that_cannot_continue_starts_over(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    """It ignores ranges, or gives no strong mark of the version: nothing can be continued."""
    server.cuts, server.headers, server.ranges = [1000], headers, bool(headers)
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT
    assert server.requests[0] == server.requests[-1] == "" and "starts over" in caplog.text


def test_a_part_of_unknown_origin_is_never_completed(server: Server, tmp_path: Path) -> None:
    """Without a mark of the version, not even by a server that would continue blindly."""
    server.headers, server.if_range = {"ETag": ""}, False
    server.cuts = [1000] + [0] * 1000
    with pytest.raises(CheckpointError, match="keeps failing"):
        fetch(entry(server), tmp_path)
    server.cuts, server.requests, server.content = [], [], CHANGED
    assert fetch(entry(server), tmp_path).read_bytes() == CHANGED
    assert server.requests == [""]


def test_the_date_stands_in_for_an_etag(server: Server, tmp_path: Path) -> None:
    server.cuts, server.headers = (
        [1000],
        {"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
    )
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT and server.requests == [
        "",
        "bytes=1000-",
    ]


def test_a_final_refusal_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.heads = [404]
    with pytest.raises(
        CheckpointError, match=r"weights\.th answered 404 Not Found; has the file moved"
    ):
        fetch(entry(server), tmp_path)
    assert server.requests == []
    server.gets = [403]
    with pytest.raises(CheckpointError, match=r"weights\.th answered 403 Forbidden"):
        fetch(entry(server), tmp_path)
    assert server.requests == [""]


def test_a_passing_refusal_is_repeated(server: Server, tmp_path: Path) -> None:
    server.heads, server.gets = [500, 0, 502], [503]
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["", ""] and server.heads == []


def test_a_good_answer_to_head_alone_is_not_enough(server: Server, tmp_path: Path) -> None:
    """The file that a GET brings is compared with what HEAD said of it, before and after."""
    server.headers = {"ETag": '"always"'}
    server.then, server.cuts = CHANGED + b"more", [1000]
    assert fetch(entry(server), tmp_path).read_bytes() == CHANGED + b"more"


@pytest.mark.parametrize(
    "headers, reason",
    [
        ({"Content-Type": "text/html; charset=utf-8"}, "web page instead of a file"),
        ({"Content-Length": ""}, "states no size"),
        ({"Content-Length": str(len(CONTENT) + 1)}, "closed at 102400 of 102401 bytes"),
    ],
)
def test_what_is_no_whole_file_is_not_kept(
    server: Server, tmp_path: Path, headers: dict[str, str], reason: str
) -> None:
    server.headers, server.ranges = headers, False
    with pytest.raises(CheckpointError, match=reason):
        fetch(entry(server), tmp_path)
    assert not (tmp_path / "mae-refined-l16.th").exists()


@pytest.mark.parametrize("damaged", [b"", CONTENT[:-1], CHANGED])
def test_a_file_changed_here_is_downloaded_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    path = fetch(entry(server), tmp_path)
    path.write_bytes(damaged)
    assert fetch(entry(server), tmp_path).read_bytes() == CONTENT
    assert "changed or damaged since its download" in caplog.text and server.requests == ["", ""]


def test_offline_takes_what_is_there_and_says_what_is_not(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(entry(server), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(entry(server), tmp_path) == path
    path.write_bytes(CHANGED)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=1 forbids"):
        fetch(entry(server), tmp_path)
    assert server.requests == [""]


def test_a_full_disk_is_noticed_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 7, 3)
    )  # type: ignore[attr-defined]
    with pytest.raises(
        CheckpointError,
        match=r"102400 bytes are still to come and only 3 are free; free space there or set "
        r"HF_HOME",
    ):
        fetch(entry(server), tmp_path)
    assert not list(tmp_path.glob("*.th*.part"))


def test_processes_that_ask_together_download_once(server: Server, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(entry(server), tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(found) == 4
        and {path.read_bytes() for path in found} == {CONTENT}
        and server.requests == [""]
    )


def test_a_file_of_the_hub_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, asked = tmp_path / "blob", []

    def hub(repo: str, filename: str, force_download: bool = False) -> str:
        asked.append((repo, filename, force_download))
        if force_download or not kept.exists():
            kept.write_bytes(CONTENT)
        return str(kept)

    monkeypatch.setattr(zoo, "hf_hub_download", hub)
    assert fetch("crossmae-l16", tmp_path).read_bytes() == CONTENT
    record = json.loads((tmp_path / "crossmae-l16.pth.json").read_text())
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest() and record["size"] == len(
        CONTENT
    )
    kept.write_bytes(CHANGED)
    assert (
        fetch("crossmae-l16", tmp_path).read_bytes() == CONTENT
        and "changed or damaged" in caplog.text
    )
    assert [force for _, _, force in asked] == [False, False, True] and asked[0][
        0
    ] == "longlian/CrossMAE"


# --- as a source ----------------------------------------------------------------------------------


def test_a_name_is_a_source_like_any_other(
    server: Server, goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the zoo gives the weights and the family of its file.

    A local file of that name comes first.
    """
    case = goldens / "mimrefiner-prenorm"
    server.content = (case / "checkpoint.th").read_bytes()
    monkeypatch.setitem(ZOO, "mae-refined-l16", entry(server))  # type: ignore[arg-type]
    heads = json.loads((case / "config.json").read_text())["num_heads"]
    encoder = load_encoder("mae-refined-l16", num_heads=heads)
    expected = load_encoder(case / "checkpoint.th", num_heads=heads)
    assert (
        encoder.load_report.family == "mim_refiner_prenorm"
        and encoder.load_report.placed == expected.load_report.placed
    )
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(encoder.parameters(), expected.parameters(), strict=True)
    )
    assert encoder.config.name_or_path == "mae-refined-l16"
    monkeypatch.chdir(tmp_path)
    Path("mae-refined-l16").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="mae-refined-l16 is unreadable"):
        load_encoder("mae-refined-l16")


def test_an_unknown_name_says_which_are_known() -> None:
    with pytest.raises(
        CheckpointError,
        match="'mae_refined_l61' is not a name of the zoo; allowed: mae-refined-l16,",
    ):
        fetch("mae_refined_l61")
