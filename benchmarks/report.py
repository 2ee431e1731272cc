"""How large a page of 1,000 responses is, how fast Chromium opens it, and whether a response of 20,000 tokens stutters.

    python -m benchmarks.report [--loads 5]

The pages are made up: a vocabulary with the frequencies of a language, a fifth of the tokens undecided, five
alternatives to every token. Opening counts from navigation until the first tokens are painted and the load event has
ended. The longest task is what Chromium itself reports as such; it reports none shorter than 50 ms, which counts as 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result
from forkrl.report import ForkView, Frame, Page, ShownPrompt, ShownResponse, View, write_page

VOCABULARY, NUM_ALTERNATIVES = 150_000, 5
OPEN_LIMIT_S, SIZE_LIMIT = 2.0, 20_000_000
WATCH = """
window.watched = { longest: 0, drawn: null };
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntries()) watched.longest = Math.max(watched.longest, duration);
}).observe({ type: "longtask", buffered: true });
const look = () => {
  if (document.querySelector("#responses .t")) requestAnimationFrame(() => { watched.drawn = performance.now(); });
  else requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
OPENED = """
const [navigation] = performance.getEntriesByType("navigation");
return navigation.loadEventEnd && watched.drawn ? [navigation.loadEventEnd, watched.drawn] : null;
"""
SCROLL = """
const done = arguments[0];
watched.longest = 0;
const frames = [];
let before = performance.now(), still = 0;
const step = (now) => {
  frames.push(now - before);
  before = now;
  const from = scrollY;
  scrollBy({ top: 900, behavior: "instant" });
  still = scrollY === from ? still + 1 : 0;
  if (still < 10) requestAnimationFrame(step);
  else done({ frame_ms: Math.max(...frames.slice(1)), longest_task_ms: watched.longest, frames: frames.length });
};
requestAnimationFrame(step);
"""
PRESS = """
const [key, times, done] = arguments;
watched.longest = 0;
const took = [];
const press = () => {
  const began = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  document.body.offsetHeight; // the layout that the key asks for is part of it
  took.push(performance.now() - began);
  if (took.length < times) requestAnimationFrame(press);
  else setTimeout(() => done({ key_ms: took.sort((a, b) => a - b), longest_task_ms: watched.longest }), 100);
};
requestAnimationFrame(press);
"""


SEARCH = """
const box = document.getElementById("search");
box.value = arguments[0];
const began = performance.now();
box.dispatchEvent(new Event("input", { bubbles: true }));
box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true })); // finds all, goes to the first
document.body.offsetHeight;
return [performance.now() - began, document.getElementById("matches").textContent];
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The report page of 1,000 responses, and of one of 20,000 tokens.")
    parser.add_argument("--loads", type=int, default=5, help="how often each page is opened")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium or not shutil.which("chromedriver"):
        print("skipped: chromium and chromedriver are not on PATH (make setup-browser installs them)")
        return
    setting, cases = {**describe_setting(), "seed": 0}, []
    with tempfile.TemporaryDirectory() as folder, browser(chromium, Path(folder)) as driver:
        setting["chromium"] = driver.capabilities["browserVersion"]
        for name, forks in pages():
            path = Path(folder) / f"{name}.html"
            cases.append({"page": name, **wrote(path, forks), **measure(driver, path, options.loads)})
            print(json.dumps(cases[-1]), flush=True)
    path = write_result("report", setting, cases)
    show(cases)
    print(f"written to {path}")


def pages() -> Iterator[tuple[str, ForkView]]:
    rng = np.random.default_rng(0)
    groups = [[int(rng.integers(60, 151)) for _ in range(8)] for _ in range(125)]
    yield "1,000 responses", one_view(groups, rng)
    yield "one of 20,000 tokens", one_view([[20_000]], rng)
    yield "5,000 responses, sampled", one_view(groups * 5, rng)


def one_view(groups: list[list[int]], rng: np.random.Generator) -> ForkView:
    prompts = [
        ShownPrompt(
            f"Problem {i}: what is left?", "", [response(f"Response {k + 1}", n, rng) for k, n in enumerate(group)]
        )
        for i, group in enumerate(groups)
    ]
    return ForkView([View("Responses", "Made up.", [Frame("", prompts)])], "Made up.", None)


def response(label: str, num_tokens: int, rng: np.random.Generator) -> ShownResponse:
    """T tokens whose texts follow Zipf's law; a fork has a flat distribution, any other token a sharp one."""
    forks_T = rng.random(num_tokens) < 0.2
    first_T = np.where(forks_T, rng.uniform(0.2, 0.7, num_tokens), 1 - rng.exponential(0.003, num_tokens))
    rest_TA = rng.dirichlet(np.ones(NUM_ALTERNATIVES), num_tokens)[:, 1:] * (1 - first_T)[:, None]
    p_TA = np.column_stack([first_T, -np.sort(-np.abs(rest_TA))])
    ids_TA = rng.zipf(1.3, (num_tokens, NUM_ALTERNATIVES)) % VOCABULARY
    ranks_T = np.where(forks_T, rng.integers(1, NUM_ALTERNATIVES + 1, num_tokens), 1)
    taken = (np.arange(num_tokens), ranks_T - 1)
    entropy_T = np.where(forks_T, rng.gamma(4.0, 0.3, num_tokens), rng.exponential(0.01, num_tokens))
    texts = [[word(id_) for id_ in row] for row in ids_TA.tolist()]
    return ShownResponse(
        label=label,
        tokens=[row[rank - 1] for row, rank in zip(texts, ranks_T.tolist(), strict=True)],
        entropy=[entropy_T.tolist()],
        logprobs=np.log(np.maximum(p_TA[taken], 1e-9)).tolist(),
        selected=forks_T.tolist(),
        ranks=ranks_T.tolist(),
        alternatives=[list(zip(row, p, strict=True)) for row, p in zip(texts, p_TA.tolist(), strict=True)],
        score=float(rng.random() < 0.4),
        finished=True,
    )


def word(token_id: int) -> str:
    """A text of the length that texts of such frequency have; one in thirty breaks the line."""
    if token_id % 30 == 29:
        return ".\n"
    letters = "etaoinshrdlucmfw"
    text = ""
    while token_id:
        token_id, letter = divmod(token_id, len(letters))
        text += letters[letter]
    return f" {text}"


def wrote(path: Path, forks: ForkView) -> dict[str, Any]:
    began = time.perf_counter()
    write_page(path, Page("made-up model", "benchmark", "Nothing was found: this page is made up.", [], forks=forks))
    responses = [each for prompt in forks.views[0].frames[0].prompts for each in prompt.responses]
    return {
        "responses": len(responses),
        "tokens": sum(len(each.tokens) for each in responses),
        "alternatives": NUM_ALTERNATIVES,
        "write_s": time.perf_counter() - began,
        "bytes": path.stat().st_size,
    }


@contextmanager
def browser(chromium: str, folder: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(300)
    driver.execute_cdp_cmd("Performance.enable", {})
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    try:
        yield driver
    finally:
        driver.quit()


def measure(driver: Any, path: Path, loads: int) -> dict[str, Any]:
    opened = [opening(driver, path) for _ in range(loads)]
    task_ms = driver.execute_script("return watched.longest")
    driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    metrics = {each["name"]: each["value"] for each in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    scroll = driver.execute_async_script(SCROLL)
    drawn = driver.execute_script("return document.querySelectorAll('#responses .t').length")
    opening(driver, path)
    keys = driver.execute_async_script(PRESS, "n", 200)
    search_ms, found = driver.execute_script(SEARCH, "th e")
    return {
        "open_s": opened,
        "open_longest_task_ms": task_ms,
        "heap_bytes": metrics["JSHeapUsedSize"],
        "scroll_to_end": {**scroll, "tokens_drawn": drawn},
        "press_n_200_times": {
            "median_ms": statistics.median(keys["key_ms"]),
            "longest_ms": keys["key_ms"][-1],
            "longest_task_ms": keys["longest_task_ms"],
        },
        "search": {"ms": search_ms, "found": found},
    }


def opening(driver: Any, path: Path) -> float:
    """Seconds from navigation until tokens are painted and the load event has ended."""
    driver.get("about:blank")
    driver.get(path.as_uri())
    while (ends := driver.execute_script(OPENED)) is None:
        time.sleep(0.02)
    return float(max(ends)) / 1000


def show(cases: list[dict[str, Any]]) -> None:
    head = ("page", "tokens", "MB", "open s: min", "median", "max", "heap MB", "longest task ms: open", "scroll", "n")
    table = Table(*head, box=None)
    for case in cases:
        open_s = case["open_s"]
        tasks = (
            case["open_longest_task_ms"],
            *(case[k]["longest_task_ms"] for k in ("scroll_to_end", "press_n_200_times")),
        )
        table.add_row(
            case["page"],
            f"{case['tokens']:,}",
            f"{case['bytes'] / 1e6:.1f}",
            *(f"{value:.2f}" for value in (min(open_s), statistics.median(open_s), max(open_s))),
            f"{case['heap_bytes'] / 1e6:.0f}",
            *(f"{value:.0f}" if value else "< 50" for value in tasks),
        )
    Console(width=140).print(table)
    for case in cases:
        if case["bytes"] > SIZE_LIMIT or statistics.median(case["open_s"]) > OPEN_LIMIT_S:
            print(f"over the limit: {case['page']} must stay under 20 MB and open in under 2 s")


if __name__ == "__main__":
    main()
