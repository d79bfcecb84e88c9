"""The page in headless Chromium, over a real model: it shows what the engine holds, and the keyboard reaches it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.live_serving import Served, serving_page
from tests.server.running import CHAT_TEMPLATE
from tinyllm import LLM
from tinyllm.sampling_params import SamplingParams

STATUS = "#status[data-status={}]"
TIMEOUT_MS = 60_000  # only a run that is broken comes near it

Visit = Callable[..., Any]


def make_llm() -> LLM:
    return LLM("tales-4m", device="cpu", num_blocks=128, max_batch_tokens=64)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving_page(make_llm()) as served:
        yield served


@contextmanager
def visiting(browser: Any, url: str, *, refused: int | None = None, **options: Any) -> Iterator[Any]:
    """A page; what it logs as an error or asks of other hosts fails the test at its end.

    refused: a status that the test provokes; the browser logs it.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: _check_host(request.url, url, problems))
    page.goto(url)
    yield page
    context.close()
    assert not [problem for problem in problems if refused is None or f"status of {refused}" not in problem]


def _check_host(asked: str, url: str, problems: list[str]) -> None:
    if not asked.startswith(("data:", "blob:")) and urlsplit(asked).netloc != urlsplit(url).netloc:
        problems.append(f"asked for {asked}")


@pytest.fixture
def visit(browser: Any, server: Served) -> Iterator[Visit]:
    """Opens the page; afterwards the engine runs, and has nothing left to do."""
    opened: list[Any] = []

    def open_page(**options: Any) -> Any:
        manager = visiting(browser, server.url, **options)
        page = manager.__enter__()
        opened.append(manager)
        page.wait_for_selector(STATUS.format("idle"))
        return page

    server.thread.resume()
    yield open_page
    for manager in opened:
        manager.__exit__(None, None, None)
    server.clear()


def state(server: Served) -> dict[str, Any]:
    return httpx.get(f"{server.url}/live/state").json()


def shown_blocks(page: Any) -> dict[str, int]:
    data = page.eval_on_selector("#blocks-summary", "element => ({...element.dataset})")
    return {name: int(value) for name, value in data.items()}


def add(server: Served, name: str, prompt: str, **params: Any) -> None:
    tokens, settings = server.llm.encode(prompt), SamplingParams(**{"ignore_eos": True, **params})
    server.on_engine(lambda engine: engine.add_request(name, tokens, settings))


def pause(page: Any) -> None:
    page.click("#pause")
    page.wait_for_selector(STATUS.format("paused"))


def wait_for_step(page: Any, number: int) -> None:
    page.wait_for_selector(f"#stat-steps:text-is('{number:,}')")


# ---- what it shows


def test_it_loads_and_says_what_runs(visit: Visit) -> None:
    page = visit()
    assert page.inner_text("#model") == "tales-4m"
    assert "128 blocks of 16 tokens" in page.inner_text("#blocks-summary")
    assert re.search(r"Weights\s+7\.\d MiB", page.inner_text("#memory-legend"))
    assert page.locator("#pie path").count() == 5
    assert page.inner_text("#chat-title") == "Continue a text", "this model has no chat template"


def test_an_answer_streams_in(visit: Visit, server: Served) -> None:
    page = visit()
    page.click(".settings summary")
    page.fill("#max_tokens", "24")
    page.fill("#temperature", "0")
    page.fill("#prompt", "Once upon a time")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer:not(.writing)")
    params = SamplingParams(max_tokens=24, temperature=0, top_p=0.95)
    response = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "Once upon a time", **_plain(params)}, timeout=60
    )
    expected = "Once upon a time" + response.json()["choices"][0]["text"]
    assert page.locator(".answer .text").evaluate("element => element.textContent") == expected
    assert page.inner_text(".answer footer") == "cut off at the longest length"
    page.wait_for_selector("#request-rows tr.gone")
    assert page.input_value("#prompt") == ""


def _plain(params: SamplingParams) -> dict[str, Any]:
    return {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}


def test_the_block_map_shows_what_the_engine_holds(visit: Visit, server: Served) -> None:
    page = visit()
    pause(page)
    opening = (
        "Once upon a time there was a king who had three sons, and he was old and weak, "
        "and the castle was dark and the wood was deep."
    )
    add(server, "a", opening, max_tokens=40)
    add(server, "b", opening + " The youngest", max_tokens=40, n=3, seed=3)
    add(server, "c", "A fox and a wolf lived in a wood, and they were friends, until one", max_tokens=40, n=2, seed=5)
    page.wait_for_selector("#request-rows tr:nth-child(3)")
    for _ in range(6):
        steps = server.engine.num_steps
        page.click("#step")
        wait_for_step(page, steps + 1)
        now, shown = state(server), shown_blocks(page)
        held = [block for block in now["blocks"] if block[2]]
        assert shown["total"] == now["num_blocks"] == 128
        assert shown["held"] == len(held) == 128 - now["free"]
        assert shown["shared"] == sum(len(block[2]) > 1 for block in held)
        assert shown["cached"] == sum(block[1] for block in now["blocks"])
        assert shown["cachedFree"] == sum(block[1] and not block[2] for block in now["blocks"])
    assert shown["shared"] >= 1
    page.click(".blocks .list summary")
    page.wait_for_selector(f"#block-list li >> nth={len(held) - 1}")
    listed = page.locator("#block-list li").all_inner_texts()
    assert [int(re.match(r"Block (\d+) holds", text)[1]) for text in listed] == [block[0] for block in held]
    rows = page.locator("#request-rows tr").all_inner_texts()
    assert [re.split(r"\s+", row.strip())[1:3] for row in rows] == [
        ["decode", f"{_computed(now, 0)}"],
        ["decode", "\u00d73"],
        ["decode", "\u00d72"],
    ]
    assert "Copy-on-write" in page.inner_text("#story")
    assert "Prefix hit" in page.inner_text("#story")


def _computed(now: dict[str, Any], index: int) -> str:
    (sequence,) = now["requests"][index]["sequences"]
    return f"{sequence[2]}/{sequence[3]}"


def test_pause_stops_and_step_advances_by_one_and_resume_goes_on(visit: Visit, server: Served) -> None:
    page = visit()
    pause(page)
    assert page.is_disabled("#pause") and page.is_enabled("#step") and page.is_enabled("#resume")
    before = server.engine.num_steps
    add(server, "a", "Once upon a time", max_tokens=30)
    page.wait_for_selector("#request-rows tr:has-text('waiting')")
    for number in (1, 2):
        page.click("#step")
        wait_for_step(page, before + number)
        assert server.on_engine(lambda engine: engine.num_steps) == before + number
        assert page.inner_text("#steps-detail").startswith(f"Step {before + number:,}, ")
    page.click("#resume")
    page.wait_for_selector(STATUS.format("idle"))
    page.wait_for_selector("#request-rows tr.gone")
    assert server.engine.num_steps == before + 30


def test_a_page_that_comes_late_shows_the_same(visit: Visit, server: Served) -> None:
    first = visit()
    pause(first)
    add(server, "a", "There was once a fox who", max_tokens=50, n=2)
    for _ in range(3):
        steps = server.engine.num_steps
        first.click("#step")
        wait_for_step(first, steps + 1)
    with visiting(first.context.browser, server.url) as second:
        second.wait_for_selector(STATUS.format("paused"))
        second.wait_for_selector("#request-rows tr")
        assert shown_blocks(second) == shown_blocks(first)
        row = "#request-rows tr:first-child"
        assert second.inner_text(row) == first.inner_text(row)


def test_the_example_load_shows_sharing_forks_and_chunks(visit: Visit, server: Served) -> None:
    page = visit()
    pause(page)
    page.click("#example")
    page.wait_for_selector("#request-rows tr:nth-child(7):has-text('waiting')")
    for _ in range(12):
        steps = server.engine.num_steps
        page.click("#step")
        wait_for_step(page, steps + 1)
    assert shown_blocks(page)["shared"] > 3
    page.click("#resume")
    page.wait_for_selector("#example:enabled")
    story = " ".join(page.locator("#story").all_inner_texts())
    assert page.inner_text("#chat-error") == ""
    assert "Request" in story
    assert not server.engine.requests


def test_several_answers_and_stop(visit: Visit, server: Served) -> None:
    page = visit()
    page.click(".settings summary")
    page.select_option("#n", "3")
    page.fill("#max_tokens", "400")
    pause(page)
    page.fill("#prompt", "The king")
    page.click("#send")
    page.wait_for_selector("#request-rows tr:has-text('waiting')")
    steps = server.engine.num_steps
    page.click("#step")
    wait_for_step(page, steps + 1)
    assert page.locator(".answer").count() == 3
    page.click("#stop")
    page.wait_for_selector("#request-rows tr:has-text('aborted')")
    assert page.locator(".answer footer").all_inner_texts() == ["stopped"] * 3
    assert not server.engine.requests
    assert shown_blocks(page)["held"] == 0


def test_a_conversation_goes_on_with_the_answer_that_was_chosen(browser: Any) -> None:
    llm = make_llm()
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = CHAT_TEMPLATE
    with serving_page(llm) as served, visiting(browser, served.url) as page:
        page.wait_for_selector(STATUS.format("idle"))
        assert page.inner_text("#chat-title") == "Chat"
        page.click(".settings summary")
        page.fill("#system", "Tell tales.")
        page.fill("#max_tokens", "12")
        page.select_option("#n", "2")
        page.fill("#prompt", "Who is there?")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer footer button >> nth=1")
        answers = page.locator(".answer .text").evaluate_all("all => all.map((e) => e.textContent)")
        page.click(".answer footer button >> nth=1")
        bodies: list[dict[str, Any]] = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if "/v1/" in request.url else None)
        page.fill("#prompt", "And then?")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".message.assistant >> nth=1")
        page.wait_for_selector(".message.assistant:last-child .answer footer button >> nth=1")
    (body,) = bodies
    assert body["n"] == 2 and body["max_tokens"] == 12
    assert body["messages"] == [
        {"role": "system", "content": "Tell tales."},
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": answers[1]},
        {"role": "user", "content": "And then?"},
    ]


# ---- what can go wrong


def test_a_refusal_is_shown(visit: Visit) -> None:
    page = visit(refused=400)
    refusal = json.dumps({"error": {"message": "the queue is full: 7 requests wait"}})
    headers = {"Retry-After": "9"}
    page.route("**/v1/completions", lambda route: route.fulfill(status=400, body=refusal, headers=headers))
    page.fill("#prompt", "Once")
    page.click("#send")
    page.wait_for_selector("#chat-error:visible")
    assert page.inner_text("#chat-error") == "The queue is full: 7 requests wait (try again in 9 s)"
    page.wait_for_selector(".answer footer:text('failed')")


HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"


def test_what_a_model_writes_is_text(visit: Visit) -> None:
    page = visit()
    choice = {"choices": [{"index": 0, "text": HOSTILE, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(choice)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.fill("#prompt", f"Once {HOSTILE}")
    page.click("#send")
    page.wait_for_selector(".answer:not(.writing)")
    assert page.locator(".answer .text").evaluate("element => element.textContent") == f"Once {HOSTILE}{HOSTILE}"
    assert page.locator("#messages img, #messages script").count() == 0
    assert "owned" not in page.title()


def test_hostile_events_are_text_too(browser: Any, server: Served) -> None:
    facts = {**state(server), "model": HOSTILE}
    body = f"event: state\ndata: {json.dumps(facts)}\n\n"
    context = browser.new_context()
    page = context.new_page()
    page.route("**/live/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto(server.url)
    page.wait_for_selector("#model:not(:empty)")
    assert page.locator("#model").evaluate("element => element.textContent") == HOSTILE
    assert page.locator("header img").count() == 1
    context.close()


def test_a_connection_that_breaks_is_said_and_made_again(visit: Visit, server: Served) -> None:
    page = visit()
    page.route("**/live/events", lambda route: route.fulfill(body="", content_type="text/event-stream"))
    server.feed.close()
    page.wait_for_selector(STATUS.format("disconnected"))
    assert page.is_disabled("#pause")
    page.unroute("**/live/events")
    page.wait_for_selector(STATUS.format("idle"))


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any) -> None:
    with serving_page(make_llm(), api_keys=["open-sesame"]) as served:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(served.url)
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-title:text('refused')")
        page.fill("#key", "open-sesame")
        page.press("#key", "Enter")
        page.wait_for_selector(STATUS.format("idle"))
        page.click("#pause")
        page.wait_for_selector(STATUS.format("paused"))
        page.reload()
        page.wait_for_selector(STATUS.format("paused"))
        assert not page.is_visible("#key")
        context.close()


# ---- how it is reached and read


def test_the_keyboard_alone_suffices(visit: Visit, server: Served) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the chat"
    page.keyboard.press("Enter")
    page.keyboard.type("The wolf p s")  # letters in a text are letters
    page.keyboard.press("Escape")
    assert page.input_value("#prompt") == "The wolf p s"
    page.locator("#clear").focus()
    page.keyboard.press("p")
    page.wait_for_selector(STATUS.format("paused"))
    page.keyboard.press("/")
    page.keyboard.press("Enter")
    page.wait_for_selector("#request-rows tr:has-text('waiting')")
    page.locator("#clear").focus()
    steps = server.engine.num_steps
    page.keyboard.press("s")
    wait_for_step(page, steps + 1)
    page.locator("#block-map").focus()
    page.keyboard.press("n")
    page.wait_for_selector("#block-detail:text('holds tokens 0 to')")
    assert re.match(r"Block \d+ holds tokens 0 to \d+: request \d+ at place 0", page.inner_text("#block-detail"))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#block-detail:text('Block 1 ')")
    page.locator("#steps").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#steps-detail[aria-live=polite]")
    page.keyboard.press("r")
    page.wait_for_selector(STATUS.format("running") + ", " + STATUS.format("idle"))
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")


def test_every_control_can_be_tabbed_to_and_has_a_name(visit: Visit) -> None:
    page = visit()
    page.click(".settings summary")
    wanted = page.locator("button:visible:enabled, input:visible, select:visible, textarea:visible, summary:visible")
    count = wanted.count()
    reached = set()
    for _ in range(3 * count):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    missing = [
        n for n in wanted.evaluate_all("all => all.map((e) => e.id || e.textContent.trim())") if n not in reached
    ]
    assert not missing
    nameless = page.locator("button, input, select, textarea, canvas:not([aria-hidden]), svg[role=img]").evaluate_all(
        """all => all.filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") ||
             e.getAttribute("aria-labelledby") || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert not nameless


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.checkVisibility() || element.closest("svg, :disabled")) continue;
    const style = getComputedStyle(element), a = luminance(channels(style.color)), b = luminance(ground(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${element.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(14, 19, 24)"
    assert dark == (scheme == "dark")
    page.click("#help-open")
    assert page.evaluate(CONTRAST) == []


def test_the_theme_can_be_chosen_and_is_remembered(visit: Visit) -> None:
    page = visit(color_scheme="light")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.inner_text("#theme") == "Theme: light"
    page.click("#theme")
    assert page.evaluate(ground) != light
    page.reload()
    page.wait_for_selector(STATUS.format("idle"))
    assert page.inner_text("#theme") == "Theme: dark"
    assert page.evaluate(ground) != light


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1280])
def test_nothing_is_wider_than_the_window(visit: Visit, server: Served, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800})
    pause(page)
    add(server, "a", "Once upon a time there was", max_tokens=30, n=4)
    page.click("#step")
    page.wait_for_selector("#request-rows tr:has-text('decode')")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.is_visible("#request-rows tr")
