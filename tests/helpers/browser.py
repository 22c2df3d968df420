"""A headless Chromium that a test drives over its DevTools protocol."""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.request

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


class Tab:
    """A page in the browser: `js` evaluates an expression in it, `mouse` sends an event of the mouse."""

    def __init__(self, socket):
        self.socket, self.sent, self.problems = socket, 0, []

    async def call(self, method, **params):
        self.sent += 1
        await self.socket.write_message(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            answer = json.loads(await self.socket.read_message())
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(answer["params"])
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    async def js(self, expression):
        done = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, expression, seconds=20):
        """Wait until an expression is true; fail after some seconds."""
        for _ in range(int(seconds / 0.1)):
            if await self.js(expression):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {expression}")

    async def mouse(self, kind, place, **options):
        await self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **options)

    async def click(self, place):
        for kind in ("mousePressed", "mouseReleased"):
            await self.mouse(kind, place, button="left", clickCount=1)

    async def key(self, key):
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key)


def browse(url, actions, profile, width=1200, height=900, dark=False):
    """Open `url` and await `actions(tab)`; skip the test where no Chromium starts.

    The browser ends with the test. An exception in the page, or something that its policy forbids, fails the test.
    """
    websocket = pytest.importorskip("tornado.websocket")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    argv = [CHROMIUM, *OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            found = next(filter(None, (re.search(r"ws://\S+:(\d+)/", line) for line in process.stderr)), None)
            if found is None:
                pytest.skip("chromium does not start here")

            async def main():
                with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/json") as answer:
                    target = next(tab for tab in json.load(answer) if tab["type"] == "page")
                tab = Tab(await websocket.websocket_connect(target["webSocketDebuggerUrl"], max_message_size=2**28))
                for domain in ("Runtime", "Log", "Page"):
                    await tab.call(f"{domain}.enable")
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                await tab.call("Emulation.setDeviceMetricsOverride", **size)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await tab.call("Emulation.setEmulatedMedia", features=[scheme])
                await tab.call("Page.navigate", url=url)
                await tab.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'", 60)
                await actions(tab)
                assert not tab.problems

            asyncio.run(main())
        finally:
            process.terminate()
