"""Seconds from dropping a sound on the demo page to its first and to all four images, in Chromium.

    python -m benchmarks.demo_page [--sounds 5] [--screenshots FOLDER]

Starts `sonify demo` on the project's model, waits until the page answers, and drops held-out sounds of 5 s, each on a new page.
The time includes upload, decoding, mixing, sampling and display. With --screenshots it also writes PNG files of both tabs at
widths of 1280 and 400 px.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tests.factories.page_project import served
from tests.services.browser_checks import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DATA = Path("data/demo")
SECONDS = 5.0


def held_out_sounds(count: int) -> list[Path]:
    with (DATA / "manifest.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "sound" and row["split"] == "gold"]
    return [DATA / row["file"] for row in rows if float(row["seconds"]) == SECONDS][:count]


def drop(browser: Browser, address: str, sound: Path) -> tuple[float, float]:
    """Seconds to the first image and to four images."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.locator("#first input[type=file]").wait_for(state="attached")
    page.wait_for_timeout(1000)
    start = time.perf_counter()
    page.locator("#first input[type=file]").set_input_files(sound)
    page.locator("#drawn img").first.wait_for()
    first = time.perf_counter() - start
    page.locator("#drawn img").nth(3).wait_for()
    seconds = first, time.perf_counter() - start
    page.close()
    return seconds


def photograph(browser: Browser, address: str, folder: Path) -> None:
    """Both tabs with a mixture and with suggestions, on a wide and on a narrow window."""
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((1280, 900), (400, 800)):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#draw").wait_for()
        page.screenshot(path=folder / f"empty-{width}.png", full_page=True)
        page.locator("#first input[type=file]").set_input_files(DATA / "sounds/s-cat-000.ogg")
        page.locator("#drawn img").nth(3).wait_for()
        page.locator("#mix").get_by_text("Mix with a second sound").click()
        page.locator("#second input[type=file]").set_input_files(DATA / "sounds/s-cello-000.ogg")
        page.locator("#status", has_text="s-cello").wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / f"draw-{width}.png", full_page=True)
        page.get_by_role("tab", name="Image to sounds").click()
        page.locator("#picture input[type=file]").set_input_files(DATA / "images/i-cat-000.webp")
        page.locator(".suggested:visible").nth(4).wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / f"find-{width}.png", full_page=True)
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=int, default=5)
    parser.add_argument("--screenshots", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as folder, served(Path.cwd(), Path(folder, "demo.log")) as address, chromium() as browser:
        found = [drop(browser, address, sound) for sound in held_out_sounds(given.sounds)]
        for name, column in (("first image", 0), ("four images", 1)):
            seconds = [row[column] for row in found]
            print(f"{name}: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s of {len(seconds)} sounds")
        print(f"load of the machine: {os.getloadavg()[0]:.1f}")
        if given.screenshots:
            photograph(browser, address, given.screenshots)


if __name__ == "__main__":
    main()
