import errno
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from ruvjax.core import files
from ruvjax.core.events import Event, Kind
from ruvjax.training.report import (
    Compared,
    Denoising,
    Number,
    ReportData,
    Sample,
    render_report,
    trace,
    write_report,
)

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"'& \x00 \x1b[31m \u202e"
VOID = {"meta", "input", "br", "img", "path", "use", "rect", "line"}


class Reader(HTMLParser):
    """Collects the elements, and that every one that opens closes in its turn."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def full(text="plain"):
    events = [
        Event(0, 1, Kind.COMMIT, 2, 0.5, 0),
        Event(1, 0, Kind.COMMIT, 2, 0.5, 0),
        Event(0, 1, Kind.REMASK, 2, 0.4, 1),
        Event(0, 1, Kind.COMMIT, 3, 0.75, 2),
    ]
    records = [{"step": step, "loss": 5.0 / step, "lr": 1e-3, "kind": "train"} for step in range(1, 200)]
    records += [{"step": 100, "kind": "eval", "eval_loss": 2.0}, {"step": 150, "loss": None}]
    return ReportData(
        title=f"title {text}",
        subtitle=text,
        numbers=(Number(text, text, text), Number("speed", "1")),
        comparison=(Compared("model " + text, 1.9, 1.8, 2.0, ours=True, remark=text), Compared("xz", 1.7)),
        metrics=records,
        schedule={"t": [0.0, 0.5, 1.0], "alpha": [1.0, 0.5, 0.0]},
        denoising=(trace(text, [1, 0], events, lambda ids: f"{ids[0]}{text}", mask_id=0),),
        samples=(Sample(text, text, ((0, 4), (2, 6), (900, 999)), True, text), Sample("b", text, (), False)),
        notes=(text,),
        provenance={"cpu": {"model": text}, "git": {"diff": "line\n" * 200 + text}, text: None},
        config=text,
    )


def test_trace_keeps_one_row_as_plain_data():
    made = full().denoising[0]
    assert made == Denoising(
        "plain",
        (1, 0),
        0,
        3,
        ((0, 1, 1, 2, 0.5), (1, 1, 2, 2, 0.4), (2, 1, 1, 3, 0.75)),
        {1: "1plain", 2: "2plain", 3: "3plain"},
    )


def test_nothing_is_loaded_from_anywhere():
    page = render_report(full())
    assert not re.search(r"(?i)https?:|//[a-z]+\.|url\((?!#)|@import|<link|<iframe|<base", page)
    for name, value in read(page).attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
    assert "default-src 'none'" in page


def test_the_check_for_loads_would_see_one():
    page = render_report(full()).replace("</main>", '<img src="https://example.org/x.png"></main>')
    assert re.search(r"(?i)https?:", page)


def test_everything_is_escaped():
    plain, evil = read(render_report(full())), read(render_report(full(EVIL)))
    assert evil.tags.count("script") == plain.tags.count("script") == 2
    assert "onerror" not in [name for name, _ in evil.attributes] and "img" not in evil.tags
    page = render_report(full(EVIL))
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)
    shown = "".join(text for tag, text in evil.texts if tag not in ("script", "style"))
    assert "onerror=alert(2)" in shown and "␀ ␛[31m" in shown
    traces = json.loads(re.search(r'id="traces">(.*?)</script>', page, re.DOTALL)[1])
    assert traces[0]["pieces"]["2"] == "2" + EVIL


def test_the_page_shows_what_it_was_given():
    page = render_report(full("Word"))
    for title in ("Bits per byte", "Training", "Denoising", "Samples", "Notes", "Provenance", "Configuration"):
        assert f"<h2>{title}" in page
    assert "<mark>Word</mark>" in page  # overlapping spans joined, those outside clipped
    assert page.index("xz") < page.index("model Word") and "1.800–2.000" in page
    assert ">parses<" in page and "does not parse" in page
    assert page.count("<svg") == 3 and "held out" in page and "learning rate" in page
    assert "#010203" not in page and "var(--first)" in page  # plots take the page's colours
    assert re.findall(r'\bid="([^"]*)"', page).__len__() == len(set(re.findall(r'\bid="([^"]*)"', page)))


def test_spans_mark_only_what_was_filled_in():
    page = render_report(ReportData("x", samples=(Sample("s", "ab<cd>ef", ((2, 4), (6, 8))),)))
    assert "<pre>ab<mark>&lt;c</mark>d&gt;<mark>ef</mark></pre>" in page


@pytest.mark.parametrize(
    "data",
    [
        ReportData("empty"),
        ReportData("one step", metrics=[{"step": 1, "loss": 6.0, "lr": 0.0}], denoising=(trace("t", [], [], str, 0),)),
        ReportData(
            "no finite loss", metrics=[{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"loss": 1.0}]
        ),
        ReportData(
            "evaluation only", metrics=[{"step": 0, "kind": "eval", "eval_loss": 3.0}], comparison=(Compared("a", 0.0),)
        ),
        ReportData(
            "one eval",
            metrics=[{"step": 5, "kind": "eval", "eval_loss": 3.0}],
            comparison=(Compared("a", float("nan")),),
        ),
        ReportData("spike", metrics=[{"step": i, "loss": 300.0 if i == 1 else 2.0 + 1 / i} for i in range(1, 300)]),
    ],
    ids=lambda data: data.title,
)
def test_short_and_odd_runs_have_a_report(data):
    read(render_report(data))


def test_a_long_run_makes_no_large_file():
    records = [{"step": step, "loss": 2.0 + step % 7, "lr": 1e-3} for step in range(1, 50_000)]
    assert len(render_report(ReportData("long", metrics=records))) < 500_000


def test_equal_data_equal_file_and_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", full())
    before = path.read_bytes()
    assert write_report(tmp_path / "again.html", full()).read_bytes() == before

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError):
        write_report(path, full("other"))
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["again.html", "report.html"]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium to run the page's script")
def test_the_player_replays_the_events(tmp_path):
    path = write_report(tmp_path / "report.html", full())
    probe = """<script>
      const out = [];
      for (const step of [0, 1, 2, 3]) {
        const seek = document.querySelector(".seek");
        seek.value = String(step);
        seek.dispatchEvent(new Event("input"));
        out.push([...document.querySelectorAll(".tokens span")].map((s) => s.className.trim() + ":" + s.textContent));
      }
      document.title = JSON.stringify(out);
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    page = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    states = json.loads(read(re.search(r"<title>.*?</title>", page)[0]).texts[0][1])
    assert states == [
        ["given:1plain", "masked:3plain"],
        ["given:1plain", "now:2plain"],
        ["given:1plain", "masked:3plain"],
        ["given:1plain", ":3plain"],
    ]
