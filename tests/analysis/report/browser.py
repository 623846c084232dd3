"""A headless Chromium over a page on the disk: what a person would see and do."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

INSTALL = "apt-get install -y chromium chromium-driver"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
LACKS = next(
    (
        f"no {what}: {command}"
        for what, there, command in (
            ("Chromium", CHROMIUM, INSTALL),
            ("chromedriver", DRIVER, INSTALL),
            ("selenium", importlib.util.find_spec("selenium"), "pip install selenium"),
        )
        if not there
    ),
    None,
)


def require_browser() -> None:
    """Skip where there is none; in CI fail."""
    if LACKS and os.environ.get("CI"):
        pytest.fail(f"in CI the browser tests run: {LACKS}")
    if LACKS:
        pytest.skip(LACKS)


@contextmanager
def browser(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator["Page"]:
    """A browser with a window of this size."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                     "hide-scrollbars", f"window-size={width},{height}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        page = Page(driver)
        page.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=False)  # fmt: skip
        if dark:
            page.media(prefers="dark")
        yield page
    finally:
        driver.quit()


class Page:
    """A page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def command(self, name: str, **arguments: object) -> Any:
        """One of the browser's own."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def media(self, *, prefers: str = "light", kind: str = "screen") -> None:
        """What the reader prefers, on a screen or on paper."""
        self.command("Emulation.setEmulatedMedia", media=kind,
                     features=[{"name": "prefers-color-scheme", "value": prefers}])  # fmt: skip

    def open(self, path: Path) -> None:
        """Open a page and wait until its script is done."""
        self.driver.get(path.as_uri())
        self.wait("document.documentElement.dataset.page === 'ready'")

    def run(self, script: str, *arguments: object) -> Any:
        """The value of some JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until some JavaScript is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(
            lambda driver: driver.execute_script(f"return {condition}"), condition
        )

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def find(self, selector: str) -> Any:
        """An element."""
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def set(self, widget: str, value: object) -> None:
        """Give a widget of Bokeh a value, as its own handle would."""
        script = "Bokeh.documents[0].get_model_by_name(arguments[0]).value = arguments[1]"
        self.run(script, widget, value)

    def errors(self) -> list[str]:
        """What the console complained of."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def shot(self, path: Path) -> None:
        """The whole page as a picture."""
        import base64

        data = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))
