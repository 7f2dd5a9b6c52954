"""A headless Chromium for tests of pages; without one they are skipped."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """A headless Chromium that is spoken to over a pipe, in its DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        found = [path for name in CHROMIUM if (path := shutil.which(name))]
        if not found:
            pytest.skip(f"the page is tested in a browser; install one of {', '.join(CHROMIUM)}")
        theirs, self._send = os.pipe()
        self._receive, answers = os.pipe()
        command = (
            f"exec {found[0]} --headless=new --no-sandbox --disable-gpu --no-first-run "
            f"--user-data-dir={profile} --window-size=1200,900 --remote-debugging-pipe "
            f"3<&{theirs} 4>&{answers}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(theirs, answers), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self._text = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        (page,) = (
            target["targetId"]
            for target in self.call("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        )
        attach = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attach["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path | str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, after two frames were drawn."""
        frames = "new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))"
        answer = self.call(
            "Runtime.evaluate",
            expression=f"{frames}.then(() => ({script}))",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Everything the console, the page's scripts and its policy said."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in names]

    def requests(self) -> set[str]:
        """Schemes of everything that was loaded."""
        return {
            event["params"]["request"]["url"].partition(":")[0]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self._send)
        os.close(self._receive)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._text:
            part = os.read(self._receive, 1 << 20)
            assert part, "the browser ended"
            self._text += part
        message, _, self._text = self._text.partition(b"\0")
        return json.loads(message)


def until(browser: Browser, script: str) -> None:
    """Wait for a JavaScript expression to be true."""
    end = time.monotonic() + 60
    while not browser.run(f"Boolean({script})"):
        assert time.monotonic() < end, f"still not: {script}; {browser.complaints()}"
        time.sleep(0.05)
