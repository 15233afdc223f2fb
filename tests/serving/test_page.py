"""The page in a real Chromium: suggestions appear, are accepted word by word or whole, and everybody can use it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from smelter.serving.gate import Rules
from tests import tiny
from tests.servers import running

pytestmark = [pytest.mark.real, pytest.mark.slow]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
CODE = "def indent(text):\n    return "


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(model=tiny.model(max_seq_len=512)) as (url, _):
        yield url


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    opened = context.new_page()
    problems: list[str] = []
    opened.on(
        "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url.startswith((url, "data:")) else problems.append(request.url)
    )
    opened.goto(url)
    expect(opened).to_have_title("tiny · Smelter")
    yield opened
    assert problems == []
    context.close()


def suggest(page: Any, text: str = CODE) -> str:
    """Put `text` into the editor, ask with Ctrl+Space, and return the suggestion in grey."""
    page.locator("#auto").uncheck()
    page.locator("#temperature").fill("0")
    page.locator("#code").fill(text)
    page.locator("#code").focus()
    page.keyboard.press("Control+Space")
    expect(page.locator("#tokens button")).not_to_have_count(0)
    expect(page.locator("#status")).to_have_text("Tab accepts, Esc dismisses.")
    return "".join(page.locator("#overlay .token").all_text_contents())


def test_tab_accepts_the_whole(page: Any) -> None:
    grey = suggest(page)
    assert len(grey) > 10
    assert page.locator("#code").input_value() == CODE
    page.keyboard.press("Tab")
    assert page.locator("#code").input_value() == CODE + grey
    assert page.locator("#overlay .token").count() == 0
    page.keyboard.press("Control+z")
    assert page.locator("#code").input_value() == CODE


def test_tab_leaves_the_editor_where_nothing_is_suggested(page: Any) -> None:
    page.locator("#auto").uncheck()
    page.locator("#code").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "temperature"


def test_alt_right_accepts_a_word_and_typing_goes_along(page: Any) -> None:
    grey = suggest(page)
    page.keyboard.press("Alt+ArrowRight")
    accepted = page.locator("#code").input_value().removeprefix(CODE)
    assert 0 < len(accepted) < len(grey)
    assert grey.startswith(accepted)
    rest = "".join(page.locator("#overlay .token").all_text_contents())
    assert accepted + rest == grey
    page.keyboard.type(rest[0])
    assert "".join(page.locator("#overlay .token").all_text_contents()) == rest[1:]
    page.keyboard.type("☃")
    assert page.locator("#overlay .token").count() == 0


def test_escape_dismisses_and_moving_away_too(page: Any) -> None:
    suggest(page)
    page.keyboard.press("Escape")
    assert page.locator("#overlay .token").count() == 0
    suggest(page)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#overlay .token")).to_have_count(0)
    assert page.locator("#code").input_value() == CODE


def test_it_suggests_after_a_pause(page: Any) -> None:
    page.locator("#code").fill("")
    page.keyboard.type("import ")
    expect(page.locator("#overlay .token")).not_to_have_count(0)
    expect(page.locator("#speed")).not_to_have_text("–")


def test_it_fills_in_the_middle(page: Any) -> None:
    page.locator("#auto").uncheck()
    page.locator("#code").fill("def f(a):\n    return \n\nprint(f(1))\n")
    page.evaluate("document.getElementById('code').setSelectionRange(21, 21)")
    with page.expect_request("**/infill") as asked:
        page.keyboard.press("Control+Space")
    assert asked.value.post_data_json["input_prefix"] == "def f(a):\n    return "
    assert asked.value.post_data_json["input_suffix"] == "\n\nprint(f(1))\n"


def test_each_token_tells_how_sure_the_model_was(page: Any) -> None:
    suggest(page)
    button = page.locator("#tokens button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    rows = page.locator("#instead code").all_text_contents()
    assert len(rows) >= 5
    assert page.locator("#instead .chosen").count() == 1
    shares = [float(each.strip("%<")) for each in page.locator("#instead .rows span").all_text_contents()]
    assert shares[0] == max(shares)  # temperature 0
    page.locator("#overlay .token").first.hover()
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip code").count() >= 5


def test_a_screen_reader_is_told(page: Any) -> None:
    grey = suggest(page)
    assert page.locator("#announce").text_content() == f"Suggestion: {grey}"
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    snapshot = page.locator("body").aria_snapshot()
    for name in ('textbox "Code"', 'slider "Temperature', 'slider "Length', 'checkbox "Suggest while I type"'):
        assert name in snapshot
    assert page.locator(".overlay").get_attribute("aria-hidden") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Any, scheme: str) -> None:
    """WCAG's contrast of 4.5 for the text, the grey suggestion on its tint, and what is quiet."""
    page.emulate_media(color_scheme=scheme)
    suggest(page)
    worst = page.evaluate(CONTRAST)
    assert worst["ratio"] >= 4.5, worst


CONTRAST = """() => {
  const READ = "h1, h2, p, label, output, kbd, dd, dt, .token, #overlay, button, small, a";
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const layers = (node) => node ? [...layers(node.parentElement), getComputedStyle(node).backgroundColor] : [];
  const pixel = (colors) => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (color) => color.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let worst = { ratio: 99 };
  for (const node of document.querySelectorAll(READ)) {
    if (!node.textContent.trim() || !node.offsetParent) continue;
    const under = pixel(layers(node)), ink = pixel([...layers(node), getComputedStyle(node).color]);
    const [a, b] = [light(under), light(ink)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: node.textContent.slice(0, 40), under, ink };
  }
  return worst;
}"""


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_sticks_out(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    suggest(page, CODE + "a" * 150)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Text and overlay break their lines alike: the caret stands where the grey begins.
    heights = page.evaluate(
        "() => { const t = document.getElementById('code'); document.getElementById('overlay');"
        "return [t.clientWidth, document.getElementById('overlay').clientWidth]; }"
    )
    assert heights[0] == heights[1]


def test_a_key_is_asked_for(browser: Any) -> None:
    with running(Rules(api_key="secret")) as (url, _):
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#key-field")).to_be_visible()
        page.locator("#key").fill("secret")
        page.locator("#key").blur()
        expect(page).to_have_title("tiny · Smelter")
        assert suggest(page)
        page.close()


def test_a_server_that_is_gone_is_said(browser: Any) -> None:
    page = browser.new_page()
    with running() as (url, _):
        page.goto(url)
        expect(page).to_have_title("tiny · Smelter")
    page.locator("#code").focus()
    page.keyboard.press("Control+Space")
    expect(page.locator("#status")).to_have_text("The server does not answer.")
    expect(page.locator("#status")).to_have_class("status error")
    page.close()


def test_the_interface_is_listed(page: Any, url: str) -> None:
    page.goto(f"{url}/docs")
    page.wait_for_selector("section:has-text('/v1/completions') td:has-text('Text or token ids.')")
