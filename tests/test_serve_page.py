"""The chat page in a real browser: headless Chromium, driven over WebDriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.alert import Alert
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.expected_conditions import alert_is_present
from selenium.webdriver.support.wait import WebDriverWait

import specexec
from specexec.sampling.params import SamplingParams
from tests.serving import LetterEngine, serving
from tests.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE_S = 60

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a user meets it."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def until(self, script: str) -> object:
        """Wait until an expression is truthy, and give its value."""
        return WebDriverWait(self.browser, PATIENCE_S).until(lambda browser: browser.execute_script(f"return {script}"))

    def ask(self, text: str) -> None:
        box = self.browser.find_element("id", "text")
        box.send_keys(text)
        box.send_keys(Keys.ENTER)

    def text(self, selector: str) -> str:
        return str(self.until(f"document.querySelector({selector!r})?.textContent"))

    def complaints(self) -> list[str]:
        """What the browser's console says."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


def test_a_dialogue_with_the_demo_is_the_engines_own_text_and_its_sweeps_are_drawn(browser: Chrome) -> None:
    with specexec.load("demo", drafter="sibling", budget=8, dtype="f32") as engine:
        expected = engine.generate([{"role": "user", "content": "What are you?"}], SamplingParams(temperature=0)).text
    with serving(lambda: specexec.load("demo", drafter="sibling", budget=8, dtype="f32")) as server:
        page = Page(browser, server.url)
        assert "demo" in page.text("#card") or "letters" in page.text("#card")
        page.ask("What are you?")
        cost = page.text(".cost")
        assert page.text(".assistant") == expected
        assert "sweeps" in cost
        assert page.until("document.querySelectorAll('#tree text.kept').length") or expected == ""
        assert page.until("document.querySelectorAll('#spark rect').length")
        assert "tokens per sweep" in page.text("#rate")
        page.ask("List the days of the week.")  # the second turn goes on from the first
        page.until("document.querySelectorAll('.cost').length === 2")
        assert server.worker.totals.prompt_tokens_reused_total > 0
        assert page.complaints() == []


def test_a_running_answer_can_be_stopped_and_is_let_go(browser: Chrome) -> None:
    engine = LetterEngine(sweep_s=0.3)
    with serving(lambda: engine) as server:
        page = Page(browser, server.url)
        page.ask("x" * 300)
        page.until("document.querySelector('.assistant')?.textContent.length > 2")
        assert page.until("document.querySelector('#layers').value > 0")
        assert page.text("#go") == "Stop"
        browser.find_element("id", "go").click()
        assert "stopped" in page.text(".cost")
        until(lambda: server.worker.running == 0)
        assert page.text("#go") == "Send"


def test_markup_in_an_answer_is_text(browser: Chrome) -> None:
    with serving(LetterEngine) as server:
        page = Page(browser, server.url)
        page.ask("<img src=x onerror=alert(1)><b>bold</b>")
        page.until("document.querySelector('.cost')")
        assert page.text(".assistant") == "<img src=x onerror=alert(1)><b>bold</b>"
        assert browser.execute_script("return document.querySelectorAll('main img, main b').length") == 0


class LossyLetters(LetterEngine):
    lossy = ("steps=7",)


def test_what_changes_texts_is_named_with_every_answer(browser: Chrome) -> None:
    for engine, named in ((LossyLetters, True), (LetterEngine, False)):
        with serving(engine) as server:
            page = Page(browser, server.url)
            assert page.until("document.querySelector('#card').textContent.includes('nowhere')")
            page.ask("abc")
            assert page.text(".cost").endswith(" · LOSSY steps=7") is named
            assert page.text("#card").endswith(" · LOSSY steps=7") is named


def test_an_error_is_shown_and_the_page_goes_on(browser: Chrome) -> None:
    engine = LetterEngine()
    with serving(lambda: engine) as server:
        page = Page(browser, server.url)
        engine.broken = True
        page.ask("abc")
        assert "cannot be read" in page.text(".wrong")
        engine.broken = False
        page.ask("abc")
        page.until("document.querySelector('.assistant')?.textContent === 'abc'")


def test_the_page_asks_for_the_key(browser: Chrome) -> None:
    with serving(LetterEngine, key="sesame") as server:
        browser.get(server.url)
        prompt = WebDriverWait(browser, PATIENCE_S).until(alert_is_present())
        assert isinstance(prompt, Alert)
        prompt.send_keys("sesame")
        prompt.accept()
        page = Page(browser, server.url)
        page.ask("abc")
        page.until("document.querySelector('.assistant')?.textContent === 'abc'")
