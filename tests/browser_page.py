"""A page in headless Chromium, and what the tests do with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


class BrowserPage:
    """What the tests do with a page."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, file: Path) -> BrowserPage:
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver.get_log("browser")
        self.driver.get(file.absolute().as_uri())
        WebDriverWait(self.driver, 30).until(lambda _: self.js("return document.documentElement.dataset.ready"))
        return self

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).get_property("textContent")

    def choose(self, name: str, value) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(f"#{name}")).select_by_value(str(value))

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key) for key in keys)).perform()

    def point(self, row: int, column: int) -> None:
        """The mouse onto a cell of the heat map, after a detour that makes its arrival an event."""
        from selenium.webdriver import ActionChains

        self.js("document.getElementById('matrix-frame').scrollIntoView({block: 'center'})")
        x, y = self.js(
            "const p = document.getElementById('matrix'), b = p.getBoundingClientRect(), l = p._fullLayout;"
            "return [b.left + l.xaxis._offset + l.xaxis.d2p(arguments[1]), "
            "b.top + l.yaxis._offset + l.yaxis.d2p(arguments[0])]",
            row,
            column,
        )
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(1, 1).pause(0.12)  # Plotly skips events that come faster
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y)).pause(0.12)
        actions.perform()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


def start() -> BrowserPage:
    """A browser without a page; needs Debian's chromium and chromium-driver."""
    from selenium import webdriver

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, found in programs.items() if found is None]
    if missing:
        pytest.fail(f"{' and '.join(missing)} must be on PATH (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    return BrowserPage(driver)
