"""Evaluations of a real model, and their page in a real browser."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from helpers import online, runs
from helpers.leaderboards import ArenaFiles, alpaca_arguments, alpaca_verdicts
from sdpo.cli import main
from sdpo.demo import smollm2 as demo
from sdpo.evaluate import tasks
from sdpo.evaluate.benchmarks import BenchmarkConfig
from sdpo.evaluate.judging import outcome_of, read_verdict
from sdpo.io.rows import read_rows
from sdpo.online.sampler import InProcessSampler
from sdpo_parallel.huggingface import load_tokenizer

IFEVAL = Path(__file__).parents[1] / "evaluate" / "published" / "ifeval.jsonl"
PROMPTS = Path(demo.__file__).with_name("prompts.txt")
TOKENS = 64
"""Of answers to a benchmark: this is to end in minutes."""
COUNT, LONG = 8, 128
"""Prompts of the preference, and tokens of an answer, all of which SmolLM2 uses when left alone."""
WIDTHS = (1200, 480)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


# Benchmarks


@pytest.fixture(scope="module")
def spoiled(smollm2, folder) -> str:
    """SmolLM2 with as much noise in its matrices as there is signal."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p += p.std() * torch.randn(p.shape, generator=noise)
    model.save_pretrained(folder / "spoiled")
    load_tokenizer(smollm2).save_pretrained(folder / "spoiled")
    return str(folder / "spoiled")


@pytest.fixture(scope="module")
def benchmarks(smollm2, spoiled, nltk_data, folder) -> dict[str, Any]:
    """IFEval's report on both models, by the command as a user without the hub starts it."""
    argv = [sys.executable, "-m", "sdpo", "evaluate", "benchmarks", f"base={smollm2}"]
    argv += [f"spoiled={spoiled}", "--tasks", "ifeval", "--data", f"ifeval={IFEVAL}"]
    argv += ["--max-new-tokens", str(TOKENS), "--out", str(folder / "benchmarks")]
    env = {**os.environ, **runs.ENV, "NLTK_DATA": nltk_data}
    result = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads((folder / "benchmarks" / "benchmarks.json").read_text(encoding="utf-8"))


def test_ifeval_is_what_the_harness_itself_says(
    benchmarks, smollm2, spoiled, nltk_data, monkeypatch
):
    """Its own task and its own call, on a hub that has these six prompts."""
    import datasets
    import lm_eval
    import nltk

    prompts = datasets.load_dataset("json", data_files={"train": str(IFEVAL)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: prompts)
    monkeypatch.setattr(nltk.data, "path", [nltk_data])
    for name, model in (("base", smollm2), ("spoiled", spoiled)):
        results: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            device="cpu",
            tasks=["ifeval"],
            batch_size=16,
            apply_chat_template=True,
            gen_kwargs={"max_gen_toks": TOKENS},
        )
        theirs = {
            key.partition(",")[0]: value
            for key, value in results["results"]["ifeval"].items()
            if key.endswith("_acc,none")
        }
        ours = {r["metric"]: r["score"]["value"] for r in benchmarks["rows"] if r["model"] == name}
        assert len(ours) == 4 and ours == pytest.approx(theirs)


def test_an_online_run_scores_what_the_command_says_of_its_weights(
    benchmarks, smollm2, nltk_data, folder, monkeypatch
):
    """Of SmolLM2 before the first update, and of the export after the second."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [nltk_data])
    short = partial(BenchmarkConfig, max_new_tokens=TOKENS)
    monkeypatch.setattr(tasks, "BenchmarkConfig", short)
    prompts = online.make_prompts(folder / "asked.txt", 12)
    flags = {"prompts": 0, "tasks": "ifeval", "data": f"ifeval={IFEVAL}", "every": 9}
    options = ["--engine", "transformers", "--safeguard.probe-every", "9", "--optimizer.lr", "1e-4"]
    options += online.evaluated(flags)
    rows = online.online(smollm2, prompts, folder / "asked", *options, phases=("concise:2",))
    kinds = [
        f"{kind}_level_{how}_acc" for kind in ("prompt", "inst") for how in ("strict", "loose")
    ]
    shown = {f"evaluate/benchmark/ifeval/{kind}" for kind in kinds}
    assert shown <= rows[1].keys() and not shown & rows[0].keys()
    argv = ["evaluate", "benchmarks", str(folder / "asked" / "export"), "--tasks", "ifeval"]
    argv += ["--data", f"ifeval={IFEVAL}", "--max-new-tokens", str(TOKENS)]
    main([*argv, "--out", str(folder / "after")])
    for report, model, step in (("benchmarks", "base", 0), ("after", "export", 2)):
        kept = folder / report / "benchmarks" / model / "ifeval.json"
        assert online.scores(folder / "asked", step) == json.loads(kept.read_text())["scores"]


def test_a_spoiled_model_has_regressed(benchmarks):
    rows = [row for row in benchmarks["rows"] if row["metric"] == "prompt_level_strict_acc"]
    base, spoiled = rows
    assert base["score"]["value"] >= 4 / 6 and spoiled["score"]["value"] <= 1 / 6
    assert spoiled["verdict"] == "regressed" and not benchmarks["problems"]


# Preference


def prefer(smollm2: str, out: Path, *options: str) -> dict[str, Any]:
    """Report of SmolLM2 against itself, told and not told to be concise, by rule and by itself."""
    argv = ["evaluate", "preference", f"again={smollm2}", f"base={smollm2}", "--oracle"]
    argv += ["--personas", "concise", "--judges", f"judge={smollm2}", "--out", str(out)]
    argv += ["--prompts", str(PROMPTS), "--first", str(COUNT)]
    main([*argv, "--talk.max-new-tokens", str(LONG), *options])
    return json.loads((out / "preference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def preference(smollm2, folder) -> dict[str, Any]:
    return prefer(smollm2, folder / "preference")


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [row for _, _, row in read_rows(folder / "preference" / "pairs.jsonl")]


def test_a_prompt_alone_makes_smollm2_concise(preference, folder):
    same, told = (row for row in preference["compared"] if row["by"] == "rule")
    assert (same["first"], told["first"]) == ("again", "base told concise")
    assert same["wins"]["ties"] == COUNT, "the same model gives the same answers"
    assert told["wins"]["rate"]["low"] > 0.5 and told["wins"]["rate"]["value"] > 0.7
    assert told["difference"]["low"] > 0
    style = preference["style"]
    assert style["base told concise"]["words"] < 0.7 * style["base"]["words"]
    assert style["base told concise"]["finished"] > 0.5 > style["base"]["finished"]
    rows = pairs(folder)
    assert len(rows) == 2 * COUNT
    for row in rows[:COUNT]:
        one, other = row["answers"].values()
        assert one == other and one["text"]


def test_a_judge_that_judges_poorly_is_counted_all_the_same(preference, folder):
    same, told = (row for row in preference["compared"] if row["by"] == "judge")
    assert same["wins"]["ties"] == COUNT and same["unread"] == 0, "nobody is asked of equal texts"
    rows = pairs(folder)[COUNT:]
    replies = [row["replies"]["judge"] for row in rows]
    assert all(text for both in replies for text in both)
    verdicts = [tuple(map(read_verdict, both)) for both in replies]
    assert [row["outcomes"]["judge"] for row in rows] == [outcome_of(*v) for v in verdicts]
    counts = [told["wins"][name] for name in ("wins", "losses", "ties")]
    assert sum(counts) == COUNT
    unread = sum(v is None for both in verdicts for v in both)
    assert told["unread"] == pytest.approx(unread / (2 * COUNT))
    (judge,) = preference["judges"]
    assert judge["spent"]["calls"] == 2 * COUNT < judge["spent"]["tokens"]
    assert [row["between"] for row in preference["agreement"]] == [["rule", "judge"]] * 2


def test_what_was_said_is_not_asked_again(preference, smollm2, folder, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was asked again")

    monkeypatch.setattr(InProcessSampler, "sample", forbidden)
    assert prefer(smollm2, folder / "preference") == preference
    assert prefer(smollm2, folder / "preference", "--offline") == preference


# The page


@pytest.fixture(scope="module")
def signal(preference, smollm2, folder) -> list[dict[str, Any]]:
    """Rows of `sdpo signal` on answers that are too long for the user."""
    rows = [
        {
            "id": row["prompt_id"],
            "prompt": row["prompt"],
            "completion": row["answers"]["base"]["text"],
            "user_response": "Be brief. One sentence.",
        }
        for row in pairs(folder)[:3]
    ]
    data, out = folder / "interactions.jsonl", folder / "signal.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(["signal", "--model", smollm2, "--interactions", str(data), "--out", str(out)])
    return [row for _, _, row in read_rows(out)]


@pytest.fixture(scope="module")
def alpaca(folder) -> dict[str, Any]:
    """AlpacaEval's report of gemma-7b-it, from its published verdicts."""
    own = folder / "alpaca"
    own.mkdir()
    rows = [row | {"annotator": "weighted_alpaca_eval_gpt4_turbo"} for row in alpaca_verdicts()]
    main([*alpaca_arguments(own, rows, rows), "--out", str(own / "report" / "alpaca.json")])
    return json.loads((own / "report" / "alpaca.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def arena(folder) -> list[dict[str, Any]]:
    """Arena-Hard's reports of two models, of which one wins every game and one draws each."""
    found = list[dict[str, Any]]()
    for model, said in (("winner", ("B>A", "A>B")), ("drawer", ("A=B", "A=B"))):
        own = folder / "arena" / model
        own.mkdir(parents=True)
        files = ArenaFiles(own, model)
        out = folder / "arena" / f"{model}.json"
        main([*files.arguments(files.write(files.judgments(*said))), "--out", str(out)])
        found.append(json.loads(out.read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module")
def report(benchmarks, preference, alpaca, arena, signal, models, folder) -> Path:
    """The page of all of these, and of a run of two phases."""
    prompts = online.make_prompts(folder / "prompts.txt", 12)
    online.online(models("qwen3"), prompts, folder / "run", phases=("no_lists:2", "no_emojis:2"))
    names = ("benchmarks", "preference", "alpaca/report", "arena", "run", "signal.jsonl")
    sources = [str(folder / name) for name in names]
    main(["evaluate", "report", *sources, "--out", str(folder / "report")])
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright  # the other tests do without

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield found
        found.close()


@contextmanager
def shown(browser, report: Path, **how) -> Iterator[Any]:
    """The page in the browser: it says nothing to the console and asks nobody for anything."""
    with browser.new_context(**how) as context:
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        yield page
        assert said == [] and asked == [report.as_uri()]


def box(page, selector: str) -> dict[str, float]:
    """Where the one element is that fits, in pixels."""
    found = page.locator(selector)
    assert found.count() == 1, selector
    return found.bounding_box()


def middle(found: dict[str, float]) -> tuple[float, float]:
    return found["x"] + found["width"] / 2, found["y"] + found["height"] / 2


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_and_tables_are_drawn_and_nothing_sticks_out(browser, report, width):
    with shown(browser, report, viewport={"width": width, "height": 900}) as page:
        figures = page.locator("figure svg")
        assert figures.count() == 3, "preference, benchmarks and the run"
        for figure in figures.all():
            assert figure.is_visible()
            drawn = figure.bounding_box()
            assert drawn["width"] > 300 and drawn["height"] > 60
        assert page.locator("table.board").count() == 2 and page.locator("table").count() >= 10
        assert all(table.is_visible() for table in page.locator("table").all())
        sticks_out = """() => [...document.querySelectorAll('body *')].filter(e =>
          !e.closest('.wide') && e.getBoundingClientRect().right > innerWidth
        ).map(e => e.outerHTML)"""
        assert page.evaluate(sticks_out) == []
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_points_lie_where_the_values_say(browser, report, preference, benchmarks):
    with shown(browser, report, viewport={"width": 1200, "height": 900}) as page:
        plot = box(page, "figure.forest #plot")
        even, _ = middle(box(page, "figure.forest #even"))
        rows = preference["compared"]
        heights = list[float]()
        for number, row in enumerate(rows):
            for name in ("half", "rate"):
                selector = f"figure.forest #{name}-{number}"
                if (value := row["wins"][name]) is None:
                    assert page.locator(selector).count() == 0
                    continue
                x, y = middle(box(page, selector))
                assert x == pytest.approx(plot["x"] + value["value"] * plot["width"], abs=1)
                assert (x > even + 1) == (value["value"] > 0.5)
                interval = box(page, f"{selector}-interval")
                ends = interval["x"], interval["x"] + interval["width"]
                edges = [plot["x"] + value[end] * plot["width"] for end in ("low", "high")]
                assert ends == pytest.approx(edges, abs=3)  # lines end in half a line's width
                heights.append(y)
        assert heights == sorted(heights), "rows in the table's order, from the top"
        told = next(i for i, row in enumerate(rows) if row["difference"] and row["wins"]["wins"])
        assert middle(box(page, f"figure.forest #rate-{told}"))[0] > even + 0.2 * plot["width"]
        none, _ = middle(box(page, "figure.changes #even"))
        changed = [row for row in benchmarks["rows"] if row["change"]]
        for number, row in enumerate(changed):
            x, _ = middle(box(page, f"figure.changes #change-{number}"))
            change = row["change"]["value"]
            assert (x < none - 1, x > none + 1) == (change < 0, change > 0)


def cells(page, heading: str) -> list[list[str]]:
    """What is drawn of the first table after a heading, row by row."""
    table = page.locator(f"#{heading} + .wide table.board")
    return [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]


@pytest.mark.parametrize("width", WIDTHS)
def test_benchmarks_of_others_are_tables(browser, report, alpaca, arena, width):
    with shown(browser, report, viewport={"width": width, "height": 900}) as page:
        told = dict(zip(*cells(page, "alpaca"), strict=True))
        assert (told["model"], told["compared with"]) == (alpaca["model"], alpaca["reference"])
        assert told["judged by"] == "weighted_alpaca_eval_gpt4_turbo"
        assert told["win rate, %"] == f"{alpaca['win_rate']:.2f} ± {alpaca['standard_error']:.2f}"
        assert told["length-controlled win rate, %"].startswith("10.4")
        wide = page.locator("#alpaca + .wide").bounding_box()
        rate = page.locator("#alpaca + .wide td").nth(1).bounding_box()
        assert rate["x"] + rate["width"] < wide["x"] + wide["width"], "seen without scrolling"
        head, *rows = cells(page, "arena")
        told = [dict(zip(head, row, strict=True)) for row in rows]
        assert [(row["model"], row["category"], row["win rate, %"]) for row in told] == [
            ("drawer", "hard prompt", "50.0 [50.0, 50.0]"),
            ("winner", "hard prompt", "100.0 [100.0, 100.0]"),
            ("drawer", "creative writing", "50.0 [50.0, 50.0]"),
            ("winner", "creative writing", "100.0 [100.0, 100.0]"),
        ]
        assert {one["model"] for one in arena} == {row["model"] for row in told}
        for table in page.locator("table.board").all():
            edges = [cell.bounding_box() for cell in table.locator("tr").first.locator("th").all()]
            for one, other in itertools.pairwise(edges):
                assert one["x"] + one["width"] <= other["x"] + 1, "columns stand beside each other"


def test_samples_are_of_both_games(browser, report, folder):
    with shown(browser, report) as page:
        headings = page.locator("#samples ~ h3").all_inner_texts()
        said = page.locator("#samples ~ table.pairs .answer").all_inner_texts()
        counts = page.locator("#samples ~ h3 + p.note").all_inner_texts()
        heights = [h.bounding_box()["y"] for h in page.locator("#samples ~ h3").all()]
        tables = [t.bounding_box()["y"] for t in page.locator("#samples ~ table.pairs").all()]
    assert headings == ["concise: again against base", "concise: base told concise against base"]
    assert counts == [f"{COUNT // 2} of {COUNT} prompts."] * 2
    assert sum(y < heights[1] for y in tables) == len(tables) // 2 == COUNT // 2
    rows = pairs(folder)
    chosen = [*rows[: COUNT // 2], *rows[COUNT : COUNT + COUNT // 2]]
    texts = [answer["text"] for row in chosen for answer in row["answers"].values()]
    assert [" ".join(text.split()) for text in said] == [" ".join(t.split()) for t in texts]
    assert said[-2] != said[-1], "told to be concise it says something else"


def test_tokens_are_green_or_red_as_hindsight_says(browser, report, signal):
    with shown(browser, report) as page:
        colours = page.locator(".tokens span").evaluate_all(
            "spans => spans.map(s => [s.textContent, getComputedStyle(s).backgroundColor])"
        )
    tokens = [pair for row in signal for pair in zip(row["tokens"], row["advantage"], strict=True)]
    assert [text for text, _ in colours] == [text for text, _ in tokens]
    strong = 0
    for (_, colour), (_, advantage) in zip(colours, tokens, strict=True):
        red, green, _, *alpha = map(float, re.findall(r"[\d.]+", colour))
        assert (green > red) == (advantage > 0), (colour, advantage)
        strong += (alpha or [1.0])[0] > 0.2
        assert abs(advantage) < 1 or (alpha or [1.0])[0] > 0.2
    assert strong > 5


CONTRASTS = """() => {
  const parsed = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number)
    return {r, g, b, a}
  }
  const over = (one, other) => ({
    r: one.a * one.r + (1 - one.a) * other.r, g: one.a * one.g + (1 - one.a) * other.g,
    b: one.a * one.b + (1 - one.a) * other.b, a: 1})
  const behind = e => e === null ? {r: 255, g: 255, b: 255, a: 1}
    : over(parsed(getComputedStyle(e).backgroundColor), behind(e.parentElement))
  const channel = v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4
  const light = c => 0.2126 * channel(c.r) + 0.7152 * channel(c.g) + 0.0722 * channel(c.b)
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
  const texts = [...document.body.querySelectorAll('*')].filter(e => !e.closest('svg') && own(e))
  const letters = [...document.querySelectorAll('svg [id^=text_] use')]
  return [...texts, ...letters].map(e => {
    const ground = behind(e), style = getComputedStyle(e)
    const ink = over(parsed(e.closest('svg') ? style.fill : style.color), ground)
    const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b)
    return [(high + 0.05) / (low + 0.05), e.textContent, e.closest('svg') !== null, light(ground)]
  })
}"""


def commonest(png: bytes) -> str:
    """The colour of most pixels."""
    pixels = (255 * imread(io.BytesIO(png))[..., :3]).round().astype(int).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return "rgb({}, {}, {})".format(*colours[counts.argmax()])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_texts_can_be_read(browser, report, scheme):
    with shown(browser, report, color_scheme=scheme) as page:
        found = page.evaluate(CONTRASTS)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for figure in page.locator("figure svg").all():
            assert commonest(figure.screenshot()) == ground, "letters stand on the page's colour"
    assert sum(in_figure for _, _, in_figure, _ in found) > 100 < len(found)
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert [row for row in found if row[0] < 4.5] == []


def test_the_page_prints_with_its_figures(browser, report):
    with shown(browser, report, viewport={"width": 480, "height": 700}) as page:
        page.emulate_media(media="print")
        cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{cut}.length") == 0, "paper does not scroll"
        whole = page.pdf(format="A5")
        page.evaluate("document.querySelectorAll('svg').forEach(e => e.remove())")
        bare = page.pdf(format="A5")
    assert whole.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", whole)) > 1
    assert len(whole) > len(bare) + 5_000
