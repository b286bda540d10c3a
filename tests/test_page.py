"""The page in a real browser: headless Chromium of the system, which needs no network."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_runtime import WEIGHT, qa_folder
from test_server import serving

from cli import UserError
from deploy.feedback import Feedback
from deploy.reader import Reader

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt-get install chromium")
# An emoji is one code point for the server and two units for a browser.
NOTES = (
    "🐑 The sheep came first.\n\n"
    + "Words before it.\n\n" * 200
    + "🐑 At night alpha burns on beta.\n"
)
# Files as a drop has them: the second value is the text, or how many bytes to make up.
FILES = """([name, data]) => {
  const files = new DataTransfer();
  files.items.add(new File([typeof data === "number" ? new Uint8Array(data) : data], name));
  return files;
}"""
CONTRAST = """() => {
  const shade = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
      .map((value) => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = {};
  while (words.nextNode()) {
    const element = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || !element.checkVisibility()) continue;
    const [a, b] = [shade(getComputedStyle(element).color), shade(ground(element))];
    found[words.currentNode.data.trim()] = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }
  return found;
}"""


class SlowReader(Reader):
    """One whose answers wait for `go_on`, and are an error if there is one."""

    go_on = threading.Event()
    error: Exception | None = None

    def __call__(self, *args: Any, **more: Any) -> Any:
        assert self.go_on.wait(30)
        if self.error:
            raise self.error
        return super().__call__(*args, **more)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=PROGRAM)
        yield chromium
        chromium.close()


@pytest.fixture
def reader(tmp_path: Path) -> SlowReader:
    """One that answers alpha, without documents."""
    found = SlowReader(qa_folder(tmp_path / "qa", WEIGHT.astype(np.float32)))
    found.go_on.set()
    return found


@pytest.fixture
def feedback(tmp_path: Path) -> Feedback:
    return Feedback(str(tmp_path / "feedback.json"))


@pytest.fixture
def address(reader: SlowReader, feedback: Feedback) -> Iterator[str]:
    with serving(reader, feedback) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, whose errors fail the test, as a request to elsewhere does."""
    problems: list[str] = []
    context = browser.new_context()
    shown = context.new_page()
    shown.set_default_timeout(10_000)
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on(
        "request",
        lambda request: request.url.startswith((address, "data:")) or problems.append(request.url),
    )
    shown.goto(address)
    yield shown
    context.close()
    assert not problems


def upload(page: Page, name: str, data: bytes) -> None:
    page.locator("#files").set_input_files({"name": name, "mimeType": "", "buffer": data})


def add(page: Page, name: str, text: str) -> None:
    upload(page, name, text.encode())
    sync_api.expect(
        page.locator("#documents .open b").get_by_text(name, exact=True)
    ).to_be_visible()


def ask(page: Page, question: str = "where is alpha") -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def test_without_documents_the_page_says_how_to_begin(page: Page) -> None:
    sync_api.expect(page.locator("#note h2")).to_have_text("Add a document to begin")
    sync_api.expect(page.locator("#note")).to_contain_text("20 MB")
    with page.expect_file_chooser():
        page.locator("#note button").click()


def test_a_document_may_come_before_the_page_knows_its_limits(page: Page, address: str) -> None:
    held: list[sync_api.Route] = []
    page.route("**/api/documents", lambda route: held.append(route))  # the list of documents
    page.goto(address)
    upload(page, "notes.txt", NOTES.encode())
    sync_api.expect(page.locator("#documents")).to_contain_text("Reading")
    sync_api.expect(page.locator(".failed")).to_have_count(0)
    for route in held:
        route.continue_()
    page.unroute("**/api/documents")
    sync_api.expect(page.locator("#documents .open")).to_contain_text("notes.txt")


def test_a_document_is_dropped_and_asked_and_the_answer_is_marked(page: Page) -> None:
    files = page.evaluate_handle(FILES, ["notes.txt", NOTES])
    page.dispatch_event("body", "dragover", {"dataTransfer": files})
    sync_api.expect(page.locator("#over")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": files})
    sync_api.expect(page.locator("#documents .open")).to_contain_text("notes.txt")
    sync_api.expect(page.locator("#over")).to_be_hidden()
    ask(page)
    best = page.locator("#answers > li").first
    sync_api.expect(best.locator(".head button")).to_have_text("alpha")
    sync_api.expect(best.locator(".passage")).to_have_text("🐑 At night alpha burns on beta.")
    sync_api.expect(best.locator("mark")).to_have_text("alpha")
    sync_api.expect(best.locator(".score")).to_contain_text("%")
    best.locator(".passage").click()
    mark = page.locator("dialog mark")
    sync_api.expect(mark).to_have_text("alpha")
    sync_api.expect(mark).to_be_in_viewport()
    assert page.evaluate("text.textContent") == NOTES
    page.locator("#close").click()
    sync_api.expect(page.locator("dialog")).to_be_hidden()


def test_a_spinner_turns_until_answers_come(page: Page, reader: SlowReader) -> None:
    add(page, "notes.txt", NOTES)
    reader.go_on.clear()
    ask(page)
    sync_api.expect(page.locator("#ask .spinner")).to_be_visible()
    sync_api.expect(page.locator("#answers")).to_have_attribute("aria-busy", "true")
    reader.go_on.set()
    sync_api.expect(page.locator("#answers > li").first).to_be_visible()
    sync_api.expect(page.locator("#ask .spinner")).to_have_count(0)


def test_an_error_is_a_line_and_trying_again_helps(page: Page, reader: SlowReader) -> None:
    add(page, "notes.txt", NOTES)
    reader.error = UserError("the model gives numbers that are not finite")
    ask(page)
    sync_api.expect(page.get_by_role("alert")).to_contain_text("that are not finite")
    reader.error = None
    page.get_by_role("button", name="Try again").click()
    sync_api.expect(page.locator("#answers mark").first).to_have_text("alpha")
    sync_api.expect(page.locator("#error")).to_be_hidden()


def test_without_answers_the_page_says_so(page: Page) -> None:
    add(page, "notes.txt", NOTES)
    ask(page, "who else")
    sync_api.expect(page.locator("#note h2")).to_have_text("No answer in these documents")


def test_a_file_that_is_no_document_is_told_beside_it(page: Page) -> None:
    upload(page, "image.txt", b"\xff\xfe\0\0")
    failed = page.locator("#documents .failed")
    sync_api.expect(failed).to_contain_text("image.txt is UTF-32")
    large = page.evaluate_handle(FILES, ["large.txt", 20_000_001])
    page.dispatch_event("body", "drop", {"dataTransfer": large})
    sync_api.expect(failed.nth(1)).to_contain_text("20.0 MB; at most 20 MB are taken")
    page.get_by_role("button", name="Dismiss the message about image.txt").click()
    sync_api.expect(failed).to_have_count(1)


def test_a_document_is_removed(page: Page) -> None:
    add(page, "notes.txt", NOTES)
    page.get_by_role("button", name="Remove notes.txt").click()
    sync_api.expect(page.locator("#note h2")).to_have_text("Add a document to begin")


def test_the_keyboard_alone_asks_opens_corrects_and_keeps(page: Page, feedback: Feedback) -> None:
    add(page, "notes.txt", NOTES)
    page.locator("#add").focus()
    page.keyboard.press("/")
    page.keyboard.type("where is alpha")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#answers mark").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    focused = page.locator(":focus")
    sync_api.expect(focused).to_have_text("alpha")
    assert focused.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#text")).to_be_focused()
    for label in ("Start one word earlier", "End one word later"):
        while page.locator(":focus").get_attribute("aria-label") != label:
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    sync_api.expect(page.locator("#span")).to_have_text("night alpha burns")
    while page.locator(":focus").get_attribute("id") != "save":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#answers")).to_contain_text("kept: night alpha burns")
    sync_api.expect(page.locator("#kept")).to_contain_text("1 answer")
    (article,) = feedback.as_squad()["data"]
    (paragraph,) = article["paragraphs"]
    context = "🐑 At night alpha burns on beta."
    assert (article["title"], paragraph["context"].strip()) == ("notes.txt", context)
    answer = {"text": "night alpha burns", "answer_start": context.index("night")}
    assert paragraph["qas"][0]["answers"] == [answer]


def test_words_that_are_selected_become_the_answer(page: Page, feedback: Feedback) -> None:
    add(page, "notes.txt", NOTES)
    ask(page)
    page.get_by_role("button", name="Correct it").first.click()
    sync_api.expect(page.locator("dialog mark")).to_be_visible()
    page.evaluate("""() => {
      const after = document.querySelector("dialog mark").nextSibling;
      getSelection().setBaseAndExtent(after, 0, after, " burns on".length);
    }""")
    sync_api.expect(page.locator("#span")).to_have_text("burns on")
    page.locator("#save").click()
    sync_api.expect(page.locator("#answers")).to_contain_text("kept: burns on")
    (article,) = feedback.as_squad()["data"]
    assert article["paragraphs"][0]["qas"][0]["answers"][0]["text"] == "burns on"


def test_a_right_answer_is_kept(page: Page, feedback: Feedback) -> None:
    add(page, "notes.txt", NOTES)
    ask(page)
    page.get_by_role("button", name="Right answer").first.click()
    sync_api.expect(page.locator("#answers")).to_contain_text("kept: alpha")
    assert len(feedback) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_stand_out_as_wcag_aa_asks(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    add(page, "notes.txt", NOTES)
    upload(page, "image.txt", b"\xff\xfe\0\0")
    sync_api.expect(page.locator("#documents .failed small")).to_contain_text("UTF-32")
    ask(page)
    page.get_by_role("button", name="Right answer").first.click()
    sync_api.expect(page.locator("#answers")).to_contain_text("kept: alpha")
    contrasts = page.evaluate(CONTRAST)
    assert {"Documents", "alpha", "Ask"} <= contrasts.keys()
    assert {words: ratio for words, ratio in contrasts.items() if ratio < 4.5} == {}


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    add(page, "a-long-name-without-any-space-in-it-of-a-file-from-a-scanner.txt", NOTES)
    ask(page)
    sync_api.expect(page.locator("#answers mark").first).to_be_visible()
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.locator("#answers .passage").first.click()
    sync_api.expect(page.locator("dialog mark")).to_be_in_viewport()
    assert page.evaluate(wide) == 360


def test_text_of_a_document_is_no_markup(page: Page) -> None:
    add(page, "<b>notes.txt", "<img src=x onerror=document.title='run'> is alpha <b>here</b>")
    ask(page)
    sync_api.expect(page.locator("#answers mark").first).to_have_text("alpha")
    page.locator("#answers .passage").first.click()
    sync_api.expect(page.locator("dialog")).to_contain_text("<img src=x")
    assert page.title() == "Ask your documents" and page.locator("img").count() == 0
