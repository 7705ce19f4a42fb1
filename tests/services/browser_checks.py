"""Browser checks of the pages of Prefect and MLflow in headless Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import passwords
from infra.topology import ServiceEnvironment
from tests.services.clients import Mlflow, Prefect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZE: Any = {"width": 1280, "height": 900}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed Chromium; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def approve_in_the_browser(browser: Browser, env: ServiceEnvironment, run_id: str, screenshots: Path | None = None) -> None:
    """Log in, open the paused promotion and submit the form."""
    page = logged_in(browser, env)
    page.goto(f"{env.prefect_api.removesuffix('/api')}/runs/flow-run/{run_id}")
    page.get_by_role("button", name="Resume").first.click()
    form = page.get_by_role("dialog")
    form.get_by_text("The gate is passed").wait_for()
    form.locator(".p-select-button__control").focus()
    page.keyboard.press("ArrowDown")
    page.locator(".p-select-option", has_text="approve").click()
    form.locator("textarea").nth(0).fill("better images of bells")
    form.locator("textarea").nth(1).fill("Ada")
    save_screenshot(page, screenshots, "prefect-approval")
    form.get_by_role("button", name="Submit").click()
    form.wait_for(state="hidden")
    page.close()


def flow_run_page(browser: Browser, env: ServiceEnvironment, run_id: str, screenshots: Path | None = None) -> None:
    """Check plan, progress and the link to the report."""
    page = logged_in(browser, env)
    page.goto(f"{env.prefect_api.removesuffix('/api')}/runs/flow-run/{run_id}")
    page.get_by_text("Artifacts", exact=True).click()
    for text in ("Plan of this run", "Durations and cache hits by stage", "Metrics compared with the last run"):
        page.get_by_text(text).first.wait_for()
    save_screenshot(page, screenshots, "prefect-run")
    page.mouse.move(700, 700)
    page.mouse.wheel(0, 4000)  # artifacts of stages are loaded when they become visible
    page.get_by_text("progress-").first.wait_for()
    artifacts = Prefect(env).artifacts(run_id)
    page.goto(f"{env.prefect_api.removesuffix('/api')}/artifacts/artifact/{artifacts['report']['id']}")
    link = page.locator(f"a[href^='{env.reports}/runs/']").first
    with page.expect_popup() if link.get_attribute("target") == "_blank" else page.expect_navigation() as opened:
        link.click()
    report = opened.value
    assert report is not None
    assert "/runs/" in report.url
    page.close()


def mlflow_pages(browser: Browser, env: ServiceEnvironment, screenshots: Path | None = None) -> None:
    """Check runs, data sets, sample images by step, and model versions with their aliases."""
    word = passwords.read(env.secrets, "mlflow-password")
    context = browser.new_context(viewport=SIZE, http_credentials={"username": "admin", "password": word})
    page = context.new_page()
    page.set_default_timeout(90_000)
    train = next(run for run in Mlflow(env).runs() if run["info"]["run_name"] == "train")
    experiment, run_id = train["info"]["experiment_id"], train["info"]["run_id"]
    page.goto(f"{env.mlflow}/#/experiments/{experiment}/runs")
    parent = next(run for run in Mlflow(env).runs() if run["info"]["run_id"] == parent_of(train))
    page.get_by_role("link", name=parent["info"]["run_name"]).first.wait_for()
    page.goto(f"{env.mlflow}/#/experiments/{experiment}/runs/{run_id}")
    page.get_by_text("data/pairs").first.wait_for()
    page.get_by_role("link", name="audio2image").first.wait_for()
    run_id = parent["info"]["run_id"]
    page.goto(f"{env.mlflow}/#/experiments/{experiment}/runs/{run_id}/model-metrics")
    page.get_by_text("samples/grid").first.wait_for()
    close_assistant(page)
    page.goto(f"{env.mlflow}/#/experiments/{experiment}/runs/{run_id}/artifacts")
    page.get_by_text("images", exact=True).first.click()
    with page.expect_response(lambda answer: ".png" in answer.url and "get-artifact" in answer.url) as fetched:
        page.get_by_text(re.compile(r"grid\+step\+.*\.png$")).last.click()
    assert fetched.value.ok
    page.wait_for_timeout(1500)
    save_screenshot(page, screenshots, "mlflow-samples")
    page.goto(f"{env.mlflow}/#/models/audio2image")
    for alias in ("challenger", "champion"):
        page.get_by_text(alias).first.wait_for()
    page.wait_for_timeout(500)
    save_screenshot(page, screenshots, "mlflow-model")
    context.close()


def parent_of(run: Any) -> str:
    """Id of the run of the pipeline above a run of a stage."""
    return str(next(tag["value"] for tag in run["data"]["tags"] if tag["key"] == "mlflow.parentRunId"))


def logged_in(browser: Browser, env: ServiceEnvironment) -> Page:
    """Page of Prefect's UI after login."""
    page = browser.new_context(viewport=SIZE).new_page()
    page.set_default_timeout(90_000)
    page.goto(f"{env.prefect_api.removesuffix('/api')}/login")
    page.fill("input", passwords.read(env.secrets, "prefect-auth"))
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard")
    return page


def close_assistant(page: Page) -> None:
    button = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if button.count():
        button.first.click()


def save_screenshot(page: Page, folder: Path | None, name: str) -> None:
    if folder is not None:
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"{name}.png")
