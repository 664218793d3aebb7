# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The page in a headless browser: every tab answers, and the experts are shown for each token."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from small_models import REPOSITORY


pytest.importorskip("gradio")
APP = REPOSITORY / "space/app.py"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


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


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_page_in_a_browser(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(APP), "--server_port", str(port)], cwd=tmp_path)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(1)
        for name, size in (("wide", "1400,900"), ("narrow", "420,900")):
            picture = tmp_path / f"{name}.png"
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
            options += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / name}"]
            url = f"http://127.0.0.1:{port}/"
            subprocess.run([BROWSER, *options, f"--screenshot={picture}", url], check=True, capture_output=True)
            assert picture.stat().st_size > 10_000
            done = subprocess.run([BROWSER, *options, "--dump-dom", url], check=True, capture_output=True, text=True)
            assert done.stdout.count("layer ") >= 4 and "merged: difference" in done.stdout
    finally:
        server.terminate()
        server.wait()
