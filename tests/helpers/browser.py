"""A headless Chromium, driven by its DevTools protocol over a websocket; what it logs is kept."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest


class Page:
    """One page; `evaluate` returns plain values."""

    def __init__(self, line):
        self._line, self._number = line, 0
        self.complaints = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        self._line.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._line.recv(timeout=60))
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]
            self._hear(said)

    def _hear(self, said):
        parameters = said.get("params", {})
        if said["method"] == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"].get("text"))
        elif said["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.complaints.append(str(parameters["args"]))
        elif said["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif said["method"] == "Network.requestWillBeSent":
            self.requested = getattr(self, "requested", []) + [parameters["request"]["url"]]

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=30):
        ends = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < ends, f"never: {expression}"
            time.sleep(0.02)
        return value

    def write(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, code, modifiers=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, text=text
            )

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def opened(url, folder, size="1280,800"):
    """A page at an address; skips where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on PATH")
    from websockets.sync.client import connect

    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        f"--window-size={size}",
    ]
    options += [
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "--disable-background-networking",
        "about:blank",
    ]
    process = subprocess.Popen([program, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        port = next(
            found[1]
            for line in process.stderr
            if (found := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line))
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            [target] = [one for one in json.load(answer) if one["type"] == "page"]
        with connect(target["webSocketDebuggerUrl"], max_size=None) as line:
            page = Page(line)
            page.call("Page.navigate", url=url)
            yield page
    finally:
        process.terminate()
        process.wait(timeout=10)
