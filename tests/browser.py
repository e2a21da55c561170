"""Chromium, driven through chromedriver's HTTP interface (the W3C's WebDriver), without a package.

    with Browser() as page: page.open(file); page.keys("r"); page.run("return document.title")
"""
import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                   reason="no chromium and chromedriver on the path")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-dev-shm-usage",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")


class Browser:
    """size: (width, height) of the window; profile: folder of the browser's data, which a second
    browser finds again."""

    def __init__(self, size=(1280, 900), dark=False, profile=None, downloads=None):
        self.folder = tempfile.mkdtemp()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
        self.at = f"http://127.0.0.1:{port}/session"
        flags = [*FLAGS, f"--user-data-dir={profile or self.folder}",
                 f"--window-size={size[0]},{size[1]}"]
        if dark:
            flags.append("--blink-settings=preferredColorScheme=0")
        options = {"binary": CHROMIUM, "args": flags,
                   "prefs": {"download.default_directory": str(downloads or self.folder)}}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options,
                                                   "goog:loggingPrefs": {"browser": "ALL"}}}}
        for attempt in range(100):
            try:
                self.at += "/" + self.ask("", wanted)["sessionId"]
                break
            except ConnectionError:
                time.sleep(0.1)
            except urllib.error.URLError as error:
                if attempt == 99 or not isinstance(error.reason, ConnectionError):
                    self.driver.kill()
                    raise
                time.sleep(0.1)
        self.send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1],
                  deviceScaleFactor=1, mobile=size[0] < 600)

    def ask(self, what, body=None, method=None):
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.at + what, sent, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def send(self, command, **parameters):
        """A command of Chrome's own protocol."""
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, file):
        self.ask("/url", {"url": Path(file).absolute().as_uri()})

    def run(self, script, *arguments):
        return self.ask("/execute/sync", {"script": script, "args": list(arguments)})

    def keys(self, text):
        """Each character is pressed and let go."""
        strokes = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def click(self, selector):
        element = self.ask("/element", {"using": "css selector", "value": selector})
        self.ask(f"/element/{next(iter(element.values()))}/click", {})

    def errors(self):
        """What the page's console said since it was last asked."""
        return [entry["message"] for entry in self.ask("/se/log", {"type": "browser"})]

    def picture(self, file):
        Path(file).write_bytes(base64.b64decode(self.ask("/screenshot")))

    def close(self):
        self.ask("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
