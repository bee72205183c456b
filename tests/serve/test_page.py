"""The page as a person uses it: a real Chromium, driven over its DevTools protocol, draws a digit with the mouse."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Context
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from dlopt.artifact import Artifact
from dlopt.part import Feature, Signature
from dlopt.serve import Serve
from dlopt.serve.front.application import Replica
from dlopt.serve.front.auth import Key
from dlopt.serve.models.lineup import Entry
from tests.conftest import program
from tests.served import FLIGHTS, IMAGE, NUMBERS, PHOTOS, SAID, free_port, make_export, messages

KEY = "a-key-of-the-tests"
NOTHING = "\N{EN DASH}"
"""What the page shows where there is no prediction."""
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

    def write(self, selector: str, text: str) -> None:
        """Type into an element as on a keyboard."""
        self.value(f"document.querySelector({selector!r}).focus()")
        for character in text:
            self("Input.dispatchKeyEvent", type="char", text=character)

    def choose(self, selector: str, value: str) -> None:
        """An option of a select, by what it says."""
        script = (
            "(box => { box.selectedIndex = Array.from(box.options, option => option.text).indexOf(%s); %s })(document.querySelector(%s))"
        )
        said = "['input', 'change'].forEach(kind => box.dispatchEvent(new Event(kind, {bubbles: true})))"
        self.value(script % (json.dumps(value), said, json.dumps(selector)))

    def attach(self, selector: str, file: Path) -> None:
        """A file, as if it had been chosen in the dialog."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def texts(self, selector: str) -> list[str]:
        """What all these elements say."""
        return list(self.value(f"Array.from(document.querySelectorAll({selector!r}), one => one.textContent)"))

    def names(self) -> list[list[str]]:
        """Role and accessible name of each field and button, as a screen reader has them."""
        found = [node for node in self("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        roles = ("textbox", "spinbutton", "combobox", "Date", "button", "image")
        return [[node["role"]["value"], node["name"]["value"]] for node in found if node["role"]["value"] in roles]

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
    """The app under uvicorn, in a thread, without Ray: the address of the page with its key."""
    port = free_port()
    app = Replica((Entry.of(export, "digits", Serve()),), Serve(), (Key.of(KEY),)).application
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: _answers(f"http://127.0.0.1:{port}/readyz"))
        yield f"http://127.0.0.1:{port}/?token={KEY}"
    finally:
        server.should_exit = True
        thread.join()


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


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serving(make_export(tmp_path_factory.mktemp("home"), FLIGHTS))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serving(make_export(tmp_path_factory.mktemp("home"), messages()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serving(make_export(tmp_path_factory.mktemp("home"), PHOTOS))


def shown(browser: Browser) -> tuple[str, list[str]]:
    """The label and the shares that the page shows."""
    shares = browser.value("Array.from(document.querySelectorAll('#classes output'), one => one.textContent)")
    return browser.value("document.getElementById('best').textContent"), shares


def sent_rows(browser: Browser) -> list[Any]:
    """The rows that the page has sent for prediction."""
    posts = [request for request in browser.requests if request["url"].endswith(":predict")]
    return [json.loads(request["postData"])["instances"][0] for request in posts]


def predicted(address: str, row: Any) -> Any:
    """What the endpoint says of a row."""
    reply = httpx.post(
        address.split("?")[0] + "v1/models/digits:predict", json={"instances": [row]}, headers={"x-api-key": KEY}, trust_env=False
    )
    return reply.raise_for_status().json()["predictions"][0]


def number(value: float) -> str:
    """As the page writes it: six digits, a five rounded up as browsers do, thousands set apart."""
    rounded = Context(prec=6, rounding=ROUND_HALF_UP).create_decimal(repr(value))
    return f"{float(rounded):,}".removesuffix(".0")


def wait_for_row(browser: Browser, row: Any) -> None:
    """Until the page has sent this row last, and shown the answer."""
    wait_for(lambda: browser.value("asked") and sent_rows(browser)[-1:] == [row])
    settle(browser)


def set_value(browser: Browser, selector: str, value: str) -> None:
    """Where there are no keys to press: a date, or to take a text back."""
    script = "(box => { box.value = %s; box.dispatchEvent(new Event('input', {bubbles: true})) })(document.querySelector(%s))"
    browser.value(script % (json.dumps(value), json.dumps(selector)))


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


def test_each_kind_of_column_has_a_field_of_its_own(browser: Browser, flights: str) -> None:
    browser.open(flights)
    assert browser.texts("label > span") == ["delay", "distance", "carrier", "airport", "day"]
    kinds = "Array.from(document.querySelectorAll('form label'), one => one.querySelector('input, select').type)"
    assert browser.value(kinds) == ["number", "number", "select-one", "text", "date"]
    assert browser.texts("select option") == ["missing", "AA", "UA", "another \N{HORIZONTAL ELLIPSIS}"]
    hints = browser.value("Array.from(document.querySelector('input[list]').list.options, option => option.value)")
    assert hints == [f"A{index:03d}" for index in range(300)]
    assert browser.value("document.getElementById('about').textContent").startswith("predicts minutes \N{MIDDLE DOT} model ")


def test_an_empty_form_is_a_row_of_missing_values(browser: Browser, flights: str) -> None:
    browser.open(flights)
    browser.requests.clear()
    browser.click("button.first")
    settle(browser)
    row = dict.fromkeys(("delay", "distance", "carrier", "airport", "day"))
    assert sent_rows(browser) == [row]
    assert browser.texts("#best") == [number(predicted(flights, row))]


def test_the_number_follows_what_is_typed_and_chosen(browser: Browser, flights: str, tmp_path: Path) -> None:
    browser.open(flights)
    browser.requests.clear()
    browser.write("input[type=number]", "-12.5")
    browser.choose("select", "UA")
    browser.write("input[list]", "A123")
    set_value(browser, "[type=date]", "2013-05-31")
    row = {"delay": -12.5, "distance": None, "carrier": "UA", "airport": "A123", "day": "2013-05-31"}
    wait_for_row(browser, row)
    assert browser.texts("#best") == [number(predicted(flights, row))]
    browser.screenshot(tmp_path / "flights.png")


def test_a_category_that_is_not_in_the_list_can_be_typed(browser: Browser, flights: str) -> None:
    browser.open(flights)
    browser.requests.clear()
    assert browser.value("document.querySelector('select + input').checkVisibility()") is False
    browser.choose("select", "another \N{HORIZONTAL ELLIPSIS}")
    browser.write("select + input", "ZZ")
    row = dict.fromkeys(("delay", "distance", "carrier", "airport", "day"))
    wait_for_row(browser, row | {"carrier": "ZZ"})
    browser.choose("select", "AA")
    wait_for_row(browser, row | {"carrier": "AA"})


def test_a_screen_reader_hears_what_each_field_is(browser: Browser, flights: str) -> None:
    browser.open(flights)
    browser.choose("select", "another \N{HORIZONTAL ELLIPSIS}")
    found = browser.names()
    for field in (["spinbutton", "delay"], ["spinbutton", "distance"], ["combobox", "airport"], ["Date", "day"], ["button", "Predict"]):
        assert field in found
    assert ["textbox", "carrier, another value"] in found


def test_labels_follow_the_text_as_one_types(browser: Browser, texts: str, tmp_path: Path) -> None:
    browser.open(texts)
    browser.requests.clear()
    browser.write("textarea", SAID[0])
    wait_for_row(browser, {"message": SAID[0]})
    assert len(sent_rows(browser)) < len(SAID[0])  # not at every key
    answer = predicted(texts, {"message": SAID[0]})
    assert shown(browser) == (", ".join(answer["labels"]) or "none", percent(answer["probabilities"]))
    assert browser.texts("li.best span") == answer["labels"]
    tracks = browser.value("Array.from(document.querySelectorAll('.track'), one => one.getBoundingClientRect().width)")
    marks = browser.value(
        "Array.from(document.querySelectorAll('.mark'), one => one.getBoundingClientRect().x - one.parentElement.getBoundingClientRect().x)"
    )
    assert marks == pytest.approx([width / 2 for width in tracks], abs=1)
    assert browser.texts("#note") == ["A label is given above 50%, where the line stands."]
    browser.screenshot(tmp_path / "texts.png")


def with_thresholds(signature: Signature, *thresholds: float) -> Signature:
    return signature.model_copy(update={"target": signature.target.model_copy(update={"thresholds": thresholds})})


def test_lines_stand_at_the_thresholds_of_the_labels(browser: Browser, tmp_path: Path) -> None:
    with contextlib.closing(serving(make_export(tmp_path, with_thresholds(messages(), 0.25, 0.5, 0.875)))) as pages:
        page = next(pages)
        browser.open(page)
        browser.requests.clear()
        browser.write("textarea", SAID[1])
        wait_for_row(browser, {"message": SAID[1]})
        answer = predicted(page, {"message": SAID[1]})
        assert browser.texts("li.best span") == answer["labels"]
        lefts = browser.value("Array.from(document.querySelectorAll('.mark'), one => one.style.left)")
        assert lefts == ["25%", "50%", "87.5%"]
        assert browser.texts("#note") == ["A label is given from where its line stands on."]


def test_the_page_says_from_where_on_a_row_is_positive(browser: Browser, tmp_path: Path) -> None:
    with contextlib.closing(serving(make_export(tmp_path, with_thresholds(NUMBERS, 0.9375)))) as pages:
        browser.open(next(pages))
        assert browser.texts("#note") == ["It is yes from 93.8% on."]
        browser.click("button.first")
        settle(browser)
        assert shown(browser)[0] == "no"
        assert browser.texts(".mark") == []


def test_a_text_that_is_taken_back_takes_the_answer_with_it(browser: Browser, texts: str) -> None:
    browser.open(texts)
    browser.write("textarea", "call")
    wait_for(lambda: shown(browser)[0] != NOTHING)
    set_value(browser, "textarea", "")
    wait_for(lambda: shown(browser) == (NOTHING, [""] * 3))


def test_an_image_among_other_columns_is_a_file_and_several_numbers_a_list(browser: Browser, photos: str, tmp_path: Path) -> None:
    photo = Image.effect_noise((6, 4), 90).convert("RGB")
    photo.save(tmp_path / "photo.png")
    browser.open(photos)
    browser.requests.clear()
    browser.write("label:nth-of-type(2) input", "X100")
    time.sleep(0.5)
    assert browser.value("asked") == 0 and sent_rows(browser) == []  # not before the image is there
    set_value(browser, "[type=datetime-local]", "2013-05-31T10:30")
    browser.write("[placeholder='%d.%m.%Y']", "31.12.2013")
    browser.attach("input[type=file]", tmp_path / "photo.png")
    row = {"photo": {"b64": base64.b64encode((tmp_path / "photo.png").read_bytes()).decode()}, "camera": "X100"}
    row |= {"taken": "2013-05-31T10:30", "printed": "31.12.2013"}
    wait_for_row(browser, row)
    answer = predicted(photos, row)
    assert browser.texts("#values dt") == ["height", "width"]
    assert browser.texts("#values dd") == [number(answer["height"]), number(answer["width"])]
    size = browser.value("(canvas => [canvas.checkVisibility(), canvas.width, canvas.height])(document.querySelector('.preview'))")
    assert size == [True, 6, 4]
    assert ["image", "The chosen image"] in browser.names()
    browser.screenshot(tmp_path / "photos.png")


def test_a_vector_is_a_list_as_json_has_it(browser: Browser, tmp_path: Path) -> None:
    vector = Feature(name="v", kind="vector", dtype="float32", shape=(3,), columns=("v",))
    signature = NUMBERS.model_copy(update={"inputs": (vector, *NUMBERS.inputs)})
    with contextlib.closing(serving(make_export(tmp_path, signature))) as pages:
        address = next(pages)
        browser.open(address)
        browser.requests.clear()
        set_value(browser, "textarea", "[0.5, 1")
        assert wait_for(lambda: browser.value("document.getElementById('error').textContent")).startswith("v: give a list of 3 numbers")
        row = {"v": [0.5, 1, -2], "month": None, "day": None, "distance": None}
        set_value(browser, "textarea", "[0.5, 1, -2]")
        wait_for_row(browser, row)
        answer = predicted(address, row)
        assert shown(browser) == (answer["label"], percent(answer["probabilities"])) and sent_rows(browser) == [row]


def test_the_form_is_legible_in_the_dark(browser: Browser, flights: str) -> None:
    """WCAG's contrast of text on what lies below it is at least 4.5 in both schemes."""
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(flights)
        for selector in ("select", "input", "textarea, input[list]", "label > span", "#about", "button.first"):
            assert contrast(browser, selector) >= 4.5, (scheme, selector)
    browser("Emulation.setEmulatedMedia", features=[])


def contrast(browser: Browser, selector: str) -> float:
    script = """(element => {
        const own = getComputedStyle(element).color;
        while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
        return [own, getComputedStyle(element).backgroundColor];
    })(document.querySelector(%s))"""
    lights = []
    for colour in browser.value(script % json.dumps(selector)):
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
