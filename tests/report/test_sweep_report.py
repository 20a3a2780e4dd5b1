"""What a sweep came to as page, Markdown, picture and table: the record's figures everywhere, nothing unescaped."""

import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import grid
from pictures import assert_pictures_belong

from compress.errors import OutputError
from compress.records import Report
from compress.report.canvas import canvas, light
from compress.report.frontier import FIGURES, figure_of, figures_of, frontier
from compress.report.labels import place
from compress.report.sweep import table, verdict, write_sweep
from compress.report.sweep_plots import axis_plots, frontier_plot, png, size_tick
from compress.report.sweep_table import axis_labels, columns, costs
from compress.sweep_records import Searched, Sweep

HOSTILE = """<script>alert("x")</script> & </title></td> {{ 7 * 7 }} ```\n| a | "b" 'c' \U0001f600 \x07 $x_1$"""
ERROR = "NaN in activations of layer 3; lower stages.0.target.sparsity"


def _changed(sweep: Sweep, **points: dict[str, Any]) -> Sweep:
    """The sweep with points changed, by their places: p1={...}."""
    made = [point.model_copy(update=points.get(f"p{number}", {})) for number, point in enumerate(sweep.points)]
    return sweep.model_copy(update={"points": made})


def _mixed() -> Sweep:
    """Twelve points: one failed, one waits, one has a warning and no weights."""
    undone = {"figures": {}, "on_frontier": False}
    return _changed(
        grid(),
        p1=undone | {"status": "failed", "error": ERROR},
        p5={"warnings": ["fewer tokens than asked"], "kept": False},
        p11=undone | {"status": "waiting"},
    )


def _without(sweep: Sweep, *names: str) -> Sweep:
    """Figures that nobody measured."""
    kept = [{n: v for n, v in point.figures.items() if not n.startswith(names)} for point in sweep.points]
    base = {name: value for name, value in sweep.base.items() if not name.startswith(names)}
    points = [p.model_copy(update={"figures": f}) for p, f in zip(sweep.points, kept, strict=True)]
    return sweep.model_copy(update={"points": points, "base": base})


class _Page(HTMLParser):
    """Tags of a page, what is not closed, its text, and the table of points: attributes and cells of each row."""

    VOID = {"meta", "br", "input", "path", "use", "rect"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.inside = "", False
        self.rows: list[tuple[dict[str, str | None], list[list[Any]]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.inside = found.get("class") == "points"
        if self.inside and tag == "tr":
            self.rows.append((found, []))
        if self.inside and tag in ("td", "th"):
            self.rows[-1][1].append([found, ""])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()
        if tag == "table":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and self.inside:
            self.rows[-1][1][-1][1] += data
        if not {"style", "svg", "script"} & set(self.open):
            self.text += data


def _written(sweep: Sweep, folder: Path, stem: str = "sweep") -> tuple[_Page, str, str]:
    write_sweep(sweep, folder, stem)
    html, md = ((folder / f"{stem}.{end}").read_text(encoding="utf-8") for end in ("html", "md"))
    return _Page(html), html, md


Written = tuple[_Page, str, str, Path]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page and the Markdown of `_mixed`, and where they lie."""
    folder = tmp_path_factory.mktemp("mixed")
    return *_written(_mixed(), folder), folder


def _svg(text: str | None) -> ElementTree.Element:
    assert text is not None
    return ElementTree.fromstring(text)


def _titles(text: str | None) -> list[str]:
    return [found.text or "" for found in _svg(text).iter("title")]


def test_the_record_survives_a_round_trip(mixed: Written) -> None:
    folder = mixed[-1]
    assert Sweep.model_validate_json((folder / "sweep.json").read_bytes()) == _mixed()
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.html", "sweep.json", "sweep.md", "sweep.png"]


def test_page_markdown_and_table_state_the_figures_of_the_record(mixed: Written) -> None:
    sweep = _mixed()
    page, _, md, folder = mixed
    record = json.loads((folder / "sweep.json").read_text())
    names = ["bytes", "size_ratio", "parameters", "sparsity", "bits_per_weight", "kl", "perplexity", "top1"]
    names += ["tasks.arc_easy", "seconds"]
    assert columns(sweep) == names
    _, texts = table(sweep)
    heads, base, *rows = page.rows
    assert [cell[1] for cell in heads[1]][3:] == [cast(Any, figure_of(name)).label for name in names]
    by_name = {cells[0][1].split(" ")[0]: cells for _, cells in rows}
    for figures, cells in [(record["base"], base[1])] + [
        (point["figures"], by_name[point["name"]]) for point in record["points"] if point["status"] == "done"
    ]:
        line = next(row for row in texts if row[0].split(" ")[0] == cells[0][1].split(" ")[0])
        for name, (attributes, text), plain in zip(names, cells[3:], line[3:-1], strict=True):
            shown = cast(Any, figure_of(name)).show(figures[name]) if name in figures else "–"
            assert text == plain == shown
            assert ("data-value" in attributes) == (name in figures)
            assert name not in figures or float(attributes["data-value"] or "") == figures[name]
        assert any(" | ".join(line[1:-1]) in row for row in md.splitlines())


def test_every_point_has_its_row_the_largest_first_and_what_is_not_done_last(
    mixed: Written,
) -> None:
    sweep = _mixed()
    page, _, md, _ = mixed
    names = [cells[0][1].split(" ")[0] for _, cells in page.rows[1:]]
    done = [point for point in sweep.points if point.status == "done"]
    by_size = [point.name for point in sorted(done, key=lambda point: point.figures["bytes"], reverse=True)]
    assert names == ["base", *by_size, sweep.points[1].name, sweep.points[11].name]
    assert names == [row[0].removesuffix(" *") for row in table(sweep)[1]]
    rows = [line for line in md.splitlines() if line.startswith("| ") and "report.html" in line]
    assert [line.split("[")[1].split("]")[0] for line in rows] == by_size


def test_a_point_that_failed_says_why_in_one_cell(mixed: Written) -> None:
    page, _, md, _ = mixed
    attributes, cells = next(row for row in page.rows if row[0].get("data-status") == "failed")
    assert [text for _, text in cells] == ["bits=2,sparsity=0.2", "2", "0.2", f"failed: {ERROR}"]
    assert cells[-1][0]["colspan"] == "10" and "href" not in str(cells)
    heads, rows = table(_mixed())
    assert heads[-1] == "Status" and [row[-1] for row in rows[-2:]] == [f"failed: {ERROR}", "waiting"]
    assert f"failed: {ERROR} |" in md
    assert "Status" not in table(grid())[0]
    assert {len(row) for row in rows} == {len(heads)}


def test_the_frontier_is_marked_everywhere(mixed: Written) -> None:
    sweep = _mixed()
    page, _, md, _ = mixed
    best = {point.name for point in sweep.points if point.on_frontier}
    assert 0 < len(best) < 10
    assert {cells[0][1].split(" ")[0] for found, cells in page.rows if "data-frontier" in found} == best
    assert {row[0].removesuffix(" *") for row in table(sweep)[1] if row[0].endswith(" *")} == best
    assert {line.split("[")[1].split("]")[0] for line in md.splitlines() if line.startswith("| **[")} == best


def test_settings_have_columns_of_their_own_up_to_three() -> None:
    sweep = grid()
    assert table(sweep)[0][:3] == ["Point", "bits", "sparsity"]
    many = sweep.model_copy(update={"axes": [f"stages.0.a{number}" for number in range(4)]})
    assert table(many)[0][:2] == ["Point", "Size"]


def test_parameters_have_a_column_where_they_differ() -> None:
    assert {"parameters", "sparsity"} <= set(columns(grid()))
    assert not {"parameters", "sparsity"} & set(columns(grid((2, 3), (0.0,))))


def test_the_page_is_whole_and_loads_nothing(mixed: Written) -> None:
    page, html, _, _ = mixed
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and not {"link", "img", "iframe", "object"} & set(tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "xlink:href") and not name.startswith("on")
            assert name != "href" or re.match(r"#|points/[^:]*/report\.html$", value or ""), (tag, value)
    assert re.findall(r"https?:|@import|@font-face|url\((?!#)|<script src", html) == []


def test_points_link_to_their_reports(mixed: Written) -> None:
    sweep = _mixed()
    page = mixed[0]
    links = {unquote(found["href"] or "") for tag, found in page.tags if tag == "a"}
    assert links == {f"{point.folder}/report.html" for point in sweep.points if point.status == "done"}


@given(folder=st.text(min_size=1, max_size=30).filter(lambda text: "\0" not in text and not text.startswith("/")))
def test_a_link_is_one_of_a_file_whatever_the_folder_is_called(folder: str) -> None:
    from compress.report.sweep import _link

    folder = folder.encode("utf-8", "replace").decode("utf-8")
    point = grid((2,), (0.0,)).points[0].model_copy(update={"folder": folder})
    parts = urlsplit(_link(point, Path()))
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
    assert Path(unquote(parts.path)) == Path(folder) / "report.html"


def test_results_elsewhere_are_linked_where_they_have_a_report(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "report.html").write_text("")
    sweep = grid((2, 3), (0.0,), axes=[])
    sweep = _changed(sweep, p0={"folder": f"/{tmp_path}/there"}, p1={"folder": f"{tmp_path}/none"})
    page, _, md = _written(sweep, tmp_path, "compare")
    assert [found["href"] for tag, found in page.tags if tag == "a"] == [f"{tmp_path}/there/report.html"]
    assert sorted(path.name for path in tmp_path.glob("compare.*")) == [
        "compare.html", "compare.json", "compare.md", "compare.png",
    ]  # fmt: skip
    assert "(compare.png)" in md and "compare.json" in page.text and "dscompress comparison" in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    points = [
        point.model_copy(
            update={"name": f"{HOSTILE} {number}", "warnings": [HOSTILE], "settings": {HOSTILE: HOSTILE * 2}}
        )
        for number, point in enumerate(grid().points)
    ]
    points[0] = points[0].model_copy(update={"status": "failed", "error": HOSTILE})
    points[1] = points[1].model_copy(update={"settings": {HOSTILE: 1}, "folder": HOSTILE})
    points = [p.model_copy(update={"figures": p.figures | {f"tasks.{HOSTILE}": 0.5}}) for p in points]
    search = Searched(over=HOSTILE, goal=HOSTILE, subject_to={HOSTILE: 1}, best=HOSTILE, note=HOSTILE)
    sweep = grid(name=HOSTILE, model=HOSTILE, axes=[HOSTILE], recipe={HOSTILE: HOSTILE}, protocol=HOSTILE)
    sweep = sweep.model_copy(update={"points": points, "search": search, "created": HOSTILE, "version": HOSTILE})
    page, html, md = _written(sweep, tmp_path)
    assert page.open == [] and [tag for tag, _ in page.tags].count("script") == 1
    assert html.count("<script") == 1 and page.text.count("{{ 7 * 7 }}") >= 20
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", md)
    assert "<script>" not in outside and outside.count("{{ 7 \\* 7 }}") >= 20
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ")}
    assert widths == {3, len(table(sweep)[0]) + 1}
    for cost in costs(sweep):
        assert len(_titles(frontier_plot(sweep, cost))) == 11


def test_every_done_point_of_a_picture_says_what_it_is() -> None:
    sweep = _mixed()
    for cost in ("kl", "perplexity", "tasks.arc_easy"):
        titles = _titles(frontier_plot(sweep, cost))
        expected = {
            f"bits={p.settings['stages.1.bits']}, sparsity={p.settings['stages.0.target.sparsity']:g}: "
            f"{p.figures['bytes'] / 1e6:.{0 if p.figures['bytes'] > 99.95e6 else 1}f} MB, KL {p.figures['kl']:.3g}, "
            f"perplexity {p.figures['perplexity']:.2f}, top-1 agreement {100 * p.figures['top1']:.1f} %, "
            f"arc_easy {p.figures['tasks.arc_easy']:.3g}"
            for p in sweep.points
            if p.status == "done"
        }
        assert set(titles) == expected and len(titles) == 10
    assert frontier_plot(sweep, "tasks.other") is None


def test_pictures_have_their_own_ids_and_the_colours_of_the_page(mixed: Written) -> None:
    assert_pictures_belong(mixed[1], 5)


def test_settings_have_a_picture_each_with_a_line_for_each_combination_of_the_others() -> None:
    (first, bits), (second, sparsity) = axis_plots(grid())
    assert (first, second) == ("KL from the base against bits", "KL from the base against sparsity")
    assert len(_titles(bits)) == len(_titles(sparsity)) == 12
    names = {text.text for text in _svg(bits).iter("text")}
    assert {"sparsity=0", "sparsity=0.2", "sparsity=0.4"} <= names
    [(title, many)] = axis_plots(grid(tuple(range(2, 12)), (0.0, 0.1)))[1:]
    assert title.endswith("(8 of 10 combinations)") and len(_titles(many)) == 16
    words = grid(axes=["stages.0.method"])
    assert axis_plots(_changed(words, **{f"p{n}": {"settings": {"stages.0.method": f"m{n}"}} for n in range(12)})) == []


def test_the_picture_for_elsewhere_is_a_png_in_light_colours() -> None:
    content = png(grid())
    assert content is not None and content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1600, 900)
    css = (Path(sys.modules["compress.report.canvas"].__file__ or "").parent / "templates/report.css").read_text()
    bright = css.split("@media")[0]
    assert all(colour in bright for colour in (light().ink, light().muted, *light().series))


def test_the_same_record_gives_the_same_bytes(mixed: Written, tmp_path: Path) -> None:
    _written(_mixed(), tmp_path)
    for file in ("sweep.json", "sweep.md", "sweep.html", "sweep.png"):
        assert (tmp_path / file).read_bytes() == (mixed[-1] / file).read_bytes(), file


def test_a_sweep_of_failures_and_one_without_evaluation_still_give_a_page(tmp_path: Path) -> None:
    undone = {"status": "failed", "error": ERROR, "figures": {}, "on_frontier": False}
    failed = _changed(grid(base={}, protocol=None), **{f"p{number}": undone for number in range(12)})
    bare = _without(grid(protocol=None), "kl", "perplexity", "top1", "tasks")
    for sweep, words in ((failed, "12 failed; none is done."), (bare, "was not evaluated.")):
        (tmp_path / "sweep.png").write_bytes(b"of another time")
        page, html, md = _written(sweep, tmp_path)
        assert page.open == [] and words in page.text and words in md
        assert "<svg" not in html and "sweep.png" not in md and not (tmp_path / "sweep.png").exists()
        assert len(page.rows) == 14 and png(sweep) is None and axis_plots(sweep) == []
    assert page.text.count("failed") == 0 and "91.3 MB" in page.text


def test_perplexity_stands_in_for_a_kl_that_was_not_measured() -> None:
    sweep = _without(grid(), "kl")
    assert costs(sweep) == ["perplexity", "tasks.arc_easy"]
    assert png(sweep) is not None and axis_plots(sweep)[0][0] == "Perplexity against bits"
    assert "smallest within 10 % of the base's perplexity: " in verdict(sweep)


def test_the_verdict_names_the_smallest_point_that_is_close_to_the_base() -> None:
    sweep = _mixed()
    close = [p for p in sweep.points if p.figures.get("kl", math.inf) <= 0.1]
    smallest = min(close, key=lambda point: point.figures["bytes"])
    size = f"{smallest.figures['bytes'] / 1e6:.1f} MB"
    best = sum(point.on_frontier for point in sweep.points)
    assert verdict(sweep) == (
        f"12 points, {best} on the frontier, 1 failed, 1 waiting; smallest within KL 0.1 of the base: "
        f"{smallest.name} at {size}."
    )
    far = grid((2,), (0.2, 0.4))
    assert "none is within KL 0.1 of the base; the closest is bits=2,sparsity=0.2 at " in verdict(far)
    tasks = _without(grid((2,), (0.2, 0.4)), "kl", "perplexity", "top1")
    assert verdict(tasks).endswith("; the smallest is bits=2,sparsity=0.4 at 44.5 MB.")
    waiting = _changed(grid((2,), (0.0,)), p0={"status": "waiting", "figures": {}, "on_frontier": False})
    assert verdict(waiting) == "1 point, 1 waiting; none is done yet."


def test_a_search_says_what_it_looked_for_and_found(tmp_path: Path) -> None:
    search = Searched(
        over="stages.0.target.sparsity", goal="largest sparsity", subject_to={"kl": 0.1, "top1": 0.9},
        best="bits=4,sparsity=0.4", note="the limits are crossed between 0.4 and 0.5",
    )  # fmt: skip
    page, _, md = _written(grid((4,), search=search), tmp_path)
    for text in (page.text, md):
        for words in (
            "largest sparsity", "KL from the base at most 0.1, Top-1 agreement at least 90.0 %", search.over,
            "bits=4,sparsity=0.4 (65.7 MB, KL 0.0997", search.note,
        ):  # fmt: skip
            assert words in text


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.json").write_text("old")

    def full(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        write_sweep(grid((2, 3), (0.0,)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    assert (tmp_path / "sweep.json").read_text() == "old"


VALUE = st.one_of(st.integers(0, 4).map(float), st.sampled_from([math.nan, math.inf]))


@given(
    rows=st.lists(st.fixed_dictionaries({}, optional={"bytes": VALUE, "kl": VALUE, "tasks.x": VALUE}), max_size=12),
    cost=st.sampled_from(["kl", "tasks.x"]),
)
def test_no_other_point_beats_one_on_the_frontier(rows: list[dict[str, float]], cost: str) -> None:
    sign = 1 if cost == "kl" else -1
    there = {
        number: (row["bytes"], sign * row[cost])
        for number, row in enumerate(rows)
        if all(name in row and math.isfinite(row[name]) for name in ("bytes", cost))
    }
    expected = {
        number
        for number, own in there.items()
        if not any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in there.values())
    }
    assert frontier(rows, cost=cost) == expected


def _report(**update: Any) -> Report:
    """As much of a report as figures are read from."""
    task = SimpleNamespace(base=0.6, compressed=0.55)
    quality = SimpleNamespace(
        kl=SimpleNamespace(mean=math.nan), perplexity=SimpleNamespace(base=10.0, compressed=12.0),
        top1_agreement=SimpleNamespace(mean=0.9), tasks={"arc.easy": task},
    )  # fmt: skip
    record = {
        "base": SimpleNamespace(bytes=200, parameters=100), "size_ratio": 4.0, "quality": quality, "speed": None,
        "compressed": SimpleNamespace(bytes=50, parameters=80, bits_per_weight=5.0), "stages": [],
    }  # fmt: skip
    return cast(Report, SimpleNamespace(**record | update))


def test_tasks_are_figures_by_their_names() -> None:
    figure = figure_of("tasks.arc.easy")
    assert figure is not None and figure.larger_is_better and figure.label == "arc.easy"
    assert (figure.read(_report()), figure.base(_report())) == (0.55, 0.6)
    assert figure.read(_report(quality=None)) is None
    other = figure_of("tasks.other")
    assert other is not None and other.read(_report()) is None
    assert figure_of("kl") is FIGURES["kl"] and figure_of("k1") is None


def test_figures_of_a_report_are_those_that_are_numbers() -> None:
    ours, base = figures_of(_report())
    assert "kl" not in ours and base["kl"] == 0.0
    assert ours["tasks.arc.easy"] == 0.55 and base["tasks.arc.easy"] == 0.6
    assert ours["sparsity"] == pytest.approx(0.2) and base["bits_per_weight"] == 16.0


@given(st.lists(st.lists(st.sampled_from(["stages", "0", "1", "bits", "target"]), min_size=1, max_size=4), max_size=5))
def test_axes_are_told_apart_by_the_ends_of_their_paths(paths: list[list[str]]) -> None:
    axes = list(dict.fromkeys(".".join(path) for path in paths))
    labels = axis_labels(axes)
    assert list(labels) == axes and len(set(labels.values())) == len(axes)
    assert all(axis == label or axis.endswith(f".{label}") for axis, label in labels.items())


def test_axes_read_well() -> None:
    paths = ["stages.0.bits", "stages.1.bits", 'stages[1].overrides["*.down_proj"].symmetric']
    assert list(axis_labels(paths).values()) == ["stages.0.bits", "stages.1.bits", "symmetric"]


def test_names_in_a_picture_cover_neither_one_another_nor_the_points() -> None:
    marks = [(float(number % 7), math.sin(number) * 0.1) for number in range(25)]
    with canvas(3.0) as (figure, axes):
        for x, y in marks:
            axes.plot(x, y, marker="o", linestyle="none")
        place(figure, axes, [(x, y, f"a long name {n}") for n, (x, y) in enumerate(marks)], marks)
        boxes = [text.get_window_extent() for text in axes.texts]
        dots = axes.transData.transform(marks)
        inside = axes.get_window_extent()
    assert 5 <= len(boxes) <= 25
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_what_a_log_scale_has_no_place_for_lies_at_its_lower_end() -> None:
    sweep = _changed(grid(), p9={"figures": grid().points[9].figures | {"kl": 0.0}})
    assert len(_titles(frontier_plot(sweep, "kl"))) == 12
    assert "base, at 0" in {text.text for text in _svg(frontier_plot(sweep, "kl")).iter("text")}


def test_points_without_a_figure_are_in_the_table_alone() -> None:
    partial = {name: value for name, value in grid().points[3].figures.items() if name not in ("kl", "perplexity")}
    sweep = _changed(grid(), p3={"figures": partial}, p4={"figures": grid().points[4].figures | {"kl": math.inf}})
    assert len(_titles(frontier_plot(sweep, "kl"))) == 10
    row = next(row for row in table(sweep)[1] if row[0].startswith(sweep.points[3].name))
    assert row[8] == "–"


@pytest.mark.parametrize(
    ("value", "text"), [(95e6, "95 MB"), (1.25e9, "1.25 GB"), (100e6, "100 MB"), (2e9, "2 GB"), (500, "500 B")]
)
def test_sizes_on_an_axis_read_well(value: float, text: str) -> None:
    assert size_tick(value) == text


@pytest.mark.parametrize("count", [0, 1])
def test_few_points_give_a_page(tmp_path: Path, count: int) -> None:
    sweep = grid((4,), (0.2,))
    page, _, _ = _written(sweep.model_copy(update={"points": sweep.points[:count]}), tmp_path)
    assert page.open == [] and len(page.rows) == 2 + count


def test_reading_the_writer_imports_no_plots() -> None:
    code = "import sys, compress.report.sweep; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
