"""The page as a person uses it: a real Chromium, driven over its DevTools protocol, draws a digit with the mouse."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from dlopt.artifact import Artifact
from tests.conftest import program
from tests.served import IMAGE, NUMBERS, free_port, make_export

KEY = "a-key-of-the-tests"
NOTHING = "\N{EN DASH}"
"""What the page shows where there is no prediction."""
SCRIPT = """
import sys
from pathlib import Path
import uvicorn
from dlopt.serve import Serve
from dlopt.serve.auth import digest
from dlopt.serve.replica import Replica

path, port, key = sys.argv[1:]
app = Replica(Path(path), "digits", Serve(), (digest(key),)).application
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")
"""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=900,700",
    "--remote-debugging-port=0",
)


class Browser:
    """One tab of a Chromium of our own."""

    def __init__(self, profile: Path) -> None:
        command = [program("chromium", "chromium-browser", "google-chrome"), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = wait_for(lambda: _read(profile / "DevToolsActivePort").split()[:1])[0]
        (page,) = [tab for tab in httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json() if tab["type"] == "page"]
        self.socket: ClientConnection = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None)
        self.number = 0
        self.requests: list[dict[str, Any]] = []
        self("Network.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol; meanwhile notes the requests that the page makes."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv(timeout=30))).get("id") != self.number:
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"])
        assert "error" not in message, message
        return message["result"]

    def value(self, script: str) -> Any:
        """What an expression is worth in the page."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Until the page has its form or its pad."""
        self("Page.navigate", url=url)
        wait_for(lambda: self.value("document.body && document.body.dataset.ready") == "yes")

    def place(self, selector: str) -> dict[str, float]:
        """Where an element is on the screen: x, y, width, height."""
        return dict(self.value(f"JSON.parse(JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect()))"))

    def mouse(self, kind: str, x: float, y: float) -> None:
        down = kind != "mouseReleased"
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=int(down), clickCount=1)

    def click(self, selector: str) -> None:
        box = self.place(selector)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def draw(self, points: list[tuple[float, float]]) -> None:
        """One stroke over the pad; points from (0, 0), its upper left corner, to (1, 1)."""
        box = self.place("#pad")
        path = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.mouse("mousePressed", *path[0])
        for x, y in path[1:]:
            self.mouse("mouseMoved", x, y)
        self.mouse("mouseReleased", *path[-1])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def wait_for(found: Callable[[], Any], seconds: float = 30) -> Any:
    """What `found()` says once it is true; fails when it is not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "the browser did not come to it"
        time.sleep(0.05)
    return value


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def serving(export: Artifact) -> Iterator[str]:
    """The app under uvicorn, without Ray: the address of the page with its key."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(export.path), str(port), KEY])
    try:
        wait_for(lambda: _answers(f"http://127.0.0.1:{port}/readyz"))
        yield f"http://127.0.0.1:{port}/?token={KEY}"
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serving(make_export(tmp_path_factory.mktemp("home"), IMAGE))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serving(make_export(tmp_path_factory.mktemp("home"), NUMBERS))


def shown(browser: Browser) -> tuple[str, list[str]]:
    """The label and the shares that the page shows."""
    shares = browser.value("Array.from(document.querySelectorAll('#classes output'), one => one.textContent)")
    return browser.value("document.getElementById('best').textContent"), shares


def sent_rows(browser: Browser) -> list[Any]:
    """The rows that the page has sent for prediction."""
    posts = [request for request in browser.requests if request["url"].endswith(":predict")]
    return [json.loads(request["postData"])["instances"][0] for request in posts]


def predicted(address: str, row: Any) -> dict[str, Any]:
    """What the endpoint says of a row."""
    reply = httpx.post(
        address.split("?")[0] + "v1/models/digits:predict", json={"instances": [row]}, headers={"x-api-key": KEY}, trust_env=False
    )
    return dict(reply.raise_for_status().json()["predictions"][0])


def percent(probabilities: list[float]) -> list[str]:
    return [f"{100 * probability:.1f}%" for probability in probabilities]


STROKES = {
    "1": [[(0.5 + 0.002 * step, 0.15 + 0.035 * step) for step in range(21)]],
    "7": [[(0.25 + 0.025 * step, 0.2) for step in range(21)], [(0.75 - 0.015 * step, 0.2 + 0.035 * step) for step in range(21)]],
}


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit_shows_what_the_model_says_of_it(browser: Browser, digits: str, digit: str, tmp_path: Path) -> None:
    browser.open(digits)
    browser.requests.clear()
    for stroke in STROKES[digit]:
        browser.draw(stroke)
    settle(browser)
    image = sent_rows(browser)[-1]
    answer = predicted(digits, image)
    assert shown(browser) == (str(answer["label"]), percent(answer["probabilities"]))
    browser.screenshot(tmp_path / f"{digit}.png")


def settle(browser: Browser) -> None:
    """Until the page has shown its last request's answer."""
    wait_for(lambda: browser.value("new Promise(done => requestAnimationFrame(() => done(asked > 0 && shown === asked)))"))


def test_a_drawing_is_centred_and_scaled_as_the_digits_of_the_set_are(browser: Browser, digits: str) -> None:
    """MNIST: the digit fits 20 of 28 pixels, and its centre of mass is the middle. Wherever and however small one draws."""
    images = []
    for scale, x, y in ((1.0, 0.0, 0.0), (0.4, 0.05, 0.5)):
        browser.open(digits)
        browser.requests.clear()
        browser.draw([(x + scale * a, y + scale * b) for a, b in STROKES["1"][0]])
        settle(browser)
        images.append(sent_rows(browser)[-1])
    for image in images:
        assert [len(image), {len(row) for row in image}] == [28, {28}]
        mass = sum(map(sum, image))
        centre = [sum((at + 0.5) * sum(line) for at, line in enumerate(lines)) / mass for lines in (image, zip(*image, strict=True))]
        assert all(abs(one - 14) < 0.25 for one in centre), centre
        inked = [at for at, row in enumerate(image) if max(row) > 40]
        assert 18 <= inked[-1] - inked[0] + 1 <= 22
        assert max(map(max, image)) > 200


def test_clear_and_the_delete_key_take_the_drawing_and_the_answer_away(browser: Browser, digits: str) -> None:
    browser.open(digits)
    for clear in (lambda: browser.click("#clear"), lambda: press(browser, "Delete")):
        browser.draw(STROKES["1"][0])
        settle(browser)
        assert shown(browser)[0] != NOTHING
        clear()
        assert shown(browser) == (NOTHING, [""] * 10)
        assert browser.value("document.getElementById('pad').getContext('2d').getImageData(0, 0, 280, 280).data.every(value => !value)")


def press(browser: Browser, key: str) -> None:
    browser.value("document.getElementById('pad').focus()")
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key=key)


def test_the_key_leaves_the_address_bar(browser: Browser, digits: str) -> None:
    browser.open(digits)
    assert browser.value("location.href") == digits.split("?")[0]
    assert KEY not in browser.value("document.cookie")  # HttpOnly: a script cannot read it


def test_without_a_key_the_browser_is_told_what_to_do(browser: Browser, digits: str) -> None:
    browser("Network.clearBrowserCookies")
    browser("Page.navigate", url=digits.split("?")[0])
    assert "open /?token=KEY" in wait_for(lambda: browser.value("document.body.innerText"))


def test_numbers_are_asked_for_in_a_form(browser: Browser, table: str) -> None:
    browser.open(table)
    browser.requests.clear()
    names = browser.value("Array.from(document.querySelectorAll('label span'), one => one.textContent)")
    assert names == ["month", "day", "distance"]
    browser.value("document.querySelectorAll('input').forEach((input, at) => { if (at < 2) input.value = at + 1.5 })")
    browser.click("button.first")
    settle(browser)
    (row,) = sent_rows(browser)
    assert row == {"month": 1.5, "day": 2.5, "distance": None}
    answer = predicted(table, row)
    assert shown(browser) == (answer["label"], percent(answer["probabilities"]))


def test_an_error_of_the_server_is_shown(browser: Browser, table: str) -> None:
    browser.open(table)
    browser.value("document.querySelector('input').value = 1e39")
    browser.click("button.first")
    assert "too large" in wait_for(lambda: browser.value("document.getElementById('error').textContent"))
