"""A Hub in trouble: rate limits, server errors, broken connections and kills, while loading and
while pushing.

`Trouble` stands between us and the Hub of `stub_hub` and spoils chosen requests; all else it passes
on.
"""

import http.client
import io
import os
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import datasets
import pytest
import torch
from golden_cases import facts
from huggingface_hub import close_session, constants
from PIL import Image
from test_birder import files_of

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    cli,
    load_classifier,
    load_encoder,
)
from mim_refiner_hf.conversion import CheckpointError
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing import hub, push_folder, save_model_folder
from mim_refiner_hf.runtime import retry as patience

REPOSITORY = "tester/tiny"
_FILE = io.BytesIO()
Image.new("RGB", (8, 8)).save(_FILE, "PNG")
PICTURE = _FILE.getvalue()


class Trouble:
    """`spoil(pattern, how, times)`.

    So many requests whose "METHOD /path" matches are answered with a status (429 asks to wait 0 s),
    "reset" (the connection breaks), "hang", or "pass" (it is let through, and no later rule sees
    it); `seen` holds what came.
    """

    def __init__(self, hub_url: str) -> None:
        self.rules: list[list[Any]] = []
        self.seen: list[str] = []
        self.hanging = threading.Event()
        trouble = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def go(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = f"{self.command} {self.path}"
                trouble.seen.append(request)
                for rule in trouble.rules:
                    if rule[2] > 0 and re.search(rule[0], request):
                        rule[2] -= 1
                        return self.pass_on(body) if rule[1] == "pass" else self.spoil(rule[1])
                return self.pass_on(body)

            def spoil(self, how: int | str) -> None:
                if how == "hang":
                    trouble.hanging.set()
                    time.sleep(60)
                elif how == "reset":
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    self.connection.close()
                    self.close_connection = True
                else:
                    assert isinstance(how, int)
                    self.send_response(how)
                    for name, value in (("Retry-After", "0"), ("Content-Length", "0")):
                        self.send_header(name, value)
                    self.end_headers()

            def pass_on(self, body: bytes) -> None:
                connection = http.client.HTTPConnection(urlsplit(hub_url).netloc)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name not in ("Server", "Date", "Connection"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = go

            def log_message(self, *_: Any) -> None: ...

            def handle(self) -> None:
                try:
                    super().handle()
                # reset on purpose, or the client was killed
                except OSError:
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign, assignment]
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spoil(self, pattern: str, how: int | str, times: int = 1000) -> None:
        self.rules.append([pattern, how, times])


@pytest.fixture
def trouble(stub_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    """The Hub that this process talks to, without waiting in vain."""
    between = Trouble(stub_hub.url)
    # also for the addresses that it gives for uploads
    stub_hub.url = between.url
    template = f"{between.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    changed = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": between.url,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", between.url)
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    close_session()
    yield between
    between.server.shutdown()
    between.server.server_close()
    close_session()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several files of weights, with a card."""
    torch.manual_seed(1)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    folder = tmp_path_factory.mktemp("hub") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "MAX_SHARD_SIZE", "40KB")
        processor = MimRefinerImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        save_model_folder(
            folder,
            MimRefinerModel(MimRefinerConfig(**shape, image_size=32, patch_size=8)),
            processor,
        )
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n\n`your-name/your-model`\n", encoding="utf-8"
    )
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_the_hub(stub: Any) -> set[str]:
    return set(stub.repos[REPOSITORY]["files"])


@pytest.mark.usefixtures("goldens", "trouble")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_repository_of_birder_is_a_source(suffix: str, stub_hub: Any) -> None:
    """Its weights are called as the repository; its config.json is not one of ours."""
    case = "birder-b14"
    file = next(path for path in files_of(case) if path.suffix == suffix)
    name = "birder-project/rope_vit_reg4_b14_capi-places365"
    files = {
        f"{name.partition('/')[2]}{suffix}": file.read_bytes(),
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "config.json": b'{"architecture": "rope_vit_reg4_b14"}',
        "other.pt": b"not that",
    }
    stub_hub.repos[name] = {"files": files, "commits": [], "private": False, "sha": "0" * 40}

    heads = facts(case)["model_config"]["num_heads"]
    encoder = load_encoder(name, num_heads=heads)
    assert encoder.load_report.family == "birder"
    assert encoder.licence.identifier == "apache-2.0"
    expected = load_encoder(file, num_heads=heads).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in encoder.state_dict().items())
    classifier = load_classifier(name, num_heads=heads)
    of_the_file = load_classifier(file, num_heads=heads)
    assert classifier.config.id2label == of_the_file.config.id2label
    assert torch.equal(classifier.classifier.weight, of_the_file.classifier.weight)


@pytest.mark.usefixtures("trouble")
def test_a_repository_without_weights_says_what_it_lacks(stub_hub: Any) -> None:
    files = {"README.md": b"a card"}
    name = "birder-project/nothing"
    stub_hub.repos[name] = {"files": files, "commits": [], "private": False, "sha": "0" * 40}
    with pytest.raises(
        CheckpointError, match=r"nothing holds no model\.safetensors and no pytorch"
    ):
        load_encoder(name)


HOW = [429, 500, 503, "reset"]
PUSHING = [
    "POST /api/repos/create",
    "POST .*/preupload/",
    "POST .*/objects/batch",
    "PUT /_lfs/",
    "POST .*/commit/",
]


@pytest.mark.parametrize("how", HOW)
def test_a_push_outlasts_passing_trouble(
    how: int | str, trouble: Trouble, stub_hub: Any, model: Path
) -> None:
    """Each kind of request fails twice."""
    for pattern in PUSHING:
        trouble.spoil(pattern, how, times=2)
    assert push_folder(model, REPOSITORY) == f"{trouble.url}/{REPOSITORY}"
    assert on_the_hub(stub_hub) - {".gitattributes"} == set(contents(model))
    assert all(times == 0 for _, _, times in trouble.rules)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pattern", ["POST /api/repos/create", "PUT /_lfs/", "POST .*/commit/"])
def test_lasting_trouble_ends_with_the_command_to_continue(
    how: int | str, pattern: str, trouble: Trouble, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(model)
    trouble.spoil(pattern, how)
    assert cli.main(["push", str(model), REPOSITORY]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: the Hub did not take {REPOSITORY} (")
    assert line.endswith(
        f"the local result is intact at {model}, continue with: mim-refiner push {model} "
        f"{REPOSITORY}"
    )
    assert contents(model) == before
    assert len(trouble.seen) < 150  # bounded
    trouble.rules.clear()
    assert cli.main(["push", str(model), REPOSITORY]) == 0


def test_a_refusal_is_not_repeated(trouble: Trouble, model: Path) -> None:
    trouble.spoil("POST /api/repos/create", 400)
    with pytest.raises(hub.PushError, match="Bad request"):
        push_folder(model, REPOSITORY)
    assert len(trouble.seen) == 1


def test_a_killed_push_is_continued_without_sending_files_twice(
    trouble: Trouble, stub_hub: Any, model: Path
) -> None:
    """kill -9 while the last of several files of weights is on its way.

    What has arrived stays, only the rest is sent.
    """
    shards = len(list(model.glob("*.safetensors")))
    trouble.spoil("POST .*/commit/", "hang", times=1)
    process = os.fork()
    if process == 0:
        close_session()
        push_folder(model, REPOSITORY)
        os._exit(0)
    assert trouble.hanging.wait(60)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(stub_hub.lfs) == shards and on_the_hub(stub_hub) == set()
    # as if this one had not been through
    lost, _ = stub_hub.lfs.popitem()
    sent = len(trouble.seen)
    push_folder(model, REPOSITORY)
    again = [request for request in trouble.seen[sent:] if request.startswith("PUT")]
    assert again == [f"PUT /_lfs/{lost}"]
    assert on_the_hub(stub_hub) - {".gitattributes"} == set(contents(model))
    sent = len(trouble.seen)
    # complete: nothing is sent at all
    push_folder(model, REPOSITORY)
    assert not [request for request in trouble.seen[sent:] if request.startswith("PUT")]


KILLED_AT = {
    "the second file": ("PUT /_lfs/", False),
    "the commit": ("POST .*/commit/", False),
    "the card": ("POST .*/commit/", True),
}


@pytest.mark.parametrize("place", KILLED_AT)
def test_a_killed_push_never_shows_half_a_model(
    place: str, trouble: Trouble, stub_hub: Any, model: Path
) -> None:
    """kill -9 somewhere on the way: the repository holds nothing or all of the model.

    The same command completes it.
    """
    pattern, weights_are_there = KILLED_AT[place]
    before, whole = contents(model), set(contents(model))
    if place != "the commit":
        trouble.spoil(pattern, "pass", times=1)
    trouble.spoil(pattern, "hang", times=1)
    process = os.fork()
    if process == 0:
        close_session()
        cli.main(["push", str(model), REPOSITORY])
        os._exit(0)
    assert trouble.hanging.wait(60)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert on_the_hub(stub_hub) - {".gitattributes"} == (
        whole - {"README.md"} if weights_are_there else set()
    )
    assert contents(model) == before
    assert cli.main(["push", str(model), REPOSITORY]) == 0
    summaries = [summary for _, summary in stub_hub.repos[REPOSITORY]["commits"]]
    assert (
        summaries[-1] == "Model card with metrics"
        and summaries[0] == "Weights, configuration and code"
    )
    assert {name: stub_hub.repos[REPOSITORY]["files"][name] for name in whole - {"README.md"}} == {
        name: content for name, content in before.items() if name != "README.md"
    }
    assert contents(model) == before


@pytest.mark.parametrize("how", HOW)
def test_loading_outlasts_passing_trouble(how: int | str, trouble: Trouble, model: Path) -> None:
    push_folder(model, REPOSITORY)
    for pattern in (
        f"GET /api/models/{REPOSITORY}",
        "(GET|HEAD) .*/config.json",
        "(GET|HEAD) .*safetensors",
    ):
        trouble.spoil(pattern, how, times=1)
    expected = load_encoder(model).state_dict()
    loaded = load_encoder(REPOSITORY).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("how", HOW)
def test_loading_in_lasting_trouble_ends_with_one_sentence(
    how: int | str, trouble: Trouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble.spoil(".", how)
    assert cli.main(["convert", "ada/birds", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ada/birds: the Hub does not answer (") and line.endswith(
        "run the same command again later"
    )
    assert len(trouble.seen) < 50 and not (tmp_path / "out").exists()


NO_WAY = [
    socket.gaierror(-2, "Name or service not known"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    ConnectionRefusedError(111, "Connection refused"),
    OSError(101, "Network is unreachable"),
    OSError(113, "No route to host"),
]


class ConnectError(Exception):
    """As the library below huggingface_hub has it, under either of its names."""

    __module__ = "httpx"


class Calls:
    """Something to be done patiently, that fails in these ways before it works."""

    def __init__(self, *failures: OSError) -> None:
        self.failures = list(failures)
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        if self.failures:
            # as the libraries wrap it
            raise ConnectError("from the network") from self.failures.pop(0)
        return "done"


@pytest.mark.parametrize("failure", NO_WAY, ids=str)
def test_a_host_without_a_way_to_it_is_asked_once(
    failure: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSE", 0.0)
    call = Calls(failure)
    with pytest.raises(ConnectionError, match="no way to that host, so it was asked only once"):
        patience.patiently(call, "loading ada/birds")
    assert call.count == 1

    # one that was reached before is waited for, and so are time-outs
    for first in (ConnectionResetError(), TimeoutError()):
        call = Calls(first, failure, failure)
        assert patience.patiently(call, "loading ada/birds") == "done" and call.count == 4


def test_a_model_of_a_closed_port_is_refused_in_one_line(
    trouble: Trouble,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "PAUSE", 1000.0)
    trouble.server.shutdown()
    trouble.server.server_close()
    assert cli.main(["convert", "ada/birds", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "Connection refused: no way to that host, so it was asked only once" in said[-1]
    assert "check the name and the network" in said[-1] and not (tmp_path / "out").exists()


def cached_birds(cache: Path) -> None:
    """Two images in the cache of `datasets`, as the data set ada/birds leaves them there."""
    images = [{"bytes": PICTURE, "path": None}] * 2
    table = datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )
    table.to_parquet(cache / "birds.parquet")
    builder = datasets.load_dataset_builder(
        "parquet", data_files=str(cache / "birds.parquet"), cache_dir=str(cache / "made")
    )
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    (made / "parquet-train.arrow").rename(made / "birds-train.arrow")
    info = (made / "dataset_info.json").read_text().replace('"parquet"', '"birds"')
    (made / "dataset_info.json").write_text(info)
    kept = cache / "ada___birds/default/0.0.0" / made.name
    kept.parent.mkdir(parents=True)
    made.rename(kept)


@pytest.mark.parametrize("cached", [False, True])
def test_a_data_set_of_a_closed_port_is_looked_for_in_the_cache_alone(
    cached: bool, trouble: Trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_waiting(_: float) -> None:
        pytest.fail("a host that is not there was waited for")

    impatient = SimpleNamespace(**{**vars(time), "sleep": no_waiting})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    if cached:
        cached_birds(tmp_path)
    trouble.server.shutdown()
    trouble.server.server_close()
    close_session()

    if cached:
        assert len(open_images("ada/birds")) == 2
    else:
        with pytest.raises(ConnectionError, match=r"refused.* asked only once, .* not in the cach"):
            open_images("ada/birds")
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("how", HOW)
def test_a_data_set_in_lasting_trouble_ends_with_one_sentence(
    how: int | str,
    trouble: Trouble,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trouble.spoil(".", how)
    words = [
        "embed",
        str(model),
        "--dataset",
        "ada/birds",
        "--num_workers",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "error: No path 'ada/birds' here, and the Hub cannot be reached to look for it ("
    )
    assert len(trouble.seen) < 100 and not (tmp_path / "out").exists()


def test_offline_nothing_is_asked_and_nothing_repeated(
    trouble: Trouble,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    out = str(tmp_path / "out")
    for words, code, says in [
        (
            ["convert", "ada/birds", out],
            2,
            "neither a local path nor a model that the Hub could deliver",
        ),
        (
            ["embed", str(model), "--dataset", "ada/birds", "--out", out],
            1,
            "the Hub cannot be reached",
        ),
        (
            ["push", str(model), REPOSITORY],
            1,
            f"continue with: mim-refiner push {model} {REPOSITORY}",
        ),
    ]:
        assert cli.main(words) == code
        errors = capsys.readouterr().err
        assert says in errors.strip().splitlines()[-1] and "trying again" not in errors
    assert trouble.seen == [] and not (tmp_path / "out").exists()


def test_a_cached_model_needs_no_hub(trouble: Trouble, model: Path) -> None:
    push_folder(model, REPOSITORY)
    load_encoder(REPOSITORY)
    trouble.spoil(".", 500)
    assert load_encoder(REPOSITORY).config.hidden_size == 32


def test_how_long_is_waited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as the server asks, within bounds; else longer each time.

    And not at all for what will not pass.
    """

    class Refused(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            self.response = SimpleNamespace(
                status_code=status,
                headers={name.replace("_", "-"): value for name, value in headers.items()},
            )

    waited: Counter[float] = Counter()
    monkeypatch.setattr(
        patience, "time", SimpleNamespace(sleep=lambda seconds: waited.update([seconds]))
    )
    for error, expected in [
        (Refused(429, Retry_After="7"), [7.0] * 4),
        (Refused(429, Retry_After="86400"), [60.0] * 4),
        (Refused(500), [2.0, 4.0, 8.0, 16.0]),
        (ConnectionResetError(), [2.0, 4.0, 8.0, 16.0]),
        (Refused(404), []),
        (Refused(401), []),
        (ValueError("x"), []),
    ]:
        waited.clear()

        def call(error: Exception = error) -> None:
            raise error

        with pytest.raises(ConnectionError if expected else type(error)):
            patience.patiently(call, "asking")
        assert sorted(waited.elements()) == expected, error
    assert "asking: ConnectionResetError; trying again in 2 s (2 of 5)" in caplog.text
