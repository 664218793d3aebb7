# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The page in a headless browser: every tab answers, and the experts are shown for each token."""

import base64
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from small_models import REPOSITORY


pytest.importorskip("gradio")
APP = REPOSITORY / "space/app.py"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(app):
    return app.load_demo(str(app.CHECKPOINT))


def test_what_each_tab_answers(app, demo):
    words = demo.fill_mask("The president of the United [MASK] spoke to congress.")
    assert next(iter(words)) == "states" and len(words) == 8
    labels = demo.classify("The striker scored twice in the last minutes.", "cooking\nfootball\n\nmusic")
    assert max(labels, key=labels.get) == "football" and sum(labels.values()) == pytest.approx(1)
    table = demo.compare("A man plays a guitar.\nPrices rose again.\nA musician with his guitar.")
    assert len(table) == 3 and {table[0][1], table[0][2]} == {"A man plays a guitar.", "A musician with his guitar."}
    import gradio

    for call, said in (
        (lambda: demo.fill_mask("no mask"), r"Write \[MASK\]"),
        (lambda: demo.classify("text", "one"), "at least two labels"),
        (lambda: demo.compare("one"), "2 to 20 sentences"),
        (lambda: demo.show_routing(" "), "Write a sentence"),
        (lambda: demo.show_routing("film " * 100), "102 tokens long; 64 are allowed"),
    ):
        with pytest.raises(gradio.Error, match=said):
            call()


def test_the_experts_of_the_model_are_shown(demo):
    text = "<b>The bank & the river"
    page = demo.show_routing(text)
    assert "<b>" not in page and "&lt;" in page and "&amp;" in page
    batch = demo.encode([text])
    with torch.no_grad():
        logits = demo.routed(**batch, output_router_logits=True).router_logits
    assert page.count("layer ") == len(logits) == 4
    for layer in logits:
        for token in layer[0]:
            first, second = token.topk(2).indices.tolist()
            assert f">{first} {second}</td>" in page
    assert page.count("%</td>") == batch["input_ids"].shape[1]  # how far the merged model is, token by token


class Browser:
    """As much of the WebDriver protocol as a page needs that is looked at and clicked."""

    def __init__(self, port: int, folder, size: tuple[int, int]):
        self.server = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        options = {"goog:chromeOptions": {"args": arguments, "binary": BROWSER}}
        created = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.session = f"/session/{created['sessionId']}"
        # A window is never narrower than 500 pixels; a telephone's screen is.
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen}
        self.call("POST", f"{self.session}/goog/cdp/execute", command)

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str, seconds: int = 240):
        for _ in range(seconds):
            if value := self.run(f"return {script}"):
                return value
            time.sleep(1)
        raise AssertionError(f"never true: {script}")

    def screenshot(self, file) -> None:
        file.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))


def wait_until_it_answers(url: str, process: subprocess.Popen) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url).read()
            return
        except OSError:
            assert process.poll() is None
            time.sleep(1)
    raise AssertionError(f"{url} never answered")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")
def test_the_page_in_a_browser(tmp_path):
    ports = free_port(), free_port()
    page = f"http://127.0.0.1:{ports[0]}/"
    server = subprocess.Popen([sys.executable, str(APP), "--server_port", str(ports[0])], cwd=tmp_path)
    driver = subprocess.Popen([DRIVER, f"--port={ports[1]}"], stdout=subprocess.DEVNULL)
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path)).resolve()
    browsers: list[Browser] = []
    try:
        wait_until_it_answers(page, server)
        wait_until_it_answers(f"http://127.0.0.1:{ports[1]}/status", driver)
        for name, size in {"wide": (1280, 760), "narrow": (390, 800)}.items():
            browsers.append(browser := Browser(ports[1], tmp_path / name, size))
            browser.call("POST", f"{browser.session}/url", {"url": page})
            text = browser.wait_for("document.querySelector('#routing table')?.innerText")
            assert text.count("layer ") == 4 and "merged: difference" in text and "river" in text
            # Wider than a narrow window, the table scrolls by itself; the page does not.
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
            if name == "narrow":  # tabs that do not fit are behind a menu
                browser.run("document.getElementById('show-experts').scrollIntoView()")
            browser.screenshot(pictures / f"page-{name}.png")
            if name == "narrow":
                continue
            for tab, button, result, said in (
                ("Fill a mask", "fill", "words", "states"),
                ("Classify", "classify", "labels", "sports"),
                ("Compare sentences", "compare", "pairs", "guitar"),
            ):
                tabs = "[...document.querySelectorAll('[role=tab]')]"
                browser.run(f"{tabs}.find(x => x.innerText.trim() == '{tab}').click()")
                browser.wait_for(f"document.getElementById('{button}')?.offsetParent != null")
                browser.run(f"document.getElementById('{button}').click()")
                browser.wait_for(f"document.getElementById('{result}')?.innerText.includes('{said}')")
                browser.screenshot(pictures / f"{button}.png")
    finally:
        for browser in browsers:
            browser.call("DELETE", browser.session)
        for process in (driver, server):
            process.terminate()
            process.wait()
