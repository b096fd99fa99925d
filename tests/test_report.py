"""The report: one page from a whole simulated project, from the import on. Numbers that do not compare never share a column."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from stages.data.sample import Sample
from stages.data.scenes import LEVELS, Scene, caption, render, scene_sample
from stages.data.scenes.render import draw_nuisance
from stages.data.shards import ShardWriter, open_shards
from stages.errors import UsageError
from stages.evaluate import describe_shards, evaluate
from stages.options import RunOptions
from stages.recipe import load_recipe
from stages.report import report
from stages.report.chart import Line, line_chart, log_ticks, short, sorted_bars, thin, ticks
from stages.report.folders import chain, distinct_names, read_folders
from stages.report.gallery import look_through, verdict
from stages.report.html import el
from stages.report.numbers import columns_of
from stages.report.numbers import speeds as speed_tables
from stages.report.pictures import Pictures
from stages.run import Run

RECIPE = load_recipe("show-o", size="tiny").to_toml()


# --- a project, simulated: everything but the model is real ---------------------------------------------------------------------


def options(*command: str) -> RunOptions:
    return RunOptions(quiet=True, command=("mmgen", *command))


def simulate(folder: Path, *, count: int = 48, skill: float = 0.9, steps: int = 600, name: str = "show-o") -> Path:
    """import → train → sample → eval, with a model that is right about one thing with probability `skill`. Returns the scores."""
    rng = np.random.default_rng(int(skill * 100))
    data = folder / "data"
    with (
        Run(data, stage="import", options=options("import", "scenes", "--out", str(data)), kind="shards"),
        ShardWriter(data, split="val") as writer,
    ):
        for index in range(count):
            writer.write(scene_sample(1, 0, "val", index))
    inputs = [describe_shards("data", open_shards(str(data)))]
    model = folder / name
    command = options("train-unified", str(data), "--recipe", name, "--out", str(model), "--max-minutes", "20")
    with Run(model, stage="train-unified", options=command, kind="checkpoint", resolved_recipe=RECIPE, inputs=inputs) as run:
        log_training(run, steps, rng)
        (model / "config.json").write_text("{}")
    record = json.loads((model / "run.json").read_text())
    inputs.insert(0, {"role": "model", "path": str(model), "fingerprint": "5e" * 32, "provenance": record})
    for place, right in ((folder / "samples", skill), (folder / "controls" / "untrained", 0.02)):
        command = options("sample", str(model), str(data), "--out", str(place))
        with (
            Run(place, stage="sample", options=command, kind="shards", resolved_recipe=RECIPE, inputs=inputs),
            ShardWriter(place, name="samples", codebook_sizes={"sample.image.codes": 96}) as writer,
        ):
            for index in range(count):
                sample = scene_sample(1, 0, "val", index)
                writer.write(Sample(sample.key, {**sample.fields, **answers(sample, right, rng)}))
    scores = folder / "scores"
    return evaluate(str(folder / "samples"), None, scores, options("eval", str(folder / "samples"), "--out", str(scores)))


def log_training(run: Run, steps: int, rng: np.random.Generator) -> None:
    for step in range(10, steps + 1, 10):

        def fall(start: float, end: float, speed: float, step: int = step) -> float:
            return (end + (start - end) * math.exp(-step / speed)) * float(rng.normal(1, 0.02))

        losses = {"loss/draw": fall(6.2, 1.3, 110), "loss/text": fall(5.1, 0.21, 60), "loss/see": fall(0.9, 0.1, 90)}
        rates = {"lr": 1e-3 * min(1, step / 100), "grad_norm": fall(3, 0.6, 80), "tokens_per_second": float(rng.normal(8100, 300))}
        run.log(
            step=step,
            phase="joint",
            samples=step * 32,
            tokens=step * 2048,
            seconds=step * 1.2,
            loss=sum(losses.values()),
            **losses,
            **rates,
        )
        if step % 100 == 0:
            run.log(step=step, phase="joint", **{"val/draw": losses["loss/draw"] * 1.1, "val/text": losses["loss/text"] * 1.2})
    run.status(step=steps, of=steps)


def answers(sample: Sample, skill: float, rng: np.random.Generator) -> dict[str, Any]:
    """Pictures, answers and a caption as a model of some skill would give them: wrong values, lost and extra objects, blur."""
    scene = Scene.from_json(sample.fields["scene"])

    def imagine() -> Scene:
        objects = []
        for entry in scene.objects:
            for attribute in ("colour", "shape", "size"):
                if rng.random() > skill ** (1 / 3):
                    entry = replace(entry, **{attribute: str(rng.choice(LEVELS[1].values[attribute]))})
            if rng.random() < 0.97:
                objects.append(entry)
        return Scene(1, tuple(objects))

    drawn = imagine()
    picture = render(drawn, draw_nuisance([drawn], rng))
    if rng.random() < 0.06:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3)))
    known = {entry["answer"] for entry in sample.fields["qa"]} | {"yes", "no", "two", "red"}
    qa = [
        {**entry, "answer": entry["answer"] if rng.random() < skill else str(rng.choice(sorted(known))), "truth": entry["answer"]}
        for entry in sample.fields["qa"]
    ]
    codes = (rng.zipf(1.3, (4, 4)) % 96).astype(np.int64)
    return {"sample.image": picture, "sample.qa": qa, "sample.caption": caption(imagine()), "sample.image.codes": codes}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    simulate(folder, count=14, steps=200)
    return folder


class Page(HTMLParser):
    """What a browser makes of the page: its text, its tags, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(project: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return report([project / "show-o", project / "samples", project / "scores"], out).read_text()


def test_the_page_is_self_contained_and_small(html):
    page = Page(html)
    assert len(html) < 3_000_000
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not re.findall(r"@import|(?:src|href|action)=\"(?!data:|#)|url\((?!#)", html)


def test_every_section_is_there_and_reachable(html):
    page = Page(html)
    anchors = [link["href"] for link in page.all("a")]
    assert anchors == [f"#{section['id']}" for section in page.all("section")]
    assert anchors == ["#pictures", "#questions", "#captions", "#results", "#curves", "#codebook", "#layout", "#provenance"]


def test_pictures_have_words_and_charts_have_labels(html):
    page = Page(html)
    assert len(page.all("img")) == 12 * 4
    assert all(len(str(image["alt"])) > 10 for image in page.all("img"))
    assert all(svg["role"] == "img" and (svg.get("aria-label") or svg["class"] == "mmd") for svg in page.all("svg"))
    assert {"h1", "h2", "h3", "main", "header", "nav"} <= {tag for tag, _ in page.tags}


def test_the_speed_of_a_tokenizer_is_a_table_of_its_own(tmp_path):
    """The last measurement of each size of picture counts; a run without one has no row."""
    row = {"metric": "psnr", "category": "all", "split": "val", "n": 3, "value": 20.0, "interval": None, "chance": None}
    speeds = [(100.0, 50.0, 32), (1234.0, 567.0, 32), (88.0, 77.0, 64)]
    for name, lines in (("timed", speeds), ("other", [])):
        (tmp_path / name).mkdir()
        results = {"inputs": [], "results": [{**row, "protocol": {}, "control": None}]}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        about = {"batch": 32, "threads": 2, "device": "cpu"}
        said = [{"encode_per_second": e, "decode_per_second": d, "height": side, "width": side, **about} for e, d, side in lines]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    folders = read_folders([tmp_path / "timed", tmp_path / "other"])
    [table] = speed_tables(folders)
    text = " ".join(Page(table).text)
    assert re.search(r"timed\s+1,234\s+567\s+32 × 32\s+32 at once, 2 threads, cpu\s+timed\s+88\s+77\s+64 × 64", text)
    assert "other" not in text and "100" not in text
    assert speed_tables(folders[1:]) == []


def test_the_verdicts_agree_with_the_score(project, html):
    """Counted over all samples, the ticks on the cards are the numerator of the object accuracy."""
    made = look_through(read_folders([project / "samples"])[0], limit=100)
    ticks_drawn = sum(verdict(fields["sample.image"], Scene.from_json(fields["scene"])).count("✓") for fields in made.drawn)
    rows = json.loads((project / "scores" / "results.json").read_text())["results"]
    objects = next(row for row in rows if (row["metric"], row["category"], row["control"]) == ("scene-accuracy", "objects", None))
    assert ticks_drawn == round(objects["value"] * objects["n"])


def test_headline_numbers_stand_beside_their_controls(project, html):
    rows = json.loads((project / "scores" / "results.json").read_text())["results"]
    text = "|".join(Page(html).text)
    for control in (None, "untrained", "shuffled"):
        row = next(r for r in rows if (r["metric"], r["category"], r["control"]) == ("scene-accuracy", "objects", control))
        assert f"{row['value']:.3f}" in text
    assert "untrained model" in text
    assert "chance" in text


def test_provenance_goes_back_to_the_import_command_in_order(project, html):
    links = chain(read_folders([project / "scores"]))
    assert [link.record["stage"] for link in links] == ["import", "train-unified", "sample", "eval"]
    text = "".join(Page(html).text)
    places = [text.index(f"mmgen {stage} ") for stage in ("import", "train-unified", "sample", "eval")]
    assert places == sorted(places)
    assert open_shards(str(project / "data")).fingerprint[:12] in text


def test_provenance_survives_when_only_nested_records_are_left(project, tmp_path):
    record = json.loads((project / "scores" / "run.json").read_text())
    moved = json.loads(json.dumps(record).replace(str(project), "/gone"))
    (tmp_path / "run.json").write_text(json.dumps(moved))
    (tmp_path / "results.json").write_text('{"inputs": [], "results": []}')
    assert [link.record["stage"] for link in chain(read_folders([tmp_path]))] == ["import", "train-unified", "sample", "eval"]


def test_a_folder_made_anew_after_it_was_read_does_not_tell_its_history(tmp_path):
    (tmp_path / "data").mkdir()
    made = {"stage": "import", "command": ["mmgen", "import", "other"], "started": "2026-01-02", "finished": "2026-01-03"}
    (tmp_path / "data" / "run.json").write_text(json.dumps(made))
    provenance = {"importer": "scenes", "arguments": {"level": 0}, "fingerprint": "scenes level 0"}
    inputs = [{"path": str(tmp_path / "data"), "fingerprint": "f", "provenance": provenance}]
    for started, expected in (("2026-01-01", None), ("2026-01-04", "import")):
        folder = tmp_path / started
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"stage": "train-unified", "started": started, "inputs": inputs}))
        assert chain(read_folders([folder]))[0].record.get("stage") == expected
    html = report([tmp_path / "2026-01-01"], tmp_path / "page.html").read_text()
    assert "mmgen import scenes --level 0" in "".join(Page(html).text)


def test_what_comes_from_data_is_escaped(tmp_path):
    attack = '<script>alert("x")</script>'
    picture = np.zeros((32, 32, 3), np.uint8)
    qa = [{"question": attack, "answer": attack, "truth": "no", "type": "x"}]
    fields = {"image": picture, "sample.image": picture, "sample.qa": qa, "sample.caption": attack, "caption": attack}
    with ShardWriter(tmp_path / "samples") as writer:
        writer.write(Sample("a", fields))
    html = report([tmp_path / "samples"], tmp_path / "page.html").read_text()
    assert not Page(html).all("script")
    assert "&lt;script&gt;" in html


def scored(folder: Path, rows: list[Mapping[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"inputs": [], "results": rows}))
    return folder


def result(value: float, control: str | None = None, **protocol: Any) -> dict[str, Any]:
    row = {"metric": "psnr", "category": "all", "split": "val", "n": 10, "value": value, "interval": None, "chance": None}
    return {**row, "control": control, "protocol": {"prompts": "p1", **protocol}}


def test_numbers_measured_differently_never_share_a_column(tmp_path):
    one = scored(tmp_path / "one", [result(30.5), result(10.25, "untrained")])
    two = scored(tmp_path / "two", [result(31.5, sampling={"seed": 1})])  # sampled otherwise, measured alike
    three = scored(tmp_path / "three", [result(44.5, resize="bicubic")])
    columns = columns_of(read_folders([one, two, three]), "psnr", "val")
    assert [sorted(name for name, control in column.cells if control is None) for column in columns] == [["one", "two"], ["three"]]
    html = report([one, two, three], tmp_path / "page.html").read_text()
    text = "|".join(Page(html).text)
    assert "in several ways, which do not compare" in text
    assert "b: |" in text or "b: " in text
    assert "resize: bicubic" in text
    body = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    row = next(line for line in body if ">three" in line and "44.50" in line)
    assert [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", row)] == ["", "44.50"]


def test_a_control_that_was_not_made_leaves_no_column(tmp_path):
    html = report(
        [scored(tmp_path / "one", [result(30.5), {**result(0), "value": None, "control": "untrained", "n": 0}])], tmp_path / "p.html"
    )
    assert "untrained model" not in "".join(Page(html.read_text()).text).split("Results")[-1].split("Every number")[0]
    assert '<th scope="col">untrained model</th>' not in html.read_text()


def test_a_number_that_does_not_exist_is_a_dash(tmp_path):
    rows = [{**result(0.5), "metric": "ssim", "value": None, "n": 0}, {**result(0.5, "untrained"), "metric": "ssim"}]
    text = "|".join(Page(report([scored(tmp_path / "one", rows)], tmp_path / "page.html").read_text()).text)
    assert "|—|" in text


def test_a_path_that_is_no_run_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(UsageError, match="neither shards, nor a checkpoint, nor an evaluation"):
        report([tmp_path], tmp_path / "page.html")
    with pytest.raises(UsageError, match="no such folder"):
        report([tmp_path / "nothing"], tmp_path / "page.html")


def test_the_same_folders_give_the_same_page(project, tmp_path):
    one, two = (report([project / "scores", project / "samples"], tmp_path / name) for name in ("a.html", "b.html"))
    assert one.read_bytes() == two.read_bytes()


def test_large_pictures_are_shrunk_and_small_ones_keep_their_pixels():
    large, small = (np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((300, 420), (20, 24)))
    pictures = Pictures()
    assert 'width="128" height="91"' in str(pictures.img(large, "noise"))
    source = re.findall(r'base64,([^"]*)"', str(pictures.img(small, "noise")))[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))), small)


def test_pictures_stop_where_the_budget_is_used_up():
    small = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pictures = Pictures(budget=5000)
    made = [pictures.img(small, "noise") for _ in range(6)]
    assert 0 < sum(entry is not None for entry in made) < 6
    assert sum(len(str(entry)) for entry in made if entry) < 5000 + 6 * 120


# --- the pieces -----------------------------------------------------------------------------------------------------------------


def test_markup_is_escaped_once_and_only_markup_passes():
    assert (
        el("p", {"title": 'a"b', "hidden": True, "id": None}, "a<b", el("b", {}, "&"))
        == '<p title="a&quot;b" hidden>a&lt;b<b>&amp;</b></p>'
    )
    assert el("br") == "<br>"
    assert el("line", {"x1": 1}) == '<line x1="1"></line>'
    assert el("ul", {}, [["a", 1], None, (el("li", {}, x) for x in "<")]) == "<ul>a1<li>&lt;</li></ul>"


def test_a_falling_curve_falls_on_the_page_and_ends_at_its_dot():
    svg = line_chart("Loss", [Line("training", [0, 50, 100], [4.0, 2.0, 1.0])])
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]*)"', svg)[0].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # y grows downward
    assert f'cx="{points[-1][0]:.1f}"' in svg
    halves = re.findall(r'points="([^"]*)"', line_chart("Loss", [Line("t", [0, 50, 100], [4.0, 2.0, 1.0])], log=True))[0].split()
    heights = [float(pair.split(",")[1]) for pair in halves]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


def test_a_logarithm_leaves_out_what_has_none():
    svg = line_chart("Loss", [Line("t", [0, 1, 2], [0.0, -1.0, 3.0])], log=True)
    assert len(re.findall(r'points="([^"]*)"', svg)[0].split()) == 1
    assert "nothing to draw" in line_chart("Loss", [Line("t", [0], [0.0])], log=True)


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(step), float(step % 7)) for step in range(5000)]
    kept = thin(points)
    assert len(kept) <= 160
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert sum(v for _, v in kept) / len(kept) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.31), (7400, 8990), (-3, 12), (1e-5, 1e-3)])
def test_ticks_are_round_and_span_the_range(low, high):
    marks = ticks(low, high, 4)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 3 <= len(marks) <= 8
    assert ticks(5, 5, 4) == [5]


def test_log_ticks_are_positive_and_span_the_range():
    for low, high in ((0.013, 6.2), (1e-6, 1e4), (3, 3)):
        marks = log_ticks(low, high)
        assert 0 < marks[0] <= low
        assert marks[-1] >= high
        assert len(marks) <= 12


def test_numbers_are_short():
    assert [short(x) for x in (0, 0.03125, 7, 1234, 12345, 1.2e6, 3e-5)] == ["0", "0.0312", "7", "1234", "12.3k", "1.2M", "3e-05"]


def test_bars_say_how_many_codes_occur():
    assert "2 of 5 codes occur in 10 tokens" in sorted_bars("Tokens", [0, 9, 0, 1, 0])


def test_names_are_as_short_as_they_can_be():
    paths = [Path("/x/a/model"), Path("/x/b/model"), Path("/x/c")]
    assert distinct_names(paths) == ["a/model", "b/model", "c"]
