"""The playground: its files, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx
import pytest

from mambakit.serving.http.access import AccessRules
from mambakit.serving.http.keys import Keys
from mambakit.serving.playground.about import about
from mambakit.serving.playground.files import POLICY, read_files
from tests.models.tiny import save_tiny
from tests.serving.api_server import ApiServer, api_server
from tests.serving.conftest import serving

KEY = "sixteen-visible-characters"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def get(one: ApiServer, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"http://{one.host}{path}", headers=headers, timeout=20)


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_file_is_served_and_nothing_else():
    with api_server() as one:
        page = get(one, "/")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert page.headers["Content-Security-Policy"] == POLICY
        for name, file in read_files().items():
            answer = get(one, f"/playground/{name}")
            assert answer.content == file.content
            again = get(one, f"/playground/{name}", **{"If-None-Match": answer.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
        for name in ("none.js", "../about.py", "..%2fabout.py", "__init__.py", "about.py", "", ".", "%00"):
            assert get(one, f"/playground/{name}").status_code in (404, 405), name


def test_it_can_be_turned_off():
    with api_server(playground=False) as one:
        for path in ("/", "/playground/app.js", "/playground/model.json"):
            assert get(one, path).status_code == 404


def test_nothing_comes_from_elsewhere():
    files = read_files()
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= set(files)
    for name, file in files.items():
        text = file.content.decode("ascii" if name.endswith(".svg") else "utf-8")
        links = set(re.findall(r"\b(?:https?:)?//[\w.-]+\.[a-z]{2,}", text))
        assert links <= {"http://www.w3.org"}, name
        for module in re.findall(r'from "\./([\w.]+)"', text):
            assert module in files, f"{name} imports {module}"
        for linked in re.findall(r'(?:href|src)="/playground/([\w.]+)"', text):
            assert linked in files, f"{name} links {linked}"
        assert not re.search(r"\son\w+=|style=|innerHTML|\beval\(|document\.write", text), (
            f"{name}: the policy forbids it"
        )
        assert len(text.splitlines()) <= 300


def test_the_page_is_open_and_the_model_needs_the_key():
    with api_server(access=AccessRules(keys=Keys.of(KEY))) as one:
        assert get(one, "/").status_code == get(one, "/playground/app.js").status_code == 200
        assert get(one, "/playground/model.json").status_code == 401
        # A link from another site may open the page, and nothing else.
        foreign = {"Sec-Fetch-Site": "cross-site"}
        assert get(one, "/", **foreign).status_code == 200
        assert get(one, "/", Origin="https://evil.example").status_code == 403
        assert get(one, "/v1/models", **foreign, Authorization=f"Bearer {KEY}").status_code == 403


def test_what_is_said_of_the_model(tmp_path):
    from mambakit.models.auto import AutoModelForCausalLM

    save_tiny(tmp_path)
    found = about(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found["state_bytes"] == model.backbone.new_cache(1).nbytes
    assert found["transformer_bytes_per_token"] == 2 * 2 * found["hidden_size"] * max(1, found["layers"] // 2)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A server of the embedded model."""
    folder = tmp_path_factory.mktemp("books")
    with serving(folder / "log", "--prefix-cache", "--states", str(folder / "states")) as server:
        yield server.ready()


@pytest.fixture
def page(browser, books):
    """A page of a fresh visitor; any error or request to elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    opened.on("request", lambda asked: None if asked.url.startswith(books.url) else wrong.append(asked.url))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(books.url)
    opened.wait_for_selector("#go:not([disabled])")
    opened.fill("#max_tokens", "24")
    opened.wrong = wrong
    yield opened
    context.close()
    assert not wrong


def done(page) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_timeout(50)  # the last frame


def write(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Control+Enter")
    done(page)


def labels(page) -> list[str]:
    return page.locator("#tree .label").all_inner_texts()


def kept(page) -> dict:
    return page.evaluate("JSON.parse(localStorage.getItem('mambakit.tree'))")


def test_a_text_is_written_with_its_probabilities(page, tmp_path):
    write(page, "It was a dark and stormy night")
    tokens = page.locator("#text .token")
    assert tokens.count() == 24
    text = page.inner_text("#text")
    assert text.startswith("It was a dark and stormy night")
    assert "tok/s" in page.inner_text("#rate")
    shares = [float(span.evaluate("e => e.style.getPropertyValue('--surprise-share')")) for span in tokens.all()]
    assert len(set(shares)) > 5
    assert all(0 <= share <= 1 for share in shares)
    tokens.nth(3).hover()
    popover = page.locator("#popover")
    popover.wait_for(state="visible")
    assert 5 <= popover.locator("button").count() <= 6
    assert popover.locator(".chosen").count() == 1
    page.screenshot(path=tmp_path / "text.png")
    page.uncheck("#colours")
    assert "plain" in page.get_attribute("#text", "class")


def test_another_token_makes_a_fork(page):
    write(page, "It was a dark and stormy night")
    first = page.locator("#text").inner_text()
    page.locator("#text .token").nth(5).hover()
    page.locator("#popover button:not(.chosen)").first.click()
    done(page)
    assert len(labels(page)) == 4, "the beginning, the first text, the fork up to its token, and what follows"
    forked = page.locator("#text").inner_text()
    before = "".join(page.locator("#text .token").all_inner_texts()[:5])
    assert forked != first
    assert before.strip() in first
    # Back into the first one, by the tree.
    page.locator("#tree .node").nth(1).click()
    assert page.locator("#text").inner_text() == first


def test_forks_states_and_what_is_read_again(page, books):
    offered = "keep_state" in json.dumps(books.client.get("/openapi.json").json())
    assert offered, "the server keeps states"
    dots = page.locator("#tree .dot", has_text="●")
    write(page, "The old man looked at the sea. " * 20)
    assert dots.count() == 2, "the beginning and the text"
    sent: dict[str, dict] = {}

    def note(asked) -> None:
        if asked.method == "POST":
            sent[asked.url.removeprefix(books.url)] = json.loads(asked.post_data)

    page.on("request", note)
    write(page, "And then")
    assert sent["/v1/states"]["prompt"] == "And then", "only what is new is read"
    assert sent["/v1/states"]["state"].startswith("state_")
    assert sent["/v1/completions"]["prompt"] == ""
    assert sent["/v1/completions"]["state"] != sent["/v1/states"]["state"]
    read = int(re.search(r"a state of (\d+) tokens", page.inner_text("#where"))[1])
    assert read > 100 + 24, "with all that came before"
    page.keyboard.press("Alt+r")
    done(page)
    assert dots.count() == 5
    memory = page.inner_text("#memory")
    assert "5 states" in memory
    assert "Transformer" in memory
    states = [node["state"] for node in kept(page)["trees"]["completion"]["nodes"] if node["state"]]
    assert books.client.get(f"/v1/states/{states[0]}").status_code == 200
    page.locator("#tree .current").focus()
    page.keyboard.press("Delete")
    page.wait_for_timeout(500)
    assert books.client.get(f"/v1/states/{states[-1]}").status_code == 404
    # A state that is gone is no error: the whole text is read again.
    for state in states[:-1]:
        books.client.delete(f"/v1/states/{state}")
    page.wrong.clear()
    write(page, "")
    assert len(labels(page)) == 5
    page.wrong[:] = [one for one in page.wrong if "404" not in one]  # the browser tells of the refusal, too
    assert page.locator("#notice").is_hidden()


def test_stop_edit_and_again(page):
    page.fill("#max_tokens", "2000")
    page.fill("#input", "Once upon a time")
    page.press("#input", "Control+Enter")
    page.locator("#text .token").nth(5).wait_for()
    page.keyboard.press("Escape")
    done(page)
    count = page.locator("#text .token").count()
    assert count < 1000
    assert "stopped" in page.inner_text("#where")
    page.fill("#max_tokens", "5")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("Alt+e")
    assert page.input_value("#input") == "Once upon a time"
    write(page, "Twice upon a time")
    assert page.inner_text("#text").startswith("Twice upon a time")
    assert len(labels(page)) == 4
    page.keyboard.press("Alt+r")
    done(page)
    assert len(labels(page)) == 5
    page.keyboard.press("Alt+ArrowLeft")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("Alt+ArrowLeft")
    assert page.inner_text("#text") == "Once upon a time"
    page.keyboard.press("Alt+ArrowDown")
    assert page.locator("#text .token").count() == count


def test_a_visit_is_remembered(page, books):
    write(page, "It was night")
    text = page.inner_text("#text")
    page.reload()
    page.wait_for_selector("#go:not([disabled])")
    page.wait_for_function("text => document.querySelector('#text').innerText === text", arg=text)
    assert page.input_value("#max_tokens") == "24"
    page.click("#clear")
    assert labels(page) == []


def test_a_chat_without_a_template(page, tmp_path):
    page.click("#mode-chat")
    page.fill("#input", "Who are you?")
    page.press("#input", "Enter")
    done(page)
    assert "no chat template" in page.inner_text("#where")
    assert page.locator(".turn").count() == 2
    reply = page.locator(".turn.assistant .part").inner_text()
    assert not reply.startswith((" ", "\n")), "the blank before a reply's first word is not shown"
    page.locator(".turn.assistant").get_by_text("again").click()
    done(page)
    assert len(labels(page)) == 3
    page.locator(".turn.user").get_by_text("edit").click()
    page.fill("#input", "Where are you?")
    page.press("#input", "Enter")
    done(page)
    assert page.locator(".turn.user .part").inner_text() == "Where are you?"
    page.screenshot(path=tmp_path / "chat.png")


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_with_a_template(browser, model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--model", model, "--chat-template", str(template), "--states", str(tmp_path / "states"))
    sent: list[dict] = []

    def note(asked) -> None:
        if asked.url.endswith("/v1/chat/completions"):
            sent.append(json.loads(asked.post_data))

    with serving(tmp_path / "log", *options) as server:
        server.ready()
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.goto(server.url)
        page.wait_for_selector("#go:not([disabled])")
        page.fill("#max_tokens", "12")
        page.fill("#seed", "113")  # of both replies each token is a character; bytes that are none share one span
        page.click("#mode-chat")
        for words in ("The cat", "The dog"):
            page.fill("#input", words)
            page.press("#input", "Enter")
            done(page)
        assert page.locator(".turn").count() == 4
        assert page.locator(".turn .token").count() > 10
        assert "plain turns" not in page.inner_text("#where")
        first, second = sent
        assert first["messages"] == [{"role": "user", "content": "The cat"}]
        assert second["messages"] == [{"role": "user", "content": "The dog"}], "only what is new"
        assert second["state"].startswith("state_")
        page.locator(".turn.user").first.get_by_text("edit").click()
        page.fill("#input", "A mouse")
        page.press("#input", "Enter")
        done(page)
        assert "state" not in sent[-1], "the fork is before every state"
        assert [turn.inner_text() for turn in page.locator(".turn.user .part").all()] == ["A mouse"]
        page.close()


def test_dark_and_light(page):
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.click("#theme")
    dark = page.evaluate(back)
    assert light != dark
    page.reload()
    assert page.evaluate(back) == dark
    # Text can be read on every background: WCAG's ratio of 4.5.
    ratio = """() => {
      const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = (colour) => {
        const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const mode = '.modes [aria-selected=true]';
      return [['body', 'body'], ['.quiet', 'header'], ['#go', '#go'], [mode, mode]]
        .map(([text, back]) => [light(getComputedStyle(document.querySelector(text)).color),
          light(getComputedStyle(document.querySelector(back)).backgroundColor)].sort((a, b) => b - a))
        .map(([a, b]) => (a + 0.05) / (b + 0.05)); }"""
    for _ in range(2):
        assert min(page.evaluate(ratio)) >= 4.5, page.evaluate(ratio)
        page.click("#theme")


def test_a_phone(page, tmp_path):
    page.set_viewport_size({"width": 360, "height": 740})
    write(page, "It was a dark and stormy night, " * 3)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    for button, panel in (("#show-tree", "#tree-panel"), ("#show-settings", "#settings-panel")):
        assert page.locator(panel).is_hidden()
        page.click(button)
        assert page.locator(panel).is_visible()
        page.screenshot(path=tmp_path / f"{panel[1:]}.png")
        assert not page.evaluate(wide)
        page.keyboard.press("Escape")
        assert page.locator(panel).is_hidden()
    for selector in ("#go", "#input", "#theme", "#mode-chat"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 740


def test_the_tree_by_keyboard(page):
    write(page, "It was night")
    write(page, "and it rained")
    page.locator("#tree .current").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#text") == "It was night"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#text").endswith("and it rained")
    assert page.locator("[role=treeitem][aria-selected=true]").count() == 1
    page.keyboard.press("Delete")
    assert len(labels(page)) == 2


def test_a_server_with_a_key(browser, tmp_path):
    from mambakit.assets import default_model_path

    assert Path(default_model_path()).is_dir()
    with api_server(access=AccessRules(keys=Keys.of(KEY))) as one:
        page = browser.new_page()
        page.goto(f"http://{one.host}/")
        page.wait_for_selector("#notice.error")
        assert "API key" in page.inner_text("#notice")
        assert page.evaluate("document.activeElement.id") == "key"
        page.close()
