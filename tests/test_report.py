"""The report: its numbers against scikit-learn, its page in a real browser."""

import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics

from examples.photographs import encode, photographs, write_shard
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.use.page import refuse_page_file, render, write_page
from spark_nsfw.use.report import (
    NUM_BINS,
    LabelCounts,
    ReportData,
    ShardCounts,
    Thumbnail,
    images_per_second,
    outliers,
)


@pytest.fixture(scope="module")
def labelled():
    """Scores in the middle of their bins, and whether each is of an unsafe sample."""
    generator = np.random.default_rng(1)
    unsafe = generator.random(5000) < 0.2
    scores = np.where(unsafe, generator.beta(5, 2, 5000), generator.beta(1, 8, 5000))
    return (np.floor(scores * NUM_BINS) + 0.5) / NUM_BINS, unsafe


def counts_of(scores):
    return np.histogram(scores, NUM_BINS, (0, 1))[0]


def report_data(scores, unsafe=None, **more):
    labels = None
    if unsafe is not None:
        labels = LabelCounts("is_unsafe", counts_of(scores[unsafe]), counts_of(scores[~unsafe]))
    given = {
        "source": "/data/metadata",
        "score_column": "nsfw_score",
        "low": 0.0,
        "high": 1.0,
        "counts": counts_of(scores),
        "num_by_status": {"ok": len(scores), "image_undecodable": 37},
        "shards": [ShardCounts(f"{i:05}", 100, 1, 8, 1e9 + 60 * i) for i in range(50)],
    }
    return ReportData(**given | {"labels": labels} | more)


def test_what_a_threshold_keeps_is_what_is_below_it(labelled):
    scores, _ = labelled
    data = report_data(scores)
    for threshold in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert data.share_kept[data.at(threshold)] == pytest.approx((scores < threshold).mean())


def test_precision_recall_and_roc_are_scikit_learns(labelled):
    scores, unsafe = labelled
    data = report_data(scores, unsafe)
    assert data.labels.area_under_roc == pytest.approx(metrics.roc_auc_score(unsafe, scores))
    for threshold in (0.05, 0.3, 0.7):
        removed, at = scores >= threshold, data.at(threshold)
        assert data.labels.recall[at] == pytest.approx(metrics.recall_score(unsafe, removed))
        assert data.labels.precision[at] == pytest.approx(metrics.precision_score(unsafe, removed))
        assert data.labels.false_positive_rate[at] == pytest.approx(removed[~unsafe].mean())


@pytest.mark.parametrize("recall", [0.5, 0.95, 1.0])
def test_the_threshold_for_a_recall_is_the_highest_that_has_it(labelled, recall):
    scores, unsafe = labelled
    threshold = report_data(scores, unsafe).threshold_for(recall)
    assert (scores[unsafe] >= threshold).mean() >= recall
    assert (scores[unsafe] >= threshold + 1 / NUM_BINS).mean() < recall


def test_shards_stand_out_when_chance_does_not_explain_them():
    usual = [ShardCounts(f"s{i}", 1000, 10 + i % 5, 100) for i in range(20)]
    odd, small = ShardCounts("odd", 1000, 12, 400), ShardCounts("small", 5, 0, 2)
    found = outliers([*usual, odd, small], "num_high")
    assert found[0][0] is odd
    assert small not in [shard for shard, *_ in found]
    assert outliers([*usual, odd, small], "num_failed") == []


def test_throughput_is_of_the_time_between_the_files():
    shards = [ShardCounts("a", 500, 0, 0, 100.0), ShardCounts("b", 300, 0, 0, 110.0),
              ShardCounts("c", 200, 0, 0, 120.0)]  # fmt: skip
    assert images_per_second(shards) == pytest.approx(25.0)
    assert images_per_second(shards[:1]) is None


@pytest.fixture(scope="module")
def page(labelled):
    """A page with all its parts, names that are hard on a layout, and real images."""
    scores, unsafe = labelled
    pictures = [
        encode_jpeg(decode_image(encode(p), 160))
        for p, _ in zip(photographs(seed=5), range(12), strict=False)
    ]
    thumbnails = [
        Thumbnail("a/very/long/" + "shard_name" * 8, f"{i:09}", i / 12, picture)
        for i, picture in enumerate(pictures)
    ]
    thumbnails.append(Thumbnail("<script>", "'\"><script>", 0.99, None))
    odd = ShardCounts("another/" + "long" * 30, 100, 60, 70, 1e9 + 4000)
    data = report_data(
        scores,
        unsafe,
        source="/data/" + "metadata" * 20,
        shards=[*report_data(scores).shards, odd],
        thumbnails=thumbnails,
        notes=[{"version": "1", "sha256": "0" * 200}, {"version": "2"}],
    )
    return render(data)


def test_the_page_needs_no_network_and_runs_no_script(page):
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page.replace("xlink:", "")) == []
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(page) < 1_000_000


#: Loads the page in a frame of a phone's or a desktop's width, and says what it finds.
_PROBE = """<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;width:%dpx;
height:3000px" srcdoc="%s"></iframe><pre id="found"></pre><script>
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, width = page.documentElement.clientWidth;
  const blur = image => view.getComputedStyle(image).filter;
  const images = [...page.images];
  const before = images.map(blur);
  page.querySelector('.sample').click();
  const inScroll = e => e.closest('.scroll') !== null;
  found.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth - width,
    over: [...page.querySelectorAll('main *')].filter(e => !inScroll(e) && !e.closest('svg')
      && !e.closest('.frame') && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80)),
    loaded: images.filter(i => i.naturalWidth > 0).length,
    before, after: images.map(blur)});
};
</script>"""  # noqa: E501


@pytest.fixture(scope="module")
def chromium():
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("needs Chromium to look at the page with")
    return [
        path,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ]


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
def test_the_page_in_a_browser(page, chromium, tmp_path, name, width):
    probe = tmp_path / f"{name}.html"
    probe.write_text(_PROBE % (width, html.escape(page, quote=True)), "utf-8")
    profile = f"--user-data-dir={tmp_path}/profile"
    dump = subprocess.run(
        [*chromium, profile, "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dump, re.DOTALL)[1]))
    assert (found["width"], found["over"]) == (0, [])
    assert found["loaded"] == 12
    assert all(blur.startswith("blur(") for blur in found["before"])
    assert found["after"][0] == "none"
    assert found["after"][1:] == found["before"][1:]

    picture = tmp_path / f"{name}.png"
    screenshot = [f"--screenshot={picture}", f"--window-size={max(width, 500)},3000"]
    subprocess.run(
        [*chromium, profile, "--hide-scrollbars", *screenshot, probe.as_uri()],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(picture).convert("RGB"))[:, :width]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # it shows charts and photographs


def write_metadata(directory, shards):
    """Metadata as the job writes it, of shards by name."""
    for shard, frame in shards.items():
        (directory / f"shard={shard}").mkdir(parents=True)
        frame.to_parquet(directory / f"shard={shard}" / "part-0.parquet")


def test_the_command_counts_what_the_metadata_holds(spark, labelled, tmp_path, capsys):
    scores, unsafe = labelled
    picture = encode(next(photographs()), quality=90)
    keys = [f"{i:06}" for i in range(2500)]
    frames = {
        name: pd.DataFrame({
            "key": keys, "status": "ok", "nsfw_score": scores[part].astype("float32"),
            "is_unsafe": unsafe[part].astype(int),
        })
        for name, part in (("x-1", slice(0, 2500)), ("x-2", slice(2500, 5000)))
    }  # fmt: skip
    frames["x-2"].loc[:9, ["status", "nsfw_score"]] = ["image_missing", None]
    write_metadata(tmp_path / "metadata", frames)
    for name in frames:
        write_shard(
            tmp_path / "in" / f"{name}.tar", ((key, [("jpg", picture)]) for key in keys[:2000])
        )
    output = tmp_path / "report.html"
    command = ["report", str(tmp_path / "metadata"), "-o", str(output)]
    full = [*command, "--shards", str(tmp_path / "in"), "--label-column=is_unsafe", "--recall=0.9"]
    assert main(full) == 0
    page = output.read_text("utf-8")
    kept = np.delete(scores, slice(2500, 2510)).astype(np.float32)
    unsafe = np.delete(unsafe, slice(2500, 2510))
    assert ">4,990</b>samples scored" in page
    assert f"<b>{(kept < 0.5).mean():.2%}</b>kept below 0.5" in page
    assert re.search(r"image_missing</td><td class=\"number\">10<", page)
    threshold = float(re.search(r'class="wanted">([0-9.]+)<', page)[1])
    assert (kept[unsafe] >= threshold).mean() >= 0.9
    assert (kept[unsafe] >= threshold + 2 / NUM_BINS).mean() < 0.9
    assert page.count('<img alt="sample') + page.count("not readable") == 80
    assert 40 < page.count('<img alt="sample') < 80  # a fifth is not in the shards

    assert main(command) == 0  # in place of the older report
    plain = output.read_text("utf-8")
    assert "<img" not in plain
    assert "Against the labels" not in plain
    assert main([*command, "--label-column=nope"]) == 2
    assert "no column 'nope'" in capsys.readouterr().err
    assert output.read_text("utf-8") == plain
    assert {path.name for path in tmp_path.iterdir()} == {"in", "metadata", "report.html"}


def test_a_page_that_cannot_be_drawn_leaves_the_older_one(labelled, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(str(path), report_data(labelled[0]))
    before = path.read_bytes()
    refuse_page_file(str(path), [])
    with pytest.raises(AttributeError):
        write_page(str(path), report_data(labelled[0], num_by_status=None))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"report.html": before}


def test_without_the_libraries_the_remedy_is_named(labelled, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'spark-nsfw\[report\]'"):
        render(report_data(labelled[0]))


def test_a_thumbnail_is_a_jpeg_of_what_the_tower_sees(jpegs):
    pixels = decode_image(jpegs[0], 160)
    again = np.asarray(Image.open(io.BytesIO(encode_jpeg(pixels))))
    assert again.shape == (160, 160, 3)
    assert np.abs(again.astype(int) - pixels).mean() < 8
