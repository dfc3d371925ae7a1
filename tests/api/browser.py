"""Headless Chromium over its DevTools protocol: what the page's tests need, and no more."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "End": 35, " ": 32}


def find_browser():
    """Path of a browser, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser with an own profile; `tab()` opens a page."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="prunery-browser-"))
        command = [find_browser(), *FLAGS, "--remote-debugging-port=0"]
        command += [f"--user-data-dir={self.folder}", "about:blank"]
        env = {**os.environ, "HOME": str(self.folder)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
        )
        place = self.folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (place.exists() and place.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the browser did not start: {self.process.poll()}")
            time.sleep(0.1)
        self.port = int(place.read_text().splitlines()[0])

    def tab(self, **kwargs):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Tab(json.load(answer)["webSocketDebuggerUrl"], **kwargs)

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Tab:
    """One page: go somewhere, evaluate, press keys, take pictures; `errors` is the console's."""

    def __init__(self, address, *, width=1200, height=900, dark=False, mobile=False):
        self.socket = connect(address, max_size=None, open_timeout=30)
        self.number, self.errors, self.loaded = 0, [], 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height, mobile)
        self.scheme(dark)

    def call(self, method, **params):
        self.number += 1
        number = self.number
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._hear(message)

    def _hear(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str([one.get("value") for one in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {params['message']}")
            self.number += 1
            answer = {"id": self.number, "method": "Page.handleJavaScriptDialog"}
            self.socket.send(json.dumps({**answer, "params": {"accept": False}}))

    def size(self, width, height, mobile=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip

    def scheme(self, dark=False, *, still=True):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce" if still else ""})
        self.call("Emulation.setEmulatedMedia", features=features)

    def go(self, address):
        """Load a page from the start, and wait for it."""
        self.call("Page.navigate", url="about:blank")
        before = self.loaded
        self.call("Page.navigate", url=address)
        end = time.monotonic() + 60
        done = "location.href !== 'about:blank' && document.readyState === 'complete'"
        while not self.js(done) or self.loaded == before:
            assert time.monotonic() < end, f"{address} did not load"
            time.sleep(0.05)

    def js(self, expression):
        """The value of an expression; promises are waited for."""
        made = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in made:
            details = made["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return made["result"].get("value")

    def wait(self, expression, seconds=30):
        """Its value, as soon as that is true."""
        end = time.monotonic() + seconds
        while True:
            value = self.js(f"((v) => v instanceof Node ? true : v)({expression})")
            if value:
                return value
            if time.monotonic() > end:
                body = self.js("document.body.innerText.slice(0, 1500)")
                raise AssertionError(f"not true in {seconds} s: {expression}\n{body}")
            time.sleep(0.05)

    def text(self, selector="main"):
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def set(self, selector, value, event="input"):
        """Give a field a value as a person would, with its event."""
        self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f" e.value = {json.dumps(value)};"
            f" e.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }})()"
        )

    def click(self, selector):
        found = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " if (!e) return false; e.click(); return true; })()"
        )
        assert found, f"nothing at {selector}"

    def press(self, key, *, shift=False):
        """A real key, through the browser's own focus handling."""
        event = {"key": key, "code": "Space" if key == " " else key, "modifiers": 8 * shift}
        event["windowsVirtualKeyCode"] = KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **event, **down)
        self.call("Input.dispatchKeyEvent", **event, type="keyUp")

    def type(self, text):
        self.call("Input.insertText", text=text)

    def picture(self, path, *, whole=True):
        """A screenshot as PNG, of the whole page."""
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(made["data"]))

    def close(self):
        self.call("Page.close")
        self.socket.close()
