"""A headless Chromium for tests, steered through chromedriver in the W3C's WebDriver protocol.

JSON over HTTP, no further library.

apt-get install chromium chromium-driver
"""

import base64
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,950"
)
# the protocol's key for a reference
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ESCAPE, END, RIGHT, DOWN, ENTER = "\ue00c", "\ue010", "\ue014", "\ue015", "\ue007"

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver on the PATH",
)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A static folder, without a log."""

    def log_message(self, *_: Any) -> None:
        return None


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder that is served as `python -m http.server` does it."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Chromium:
    """One window of a fresh profile."""

    def __init__(self, profile: Path) -> None:
        port = free_port()
        self.process = subprocess.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.address = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS.split(), f"--user-data-dir={profile}"],
        }
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                session = self.call("", {"capabilities": {"alwaysMatch": capabilities}})
                break
            except ConnectionError:
                time.sleep(0.2)
        self.address += f"/{session['sessionId']}"

    def call(self, command: str, body: dict[str, Any] | None = None) -> Any:
        """POST with a body, GET without."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.address + command, data, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from error
        except urllib.error.URLError as error:
            raise ConnectionError from error

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def click(self, css: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": css})
        self.call(f"/element/{found[ELEMENT]}/click", {})

    def type(self, css: str, text: str) -> None:
        """Text into a field, or paths, one per line, into a file input."""
        found = self.call("/element", {"using": "css selector", "value": css})
        self.call(f"/element/{found[ELEMENT]}/value", {"text": text})

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until a script gives something true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"after {seconds} s still not: {script}"
            time.sleep(0.1)

    def errors(self) -> list[dict[str, Any]]:
        """What the console has had to complain about since the last call."""
        return [
            entry
            for entry in self.call("/se/log", {"type": "browser"})
            if entry["level"] == "SEVERE"
        ]

    def press(self, keys: str) -> None:
        """Real key events to whatever has the focus."""
        ups_and_downs = [
            {"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self.call(
            "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": ups_and_downs}]}
        )

    def point(self, x: int, y: int) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y}
        self.call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def photograph(self, name: str, folder: Path) -> None:
        """The window as `name`.png in `folder`, or in the one that SCREENSHOTS names."""
        folder = Path(os.environ.get("SCREENSHOTS", folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(self.call("/screenshot")))

    def quit(self) -> None:
        urllib.request.urlopen(
            urllib.request.Request(self.address, method="DELETE"), timeout=60
        ).close()
        self.process.terminate()
        self.process.wait(60)
