"""Headless Chromium, driven over WebDriver (chromedriver speaks plain HTTP and JSON)."""

import base64
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--ignore-certificate-errors",
)
START_S = 30.0
ANSWER_S = 60.0


class Browser:
    """One window."""

    def __init__(self, port: int, profile: str, flags: Sequence[str]) -> None:
        self._port = port
        options = {"args": [*FLAGS, f"--user-data-dir={profile}", *flags]}
        always = {"acceptInsecureCerts": True, "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._path = ""
        self._path = f"/session/{self._ask('POST', '/session', {'capabilities': {'alwaysMatch': always}})['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript in the page; `return` gives the answer."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, keys: str) -> None:
        """Press keys, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def accessible(self) -> list[dict[str, Any]]:
        """Return what a screen reader is given: role, name and properties of each thing, in its order."""
        asked = {"cmd": "Accessibility.getFullAXTree", "params": {}}
        nodes = {node["nodeId"]: node for node in self._ask("POST", "/goog/cdp/execute", asked)["nodes"]}
        found: list[dict[str, Any]] = []
        waiting = [next(iter(nodes.values()))]
        while waiting:
            node = waiting.pop()
            waiting += [nodes[child] for child in reversed(node.get("childIds", ())) if child in nodes]
            if not node["ignored"]:
                properties = {one["name"]: one["value"].get("value") for one in node.get("properties", ())}
                role, name = (node.get(key, {}).get("value", "") for key in ("role", "name"))
                found.append({**properties, "role": role, "name": name})
        return found

    def size(self, width: int, height: int) -> None:
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def cookies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("GET", "/cookie")
        return found

    def complaints(self) -> list[str]:
        """Return what the browser complained about: errors of scripts, of the policy, of loading."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def wait(self, script: str, *arguments: object, timeout_s: float = 15.0) -> Any:
        """Wait until the script returns something true, and return it."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = self.run(script, *arguments)
            if found:
                return found
            assert time.monotonic() < deadline_s, f"in vain: {script}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)

    def close(self) -> None:
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        try:
            content = json.dumps(body).encode() if method == "POST" else None
            connection.request(method, self._path + path, content, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message'][:500]}")
        return value


@contextmanager
def browser(*flags: str, prefix: Sequence[str] = (), port: int | None = None) -> Iterator[Browser]:
    """Start a browser with an empty profile; nothing of it is left afterwards."""
    assert DRIVER is not None, "there is no chromedriver: script/setup --dev installs it"
    with tempfile.TemporaryDirectory() as profile:
        number = port or _free_port()
        command = [*prefix, DRIVER, f"--port={number}", "--log-level=OFF"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
            try:
                _until(lambda: _listens(number))
                window = Browser(number, profile, flags)
                try:
                    yield window
                finally:
                    window.close()
            finally:
                driver.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline_s, "chromedriver does not start"
        time.sleep(0.05)
