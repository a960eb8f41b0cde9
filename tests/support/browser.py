"""A headless Chromium that is driven over its debugging protocol: sizes, themes, keys, pictures."""

import asyncio
import base64
import contextlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--remote-debugging-port=0",
    "--hide-scrollbars",
)  # fmt: skip

CUT_OFF = """[...document.querySelectorAll("body *")].filter(e => {
  if (e.closest("dialog:not([open]), details:not([open]) > :not(summary)")) return false;
  const frame = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (!frame.width || !frame.height) return false;
  const outside = frame.right > document.documentElement.clientWidth + 1 || frame.left < -1;
  return outside || (style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1);
}).map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`)"""
"""What of a page lies outside of the window, or is wider than the box that hides or scrolls it."""

SMALL = """[...document.querySelectorAll("p, td, th, figcaption, em, small, span, select, button")]
  .filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 12)
  .map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`)"""
"""Text of a page in letters below 12 pixels."""

_KEYS = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}  # by the numbers that Windows gave them


class Tab:
    """One tab of a running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and wait for its answer; errors of the page are collected."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=120)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or of what it promises."""
        found = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        for _ in range(int(seconds * 10)):
            with contextlib.suppress(AssertionError):  # while a page is loading there is nothing of it
                if await self.value(expression):
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {expression}")

    async def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Lay the page out for a screen."""
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[theme])

    async def open(self, url: str, ready: str = "document.readyState === 'complete'") -> None:
        """Load a page and wait until an expression is true of it."""
        await self.command("Page.navigate", url=url)
        await self.until(f"location.href !== 'about:blank' && ({ready})")

    async def press(self, key: str) -> None:
        """Press and release a key, as `ArrowRight`."""
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key]
            )

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        found = await self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def browser(profile: Path, *flags: str) -> AsyncIterator[Tab]:
    """A browser with its own profile, and its first tab."""
    assert BROWSER is not None
    process = subprocess.Popen(
        [BROWSER, *_FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        port = None
        while port is None:
            line = await asyncio.to_thread(process.stderr.readline)
            assert line, "the browser ended"
            port = re.search(r"ws://[^:]+:(\d+)/", line)
        draining = asyncio.create_task(asyncio.to_thread(process.stderr.read))
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port[1]}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime"):
                    await tab.command(f"{domain}.enable")
                yield tab
    finally:
        process.terminate()
        process.wait(30)
        with contextlib.suppress(UnboundLocalError):
            await draining


def drive(profile: Path, steps: Callable[[Tab], Coroutine[Any, Any, None]], *flags: str) -> None:
    """Run steps in a browser of their own; an error of the page fails them."""

    async def run() -> None:
        async with browser(profile, *flags) as tab:
            await steps(tab)
            assert tab.errors == []

    asyncio.run(run())


def check_on_screens(profile: Path, url: str, ready: str, picture: Path) -> None:
    """Open a page on a desk, a tablet and a phone, light and dark: nothing is cut off or too small, and the
    theme is followed. The last picture, of the dark phone, is left at `picture`.
    """

    async def steps(tab: Tab) -> None:
        for width, height, phone in ((1440, 900, False), (820, 1180, True), (390, 844, True)):
            for dark in (False, True):
                await tab.size(width, height, phone=phone, dark=dark)
                await tab.open(url, ready)
                assert await tab.value(CUT_OFF) == [], (width, dark)
                assert await tab.value(SMALL) == [], (width, dark)
                await tab.picture(picture, whole=False)
                shown = np.array(Image.open(picture).convert("L"))
                assert (np.median(shown) < 60) == dark, width
                assert shown.std() > 10, width  # something is drawn

    drive(profile, steps)
