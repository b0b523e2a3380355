"""The page of comparison of committed reports: what stands on it, and what it does in a browser."""

import csv
import json
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fewstep.distill.catalog.configuration import is_search, load_config, load_search
from fewstep.distill.catalog.methods import METHODS, SEARCHES, origins
from fewstep.distill.config.method import as_tree
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.methods.published import PUBLISHED
from fewstep.distill.protocols.table import STANDARDS
from fewstep.distill.reports.compare import compare, made_by, papers_of, published
from fewstep.distill.reports.table import BEST, SCORES, by_column, columns_of
from fewstep.distill.reports.words import MEANING, summary, timing
from PIL import Image

from ..metrics.test_protocol import score

CONFIGS = Path(__file__).parents[2] / "configs"
REPORTS = CONFIGS / "emoji" / "results" / "reports"
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
PAPERS = {
    "ict": "iCT", "ct": "CT", "cd": "CD", "ect": "ECT", "lct": "sLCT", "lcd": "LCM", "lcd_lora": "LCM-LoRA, LCM",
    "rg_lcd": "RG-LCD", "rg_lcd_ctrl_u": "Ctrl-U, RG-LCD", "scott": "SCott", "meanflow": "MeanFlow", "rcm": "rCM",
    "scm": "sCM", "dmd2": "DMD2", "nct_canny": "NCT", "controlnet_canny": "ControlNet", "interlcm": "InterLCM",
    "q_sched_lcd": "Q-Sched", "lcsc": "LCSC", "mwa": "MWA",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page of all committed reports, with pictures of three models of which one has a condition."""
    output = tmp_path_factory.mktemp("page")
    teacher = next(REPORTS.glob("teacher*.json"))
    entries = [str(p) for p in sorted(REPORTS.glob("*.json")) if p != teacher and p.stem != "ect_cut"]
    made = compare(entries, output, teacher=str(teacher), origins=origins())
    Image.new("RGB", (64, 32)).save(output / "a.png")
    captions = [{"text": "red apple", "seen": True}, {"text": "owl", "seen": False}]
    pictures = [("lcd", 1), ("lcd", 2), ("nct_canny", None), ("nct_canny", 1), ("scott", 1), ("scott", 2)]
    strips = [{"model": m, "steps": n, "file": "a.png"} for m, n in pictures]
    made["strips"] = [{"made_from": "caption", "captions": captions, "pictures": strips}]
    from fewstep.distill.reports.page import page

    (output / "compare.html").write_text(page(made, output))
    return output, made


def test_no_two_columns_have_one_name(made: tuple[Path, dict[str, Any]]) -> None:
    """Image-text scores of captions and of classes among them; in the page, in Markdown and in CSV."""
    output, record = made
    assert record["title"] == "Few-step students of emoji-sd"
    titles = [c.title for c in columns_of(record["rows"])]
    assert "image-text cosine lite0-minilm of classes" in titles and len(set(titles)) == len(titles)
    wide = (output / "compare.md").read_text().split("\n\n")[2].splitlines()[0]
    names = [cell.strip() for cell in wide.strip("|").split("|")]
    assert names == titles
    head = next(csv.reader((output / "compare.csv").open()))
    assert len(set(head)) == len(head) > len(titles)


def test_csv_has_every_digit(made: tuple[Path, dict[str, Any]]) -> None:
    output, record = made
    lines = list(csv.DictReader((output / "compare.csv").open(newline="")))
    assert len(lines) == len(record["rows"])
    for line, row in zip(lines, record["rows"], strict=True):
        kid = by_column(row)["KID"]
        assert (line["model"], line["steps"]) == (row["model"], str(row["steps"]))
        assert float(line["KID-efflite0-128"]) == kid.value and float(line["KID-efflite0-128 sd"]) == kid.sd
        assert float(line["s/image"]) == row["seconds_per_image"]


def test_latex_marks_the_best_of_each_number_of_steps(made: tuple[Path, dict[str, Any]]) -> None:
    output, record = made
    text = (output / "compare.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    steps = sorted({row["steps"] for row in record["rows"]})
    kids = [min(by_column(r)["KID"].value for r in record["rows"] if r["steps"] == n) for n in (1, 2, 4)]
    assert sorted(re.findall(r"\\mathbf\{(.*?)\}", text)) == sorted(f"{k:.4f}" for k in kids)
    assert r"rg\_lcd & $0.3674 \pm 0.0021$" in text
    for line in re.findall(r"^.*\\\\$", text.split(r"\end{tabular}")[0], re.M):
        assert line.count("&") == len(steps)


def test_strips_stand_by_steps_below_their_captions(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    html = (output / "compare.html").read_text()
    part = html[html.index("<h2>Pictures") : html.index("<h2>All scores")]
    groups = re.findall(r"<h4>(.*?)</h4>(.*?)(?=<div class=\"group\">|</div></div></div>$|\Z)", part, re.S)
    assert [(title, re.findall(r'alt="(.*?),', body)) for title, body in groups] == [
        ("condition", ["nct_canny"]),
        ("1 step", ["lcd", "nct_canny", "scott"]),
        ("2 steps", ["lcd", "scott"]),
    ]
    assert part.index("red apple") < part.index("<h4>") and "<span class=unseen>owl" in part


def test_the_head_is_in_words_and_hashes_are_below(made: tuple[Path, dict[str, Any]]) -> None:
    output, record = made
    html = (output / "compare.html").read_text()
    head, protocols = html[: html.index("<main>")], html[html.index("<h2>Protocols") :]
    ids = {s["protocol_id"] for row in record["rows"] for s in row["scores"]}
    assert not any(i in head for i in ids) and sum(i in protocols for i in ids) >= len(SCORES) - 1
    text = summary(record["rows"])
    assert text in head
    assert text.startswith(
        "27 models. A value is the mean ± standard deviation over 3 noise seeds, 200 pictures"
    )
    assert "the 1,996 pictures of emoji/train" in text


def test_every_table_has_scopes_and_a_caption(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    html = (output / "compare.html").read_text()
    static = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)
    assert re.findall(r"<th(?![^>]*\bscope=)[ >]", static) == []
    for table in re.findall(r"<table>(.*?)</table>", static, re.S):
        assert not table or table.startswith("<caption>") or "<thead>" not in table
    for box in re.findall(r'<div class="scroll[^>]*>', static):
        if "region" in box:
            assert 'tabindex="0"' in box and "aria-label=" in box


def test_what_is_said_of_seconds(made: tuple[Path, dict[str, Any]]) -> None:
    output, record = made
    rows = record["rows"]
    text = timing(rows)
    assert "of all models it was measured in different runs" in text
    assert text in unescape((output / "compare.html").read_text())
    assert text in (output / "compare.md").read_text()
    now = [{**row, "measured": "here"} for row in rows]
    assert "one after another" in timing(now)
    assert "of lcd it was measured in different runs" in timing(
        [now[0], *(r for r in rows if r["model"] == "lcd")]
    )
    assert "different devices (a, batch 1; b, batch 1)" in timing(
        [{**row, "device": d, "batch_size": 1} for row, d in zip(now, "ab", strict=False)]
    )


def test_numbers_of_papers_stand_beside_their_own_protocol_alone(made: tuple[Path, dict[str, Any]]) -> None:
    assert made[1]["published"] == []
    found = score(metric="FD", reference="cifar10-50k", conditioning="none").to_json() | {"name": "FID"}
    row = {"model": "mine", "method": "ict", "steps": 1, "scores": [found]}
    (line,) = published([row])
    assert (line["value"], line["steps"], line["here"]) == (2.51, 1, ["mine: FID 0.5"])
    assert published([{**row, "steps": 4}]) == published([{**row, "method": "lcd"}]) == []
    by_class = score(metric="FD", reference="cifar10-50k", conditioning="class").to_json() | {"name": "FID"}
    assert published([{**row, "scores": [by_class]}]) == []
    of_papers = {p.standard[0] for papers in PUBLISHED.values() for p in papers if p.standard}
    assert of_papers <= STANDARDS.keys()


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_papers_of_a_recipe(recipe: str) -> None:
    tree: dict[str, Any] = {"method": {"name": "diffusion"}}
    tree = read_yaml(CONFIGS / "emoji" / f"{recipe}.yaml")
    tree = as_tree(load_search(tree) if is_search(tree) else load_config(tree))
    origin = origins()[tree["method"]["name"]]
    assert ", ".join(p.name for p in papers_of(origin, tree)) == PAPERS[recipe]


def test_a_model_without_a_configuration_has_the_paper_that_is_beyond_doubt() -> None:
    """`ict` is the loss of four papers."""
    models = {"a": "dmd2", "b": "ict", "c": "lcd, lora", "d": None}
    made = made_by([{"model": model, "method": method} for model, method in models.items()], origins())
    assert {model: [p["name"] for p in row["papers"]] for model, row in made.items()} == {
        "a": ["DMD2"],
        "b": [],
        "c": [],
    }
    assert made["c"]["family"] == "latent consistency"


def test_every_method_has_a_family_and_every_score_a_meaning() -> None:
    assert origins().keys() == (METHODS | SEARCHES).keys() - {"text_encoder"}
    assert MEANING.keys() == SCORES.keys() == BEST.keys()
    assert all(re.fullmatch(r"\d{4}\.\d{5}", o.paper.arxiv) for o in origins().values())


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const all = s => [...document.querySelectorAll(s)];
  const seen = s => all(s).filter(n => n.checkVisibility()).length;
  const set = (id, value, kind = "input") => {
    $(id).value = value;
    $(id).dispatchEvent(new Event(kind, { bubbles: true }));
  };
  const counted = ["#by-steps tbody tr", "#by-nfe .dot", ".strip img", "#scores tbody tr", "#models tbody tr"];
  const counts = () => counted.map(seen);
  const names = () => all("#by-steps tbody th").map(n => n.textContent);
  const cells = k => all("#by-steps tbody tr").map(r => r.cells[k].textContent);
  const out = { width: document.documentElement.scrollWidth, all: counts() };
  out.cells = cells(1).concat(cells(2));
  out.best = all("#by-steps td.best").map(n => [n.parentElement.cells[0].textContent, n.cellIndex]);
  const box = n => [n.textContent, n.getBBox().y, n.getBBox().height];
  out.labels = all(".plots figure").map(f => [...f.querySelectorAll(".name")].map(box));
  out.coloured = all("#by-steps [aria-pressed=true]").map(n => n.textContent);
  out.ticks = all("#by-training text").map(n => n.textContent).filter(t => / (min|h)$/.test(t));
  out.described = all("#by-nfe svg, #by-training svg").map(n => n.getAttribute("aria-label"));
  out.listed = all("#by-nfe details tbody tr").length;
  all("#by-steps [aria-pressed=false]")[0].click();
  out.chosen = all("#by-steps [aria-pressed=true]").length;
  all("#by-steps [data-focus='column 2']")[0].focus();
  document.activeElement.click();
  out.focus = document.activeElement.dataset.focus;
  out.sorted = cells(2).map(parseFloat).filter(v => !isNaN(v));
  out.sort = all("#by-steps th")[2].getAttribute("aria-sort");
  set("steps", "2"); out.two = counts();
  set("steps", ""); set("family", "latent consistency"); out.family = [counts(), names()];
  set("family", ""); set("made", "search"); out.made = names();
  set("made", ""); set("words", "LCD lora"); out.words = names();
  set("words", ""); set("from", "class"); out.from = names();
  $("filter").reset();
  setTimeout(() => {
    out.reset = counts();
    set("metric", "image-text", "change"); out.higher = all("#by-steps td.best b").map(n => n.textContent);
    all("#scores thead button").find(b => b.textContent === "KID-efflite0-128").click();
    out.scores = all("#scores tbody tr").map(r => Number(r.cells[6].dataset.value));
    document.title = JSON.stringify(out);
  }, 50);
}, 50))</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium in the path")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(made: tuple[Path, dict[str, Any]], width: int, tmp_path: Path) -> None:
    """A script works the page as a reader would and leaves what it saw in the title."""
    output, record = made
    rows = record["rows"]
    path = tmp_path / "probe.html"
    path.write_text((output / "compare.html").read_text().replace("</body>", PROBE + "</body>"))
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command = [BROWSER, *flags, "--virtual-time-budget=5000", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    seen = json.loads(found.group(1).replace("&amp;", "&"))
    models = list(dict.fromkeys(row["model"] for row in rows))
    kid = {(r["model"], r["steps"]): by_column(r)["KID"] for r in rows}
    wanted = [kid.get((m, n)) for n in (1, 2) for m in models]
    assert seen["cells"] == ["" if k is None else f"{k.value:.4f} ± {k.sd:.4f}" for k in wanted]
    best = {n: min((k.value, m) for (m, s), k in kid.items() if s == n)[1] for n in (1, 2, 4)}
    assert sorted(seen["best"], key=lambda b: b[1]) == [[m, i + 1] for i, m in enumerate(best.values())]
    assert seen["width"] <= max(width, 500)  # headless Chromium has a least width
    assert seen["all"] == seen["reset"] == [27, len(rows), 6, len(rows), 27]
    families = {made["family"] for made in record["made_by"].values()} | {None}
    assert len(seen["coloured"]) == len(families) and models[0] in seen["coloured"]
    for labels in seen["labels"]:
        tops = sorted((y, height) for _, y, height in labels)
        assert len(tops) > 4 and all(a + h <= b + 1 for (a, h), (b, _) in pairwise(tops))
    assert (
        {"1 min", "30 min"}
        <= set(seen["ticks"])
        <= {"1 min", "2 min", "5 min", "10 min", "30 min", "1 h", "2 h"}
    )
    assert (
        seen["listed"] == len(rows) and best[4] in seen["described"][0] and "30 min" in seen["described"][1]
    )
    assert seen["chosen"] == len(families) + 1 and seen["focus"] == "column 2" and seen["sort"] == "ascending"
    assert seen["sorted"] == sorted(seen["sorted"]) and len(seen["sorted"]) > 20
    two = [m for m in models if (m, 2) in kid]
    assert seen["two"] == [len(two), len(two), 2, len(two), len(two)]
    family = [m for m in models if m.startswith(("lcd", "rg_lcd", "scott"))]
    assert sorted(seen["family"][1]) == sorted(family) and seen["family"][0][2:] == [
        4,
        3 * len(family),
        len(family),
    ]
    assert sorted(seen["made"]) == ["lcsc", "mwa", "q_sched_tuned"]
    assert seen["words"] == ["lcd_lora"] and seen["from"] == ["meanflow_dit"]
    texts = {
        n: [
            by_column(r)["image-text"].value for r in rows if r["steps"] == n and "image-text" in by_column(r)
        ]
        for n in (1, 2, 4)
    }
    assert sorted(seen["higher"]) == sorted(f"{max(v):.4f}" for v in texts.values())
    assert seen["scores"] == sorted(k.value for k in kid.values())
