"""The page: what it offers to whom, and in a real browser."""

import json
import shutil
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from prunevit.agents.viewer import comparison, page, picture
from prunevit.agents.viewer.page import NONE, Viewer, ViewerConfig
from prunevit.agents.viewer.photographs import samples
from prunevit.agents.viewer.viewed_model import OWN, UNTRAINED

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(comparison, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(comparison, "MOST_AT_ONCE", 1)


@pytest.fixture
def digit(tmp_path):
    samples()["digits-0"].save(tmp_path / "digit.png")
    return str(tmp_path / "digit.png")


def test_a_viewer_shows_two_ways_beside_the_dense_model(digit):
    drawn, said = Viewer(ViewerConfig()).show(digit, "digits", OWN, "random", 0.4)
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows == ["method", "dense", OWN, "random"]
    alone, _ = Viewer(ViewerConfig()).show(digit, "digits", "random", NONE, 0.4)
    assert alone.height < drawn.height


def test_what_is_wrong_is_said_in_place_of_a_picture(digit, tmp_path):
    viewer = Viewer(ViewerConfig())
    (tmp_path / "bad.png").write_bytes(b"no image")
    for file, model, message in [
        (str(tmp_path / "bad.png"), "digits", "**bad.png is no image: "),
        (digit, "deit_smal", "**unknown backbone 'deit_smal'"),
    ]:
        drawn, said = viewer.show(file, model, OWN, NONE, 0.4)
        assert drawn is None
        assert said.startswith(message)
    assert viewer.methods("deit_smal") == ()
    assert viewer.methods("digits") == (OWN, *UNTRAINED)


@pytest.mark.parametrize(("host", "may"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_strangers_load_no_model_but_those_that_are_offered(host, may, digit):
    viewer = Viewer(ViewerConfig(host=host))
    _, said = viewer.show(digit, "deit_smal", OWN, NONE, 0.4)
    wanted = "unknown backbone" if may else "unknown model 'deit_smal': choose from digits, "
    assert wanted in said
    assert viewer.show(digit, "digits", OWN, NONE, 0.4)[0] is not None


def test_the_picture_command_writes_a_file(tmp_path, digit, capsys):
    out = tmp_path / "out.png"
    picture.main([digit, "digits-1", "--methods", OWN, "random", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert Image.open(out).height > 4 * 256
    with pytest.raises(SystemExit) as ended:
        picture.main(["nowhere.png", "--out", str(out)])
    assert "nowhere.png can't be read as an image: [Errno 2]" in str(ended.value.code)


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        page.main(["--no-browser"])
    assert "It comes with the extra 'viewer'" in str(ended.value.code)


@pytest.mark.integration("viewer")
def test_a_model_that_is_none_ends_the_command_in_one_line():
    with pytest.raises(SystemExit) as ended:
        page.main(["--no-browser", "--model", "deit_smal"])
    assert str(ended.value.code).startswith("error: unknown backbone 'deit_smal'")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a page that is served as the command does."""
    gradio = pytest.importorskip("gradio")
    found, listens, ended = [], threading.Event(), threading.Event()

    def block_thread(self):
        found.append(self)
        listens.set()
        ended.wait()

    monkeypatch.setattr(gradio.Blocks, "block_thread", block_thread)
    config = ViewerConfig(browser=False, upload_mb=1)
    thread = threading.Thread(target=page.serve, args=[config])
    thread.start()
    assert listens.wait(120)
    yield found[0].local_url
    found[0].close()
    ended.set()
    thread.join()


@pytest.mark.integration("viewer")
def test_the_page_asks_nothing_of_other_machines(served):
    import httpx

    text = httpx.get(served).text
    config = json.loads(text.split("window.gradio_config = ")[1].split(";</script>")[0])
    assert config["analytics_enabled"] is False
    assert served.startswith("http://127.0.0.1:")


@pytest.mark.integration("viewer")
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_in_a_browser(served, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    samples()["coffee"].save(tmp_path / "coffee.jpg")
    (tmp_path / "bad.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    said, asked = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("console", lambda told: said.append(told.text) if told.type == "error" else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(served)
        drawn = tab.locator(".image-frame img, .image-container img").last

        def after(act):
            """The picture's address once ``act`` has changed it."""
            before = drawn.get_attribute("src")
            act()
            tab.wait_for_function(
                "before => [...document.querySelectorAll('img')].at(-1).src != before", arg=before
            )
            return drawn.get_attribute("src")

        tab.locator("td", has_text=OWN).wait_for()
        slider = tab.get_by_role("slider")
        seen = {after(lambda: slider.press("ArrowRight"))}

        def compare_with_random():
            tab.get_by_label("Beside it").click()
            tab.get_by_role("option", name="random").click()

        seen.add(after(compare_with_random))
        tab.locator("td", has_text="random").wait_for()
        upload = tab.locator("input[type=file]")
        seen.add(after(lambda: upload.set_input_files(tmp_path / "coffee.jpg")))
        assert len(seen) == 3
        with tab.expect_download() as download:
            tab.get_by_label("Download").click()
        assert Image.open(download.value.path()).format == "PNG"
        tab.get_by_label("Clear").first.click()
        upload.set_input_files(tmp_path / "bad.png")
        tab.get_by_text("bad.png is no image").wait_for()
        assert not said
        # the browser's console tells of the refusal
        tab.get_by_label("Clear").first.click()
        upload.set_input_files(tmp_path / "large.png")
        tab.get_by_text("exceed the maximum allowed size of 1.0 Mb").wait_for()
        browser.close()
    outside = [url for url in asked if not url.startswith((served, "data:", "blob:"))]
    assert not outside
