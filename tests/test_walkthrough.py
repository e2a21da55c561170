"""docs/walkthrough.html: the code it shows is the code that runs, and its drawings work."""
import html
import re
import time

import numpy as np
import pytest
from browser import Browser, needs_browser
from small_world import ROOT

from paper.walkthrough import choose, cited

PAGE = ROOT / "docs" / "walkthrough.html"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_code_shown_is_the_code_that_stands_there():
    shown = re.findall(r'<pre data-file="(.*?)" data-first="(\d+)">(.*?)</pre>', TEXT, re.S)
    assert len(shown) > 30
    for file, first, code in shown:
        code = html.unescape(re.sub("</?[bi]>", "", code)).split("\n")
        lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
        there = lines[int(first) - 1:int(first) - 1 + len(code)]
        assert [line.strip() for line in there] == [line.strip() for line in code], (
            f"{file}:{first} has changed: run python -m paper.walkthrough --text")


@pytest.mark.parametrize("equation", range(1, 16))
def test_each_equation_has_its_formula_its_code_and_its_oracle(equation):
    section = TEXT.split(f'<section id="eq{equation}">')[1].split("</section>")[0]
    assert "<math" in section and "$$" not in section
    code, oracle = section.split("<details>")
    marked = [html.unescape(re.sub("<.*?>", "", line))
              for line in re.findall("<b>(.*?)</b>", code)]
    assert any(equation in cited(line) for line in marked)
    assert 'data-file="tests/oracles.py"' in oracle


def test_nothing_is_fetched_and_the_page_is_small():
    assert not re.search(r'(src|href)="(https?:)?//', TEXT) and "url(" not in TEXT
    assert PAGE.stat().st_size < 3 * 2**20


def test_ranges_of_equations_are_understood():
    assert cited("Eq. 1-3, 5") == {1, 2, 3, 5} and cited("Eq. 9, 11") == {9, 11}


def test_the_six_scenes_are_what_they_are_called():
    rng = np.random.default_rng(0)
    n, C = 60, 5
    truth = rng.choice((-1, 1), (n, C))
    verdicts = rng.choice((-1, 0, 1), (n, 2, C))
    pseudo = np.where(verdicts[:, 0] == verdicts[:, 1], verdicts[:, 0], 0)
    p, peak = rng.random((2, n, C))
    area = rng.random((n, C)) * (truth == 1)
    found = {rule.split(":")[0]: (i, c) for rule, i, c in choose(p, peak, verdicts, truth, area)}
    assert len({i for i, _ in found.values()}) == 6
    assert truth[found["easy"]] == pseudo[found["easy"]] == 1
    assert truth[found["small"]] == 1 and p[found["small"]] > 0.5
    assert truth[found["look-alike"]] == -1
    assert truth[found["absent"]] == pseudo[found["absent"]] == -1
    i, c = found["modalities disagree"]
    assert verdicts[i, 0, c] != verdicts[i, 1, c]
    i, c = found["wrong pseudo-label"]
    assert pseudo[i, c] == -truth[i, c]


@pytest.fixture
def page():
    with Browser() as browser:
        browser.open(PAGE)
        for _ in range(100):
            if browser.run("return document.querySelectorAll('svg').length > 5"):
                break
            time.sleep(0.1)
        yield browser
        assert browser.errors() == []


@needs_browser
def test_every_drawing_draws(page):
    empty = page.run("return [...document.querySelectorAll('[data-draw]')]"
                     ".filter(box => !box.children.length).map(box => box.dataset.draw)")
    assert empty == []
    assert page.run("return document.querySelectorAll('section math').length") >= 15
    assert page.run("return performance.getEntriesByType('resource')"
                    ".filter(e => !e.name.startsWith('data:')).length") == 0


@needs_browser
def test_scene_and_category_change_what_is_drawn(page):
    drawn = "return document.querySelector('[data-draw=energy]').textContent"
    before = page.run(drawn)
    page.run("const menu = document.getElementById('scene');"
             "menu.value = 1; menu.dispatchEvent(new Event('change'))")
    assert page.run(drawn) != before and page.run("return document.querySelectorAll("
                                                  "'#scene option').length") == 6
    before = page.run(drawn)
    page.run("const menu = document.getElementById('category');"
             "menu.value = (+menu.value + 1) % 24; menu.dispatchEvent(new Event('change'))")
    assert page.run(drawn) != before


@needs_browser
def test_thresholds_change_verdicts_and_counts(page):
    counts = ("return [...document.querySelectorAll('[data-draw=counts] td')]"
              ".map(td => +td.textContent).filter(x => !isNaN(x))")
    right, wrong, right_absent, wrong_absent, silent = before = page.run(counts)
    assert sum(before) == 1000 and right > wrong
    for what in ("visual", "text"):  # so low that everything is called present
        page.run(f"const s = document.getElementById('{what}-negative'); s.value = s.min;"
                 "s.oninput(); const t = document.getElementById(arguments[0]);"
                 "t.value = +t.min + 0.002; t.oninput()", f"{what}-positive")
    after = page.run(counts)
    assert sum(after) == 1000 and after[0] + after[1] > 900
    assert "present" in page.run("return document.querySelector('[data-draw=agree]').textContent")


@needs_browser
def test_the_film_goes_from_stage_one_to_stage_two(page):
    told = "return document.querySelector('[data-draw=film]').textContent"
    assert "epoch 1 of 40, stage 1" in page.run(told) and "no pseudo-labels" in page.run(told)
    page.run("const e = document.getElementById('epoch'); e.value = e.max; e.oninput()")
    assert "epoch 40 of 40, stage 2" in page.run(told) and "% right" in page.run(told)
    s, theta = page.run("return [scene.film.at(-1).map(row => row[c]), "
                        "data.thetas.at(-1).map(both => both.map(row => row[c]))]")
    said = [(value >= high) - (value <= low) if high > low else 0
            for value, (high, low) in zip(s, theta)]  # Eq. 10
    last = {1: "present", -1: "absent", 0: "unknown"}[said[0] if said[0] == said[1] else 0]
    assert f"Eq. 12 says {last}" in page.run(told)


@needs_browser
def test_the_pooled_region_is_nearest_to_the_text_of_its_category(page):
    """In the scene "easy"; the first bar is the largest cosine."""
    page.run("find('scene').value = 0; chooseScene()")
    shown = "return document.querySelector('[data-draw=pooled]').textContent"
    assert page.run(shown).startswith(page.run("return names[c]"))


@needs_browser
def test_a_phone_needs_no_sideways_scrolling():
    with Browser((390, 844)) as browser:
        browser.open(PAGE)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
