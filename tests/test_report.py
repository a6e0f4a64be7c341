"""The report: its numbers against scikit-learn, its page in a real browser."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from scipy import stats
from sklearn import metrics

from examples.photographs import encode, photographs, write_shard
from spark_nsfw import SampleOptions, iter_sample_batches
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError
from spark_nsfw.note import inspect_output
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.spark.output import with_note
from spark_nsfw.spark.report import SparkRows, collect_report
from spark_nsfw.spark.thumbnails import draw_thumbnails
from spark_nsfw.use.agreement import (
    Agreement,
    ContestedSample,
    Decisions,
    most_contested,
    rank_correlations,
)
from spark_nsfw.use.collect import collect
from spark_nsfw.use.local_rows import small_rows
from spark_nsfw.use.page import refuse_page_file, render, write_page
from spark_nsfw.use.report import (
    NUM_BINS,
    LabelCounts,
    ReportData,
    ScoreCounts,
    ShardCounts,
    Thumbnail,
    images_per_second,
    outliers,
)
from spark_nsfw.use.thresholds import (
    SHARES_KEPT,
    LabelThreshold,
    fewest_digits_that_keep,
    significant,
    thresholds_above,
    thresholds_below,
)
from spark_nsfw.use.thumbnails import samples_by_unit, thumbnails


@pytest.fixture(scope="module")
def labelled():
    """Scores in the middle of their bins, and whether each is of an unsafe sample."""
    generator = np.random.default_rng(1)
    unsafe = generator.random(5000) < 0.2
    scores = np.where(unsafe, generator.beta(5, 2, 5000), generator.beta(1, 8, 5000))
    return (np.floor(scores * NUM_BINS) + 0.5) / NUM_BINS, unsafe


def counts_of(scores):
    return np.histogram(scores, NUM_BINS, (0, 1))[0]


def score_counts(scores, column="nsfw_score", threshold=0.5):
    total = len(scores)
    found = [
        fewest_digits_that_keep(
            wanted, total, [(t, int((scores < t).sum())) for t in thresholds_above(quantile)]
        )
        for wanted in SHARES_KEPT
        for quantile in [np.quantile(scores, wanted, method="inverted_cdf")]
    ]
    high = int((scores >= threshold).sum())
    return ScoreCounts(column, 0.0, 1.0, counts_of(scores), threshold, high, found)


def report_data(scores, unsafe=None, **more):
    labels = None
    if unsafe is not None:
        labels = LabelCounts("is_unsafe", counts_of(scores[unsafe]), counts_of(scores[~unsafe]))
    given = {
        "source": "/data/metadata",
        "score": score_counts(scores),
        "num_by_status": {"ok": len(scores), "image_undecodable": 37},
        "shards": [ShardCounts(f"{i:05}", 100, 1, 8, 1e9 + 60 * i) for i in range(50)],
    }
    return ReportData(**given | {"labels": labels} | more)


def collect_twice(spark, metadata, **asked):
    """What Spark counts; in memory it is the same."""
    counted = collect_report(spark, metadata, **asked)
    notes = inspect_output(metadata)
    footers = [footer for of_note in notes.values() for footer in of_note]
    rows = small_rows(footers, asked.get("score_column"), asked.get("label_column"))
    in_memory = collect(rows, metadata, list(notes), **asked)
    np.testing.assert_equal(asdict(in_memory), asdict(counted))
    return counted


def test_what_a_threshold_keeps_is_what_is_below_it(labelled):
    scores, _ = labelled
    data = score_counts(scores)
    for threshold in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert data.share_kept[data.at(threshold)] == pytest.approx((scores < threshold).mean())


def test_precision_recall_and_roc_are_scikit_learns(labelled):
    scores, unsafe = labelled
    data = report_data(scores, unsafe)
    assert data.labels.area_under_roc == pytest.approx(metrics.roc_auc_score(unsafe, scores))
    for threshold in (0.05, 0.3, 0.7):
        removed, at = scores >= threshold, data.score.at(threshold)
        assert data.labels.recall[at] == pytest.approx(metrics.recall_score(unsafe, removed))
        assert data.labels.precision[at] == pytest.approx(metrics.precision_score(unsafe, removed))
        assert data.labels.false_positive_rate[at] == pytest.approx(removed[~unsafe].mean())


@pytest.mark.parametrize("recall", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_threshold_for_a_recall_is_the_highest_that_has_it(
    spark, labelled, tmp_path, recall, scale
):
    scores, unsafe = (labelled[0] * scale).astype(np.float32), labelled[1]
    keys = [f"{i:06}" for i in range(len(scores))]
    rows = {"key": keys, "status": "ok", "nsfw_score": scores, "is_unsafe": unsafe}
    write_metadata(tmp_path / "metadata", {"x-1": pd.DataFrame(rows)})
    found = collect_twice(
        spark, str(tmp_path / "metadata"), label_column="is_unsafe", wanted_recall=recall
    ).wanted
    removed = scores >= found.value
    assert (scores[unsafe] >= found.value).mean() >= recall
    assert (scores[unsafe] >= found.value + 1 / NUM_BINS).mean() < recall
    assert found.recall == pytest.approx(metrics.recall_score(unsafe, removed))
    assert found.precision == pytest.approx(metrics.precision_score(unsafe, removed))
    assert found.false_positive_rate == pytest.approx(removed[~unsafe].mean())
    if recall < 1:
        assert 0 < found.value < scale


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123, "0.000123"), (0.5, "0.5"), (0.00012345, "0.000123"), (0.0, "0"), (1, "1"),
        (0.9996, "0.9996"), (0.12346, "0.1235"), (6.25, "6.25"), (1.2345e-8, "1.23e-08"),
        (-0.5, "-0.5"),
    ],
)  # fmt: skip
def test_a_number_keeps_its_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize("value", [0.0, 4.48e-6, 0.3, 0.99961, 5.25, -0.25, -3.2, 9.999, 123456.0])
@pytest.mark.parametrize("number", [float, np.float32])
def test_thresholds_are_just_above_or_below_a_score_in_few_digits(value, number):
    value = float(number(value))
    above, below = thresholds_above(value), thresholds_below(value)
    assert above == sorted(above, reverse=True)
    assert below == sorted(below)
    assert all(low <= value < high for low, high in zip(below, above, strict=True))
    assert max(abs(above[-1] - value), abs(below[-1] - value)) <= abs(value) * 1e-8 + 1e-12
    assert max(abs(above[0] - value), abs(below[0] - value)) <= abs(value) / 100 + 1e-12
    assert all(float(significant(t, 9)) == t for t in above + below)


def test_a_threshold_that_keeps_a_share_is_short_and_keeps_hardly_more():
    scores = np.random.default_rng(3).beta(1, 30, 10_000)
    for wanted in SHARES_KEPT:
        quantile = np.quantile(scores, wanted, method="inverted_cdf")
        candidates = [(t, int((scores < t).sum())) for t in thresholds_above(quantile)]
        found = fewest_digits_that_keep(wanted, 10_000, candidates)
        assert (scores < found.value).sum() == found.num_kept
        assert wanted <= found.num_kept / 10_000 <= wanted + (1 - wanted) / 50 + 1e-4
    tied = [(t, int((t > 0.25) * 100)) for t in thresholds_above(0.25)]
    assert fewest_digits_that_keep(0.5, 100, tied).value == 0.251


def test_ranks_are_compared_as_scipy_compares_them():
    generator = np.random.default_rng(2)
    scores = pd.DataFrame({"a": generator.random(500).round(1), "b": generator.random(500)})
    scores["c"] = scores["a"] ** 3 + scores["b"].round(1)
    scores["d"] = 0.5
    columns = ["a", "b", "c"]
    expected = stats.spearmanr(scores[columns]).statistic
    assert rank_correlations(scores, columns) == pytest.approx(expected)
    assert np.isnan(rank_correlations(scores, ["a", "d"])[0, 1])


def test_the_most_contested_samples_are_those_whose_ranks_differ_most():
    scores = pd.DataFrame({
        "shard": "s", "key": ["p", "q", "r", "s", "t"],
        "a": [0.1, 0.2, 0.3, 0.4, 0.9], "b": [50.0, 2.0, 3.0, 4.0, 1.0],
    })  # fmt: skip
    high, low = most_contested(scores, ["a", "b"], 3)
    assert [sample.key for sample in high] == ["t"]
    assert [sample.key for sample in low] == ["p"]
    assert (high[0].high_column, high[0].low_column) == ("a", "b")
    assert (high[0].high_score, high[0].low_score) == (0.9, 1.0)
    assert (high[0].high_rank, high[0].low_rank) == (1.0, 0.0)
    assert most_contested(scores.assign(b=scores["a"]), ["a", "b"], 3) == []


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


OTHER = "another_detectors_score"

NOTE = {
    "version": "1",
    "sha256": "0" * 200,
    "embedder": {"model_name": "test_vit2", "weights": {"source": "random (seed 0)"}},
    "classifiers": [
        {
            "classifier": "NsfwClassifier",
            "variant": "laion",
            "pred_column": "nsfw_score",
            "weights": {"source": "/models/detector.zip", "sha256": "905520bb0336" + "0" * 52},
        }
    ],
}


def agreement(pictures):
    contested = [
        [
            ContestedSample(
                "a/very/long/" + "shard_name" * 8, f"{i:09}", *order, 0.9, 4e-5, 1, 0, p
            )
            for i, p in enumerate(pictures[:4])
        ]
        for order in [("nsfw_score", OTHER), (OTHER, "nsfw_score")]
    ]
    correlations = np.array([[1, 0.25], [0.25, 1]])
    decisions = [Decisions("nsfw_score", OTHER, 5000, 321, 12)]
    columns = ["nsfw_score", OTHER]
    return Agreement(columns, correlations, 200_123, 5_000_000, decisions, contested)


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
        notes=[NOTE, {"version": "2"}],
        wanted=LabelThreshold(0.000123, 0.95, 0.5, 0.1),
        others=[score_counts(scores**2, OTHER)],
        agreement=agreement(pictures),
    )
    return render(data)


def test_the_page_says_at_the_top_what_made_the_scores(page):
    top = re.sub(r"<[^>]+>", "", page[page.index("<h1>") : page.index('class="facts"')])
    assert "These scores mean nothing: the weights of the tower test_vit2 are random." in top
    assert "nsfw_score is by the detector NsfwClassifier laion (weights: detector.zip, " in top
    assert "sha256 905520bb0336…)" in top
    assert f"Nothing in the files tells which detector made {OTHER}." in top


def test_weights_of_a_file_raise_no_alarm(labelled):
    tower = {"model_name": "ViT-L-14", "weights": {"source": "x.pt", "sha256": "b8cca3fd41ae00"}}
    page = render(report_data(labelled[0], notes=[NOTE | {"embedder": tower}]))
    assert "mean nothing" not in page
    assert "Embeddings are by the tower ViT-L-14 (weights: x.pt, sha256 b8cca3fd41ae…)." in page
    assert "detectors agree" not in page  # there is one


def test_the_page_shows_how_the_detectors_agree(page):
    section = page[page.index("How the detectors agree") :].replace("<wbr>", "")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))
    assert "on a sample: 200,123 of the 5,000,000 images that have every score" in text
    assert "nsfw_score 1.000 0.250" in text
    assert "the two decide differently 333 6.66%" in text
    assert "321 6.42%" in text
    assert f"High by nsfw_score, low by {OTHER}" in text
    assert "0.9 (100%) / 0.00004 (0%)" in text


def test_a_small_threshold_is_not_shown_as_zero(page):
    assert '<b class="wanted">0.000123</b>' in page
    small = render(report_data(np.random.default_rng(4).beta(1, 8, 5000) * 1e-4))
    shown = re.findall(r'threshold">([^<]+)<', small)
    assert len(shown) == 5
    assert all(0 < float(threshold) < 1e-4 for threshold in shown)
    assert len(set(shown)) == 5


def test_quantiles_are_called_exact_only_where_they_are(labelled):
    score = score_counts(labelled[0])
    assert "come from exact quantiles" in render(report_data(labelled[0]))
    many = replace(score, counts=score.counts * 50)
    assert "come from approximate quantiles" in render(report_data(labelled[0], score=many))


def test_hardly_any_is_not_none_and_nearly_all_not_all(labelled):
    score = score_counts(labelled[0])
    many = replace(score, counts=score.counts * 1000, num_high=3)
    assert "<b>&gt; 99.99%</b>kept below 0.5" in render(report_data(labelled[0], score=many))
    many = replace(many, num_high=many.num_scored - 3)
    assert "<b>&lt; 0.01%</b>kept below 0.5" in render(report_data(labelled[0], score=many))


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
    assert found["loaded"] == 12 + 8
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


@pytest.fixture(scope="module")
def three_scores(spark, tmp_path_factory):
    """An output of 600 samples with three scores, two of which are far from 0 to 1."""
    directory = tmp_path_factory.mktemp("three")
    generator = np.random.default_rng(7)
    nsfw = generator.beta(1, 8, 600).astype("float32")
    frame = pd.DataFrame({
        "shard": np.repeat(["x-1", "x-2"], 300), "key": [f"{i:06}" for i in range(300)] * 2,
        "status": "ok", "width": np.float32(5), "embedding_norm": np.float32(9),
        "other_score": (nsfw + generator.normal(0, 0.05, 600)).clip(0, 1).astype("float32"),
        "nsfw_score": nsfw, "aesthetic_score": (1 + 8 * generator.random(600)).astype("float32"),
    })  # fmt: skip
    scores = ["other_score", "nsfw_score", "aesthetic_score"]
    frame.loc[0, ["status", *scores]] = ["image_missing", None, None, None]
    frame.loc[1, "other_score"] = None
    picture = encode(next(photographs()), quality=90)
    for shard, some in frame.groupby("shard"):
        members = ((key, [("jpg", picture)]) for key in some["key"])
        write_shard(directory / "in" / f"{shard}.tar", members)
        batches = iter_sample_batches(
            [(str(directory / "in" / f"{shard}.tar"), shard)], SampleOptions(images=False)
        )
        places = pa.Table.from_batches(batches).to_pandas()[["image_offset", "image_num_bytes"]]
        frame.loc[some.index, places.columns] = places.to_numpy()
    frame = frame.astype(dict.fromkeys(places.columns, "int64"))
    plain = spark.createDataFrame(frame.astype(object).where(frame.notna(), None), _SCHEMA)
    rows = with_note(plain, [*scores, "embedding_norm"], NOTE)
    rows.write.partitionBy("shard").parquet(str(directory / "metadata"))
    return directory, frame[2:]


_SCHEMA = (
    "shard string, key string, status string, width float, embedding_norm float, "
    "other_score float, nsfw_score float, aesthetic_score float, image_offset bigint, "
    "image_num_bytes bigint"
)


def test_every_score_column_is_shown_and_compared(spark, three_scores):
    directory, frame = three_scores
    data = collect_twice(
        spark, str(directory / "metadata"), threshold=0.2, other_thresholds={"aesthetic_score": 6}
    )
    assert data.score.column == "nsfw_score"
    assert [score.column for score in data.others] == ["other_score", "aesthetic_score"]
    assert [(s.low, s.high) for s in data.others] == [(0, 1), (1, 9)]
    assert [s.threshold for s in (data.score, *data.others)] == [0.2, 0.5, 6]
    columns = ["nsfw_score", "other_score", "aesthetic_score"]
    assert data.agreement.columns == columns
    assert (data.agreement.num_ranked, data.agreement.num_images) == (598, 598)
    expected = stats.spearmanr(frame[columns]).statistic
    assert data.agreement.correlations == pytest.approx(expected)
    high = frame[columns] >= [0.2, 0.5, 6]
    for found in data.agreement.decisions:
        one, other = high[found.first], high[found.second]
        assert found.share_differing == pytest.approx((one != other).mean(), abs=2e-3)
    for score in (data.score, *data.others):
        values = frame[score.column].to_numpy(np.float64)
        for found in score.share_thresholds:
            share = (values < found.value).mean()
            assert share == pytest.approx(found.num_kept / score.num_scored, abs=2e-3)
            assert found.wanted <= found.num_kept / score.num_scored
    ranks = frame[columns].rank()
    difference = (ranks["nsfw_score"] - ranks["other_score"]).sort_values(ascending=False)
    first = frame.loc[difference.index[:8]]
    assert [(s.shard, s.key) for s in data.agreement.contested[0]] == list(
        zip(first["shard"], first["key"], strict=True)
    )


def test_samples_of_score_bands_and_their_images_are_the_same_with_and_without_spark(
    spark, three_scores
):
    directory, frame = three_scores
    source = ShardSource(ShardInputs.parse(str(directory / "in")))
    data = collect_report(spark, str(directory / "metadata"), source=source)
    notes = inspect_output(str(directory / "metadata"))
    rows = small_rows([footer for of_note in notes.values() for footer in of_note])
    samples = rows.band_samples("nsfw_score", 0.0, 1.0, 8)
    assert [replace(each, jpeg=None) for each in data.thumbnails] == samples
    bands = np.floor(frame["nsfw_score"].astype(float) * 10).astype(int)
    assert len(samples) == bands.value_counts().clip(upper=8).sum()
    shown = [(each.shard, each.key) for each in samples]
    assert rows.locations([]) == {}
    places = rows.locations(shown)
    assert places.keys() == {*shown}
    assert places == SparkRows(spark.read.parquet(str(directory / "metadata"))).locations(shown)
    shards = samples_by_unit(shown, source, places)
    drawn = thumbnails(shards, source)
    assert drawn == draw_thumbnails(spark, shards, source)
    assert drawn == thumbnails(samples_by_unit(shown, source, {}), source)
    assert [each.jpeg for each in data.thumbnails] == [drawn[sample] for sample in shown]
    assert len(drawn) == len(shown)


def test_the_command_needs_no_java_for_a_small_output(three_scores, tmp_path):
    directory, _ = three_scores
    output = tmp_path / "report.html"
    command = [sys.executable, "-m", "spark_nsfw.cli", "report", directory / "metadata"]
    shards = ["--shards", directory / "in"]
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path)}  # no Java, so no Spark
    subprocess.run([*command, "-o", output, *shards], check=True, env=environment)
    assert output.read_text("utf-8").count('<img alt="sample') > 40


def test_a_large_output_is_counted_by_spark(three_scores, monkeypatch):
    directory, _ = three_scores
    notes = inspect_output(str(directory / "metadata"))
    footers = [footer for of_note in notes.values() for footer in of_note]
    num_rows = sum(footer.num_rows for footer in footers)
    monkeypatch.setattr("spark_nsfw.use.local_rows._MAX_ROWS", num_rows)
    assert small_rows(footers) is not None
    assert small_rows(footers, label_column="key") is None  # a text
    monkeypatch.setattr("spark_nsfw.use.local_rows._MAX_ROWS", num_rows - 1)
    assert small_rows(footers) is None
    monkeypatch.undo()
    monkeypatch.setattr("spark_nsfw.use.local_rows._MAX_FILES", len(footers) - 1)
    assert small_rows(footers) is None


def test_a_score_at_the_threshold_is_removed(spark, tmp_path):
    rows = {"key": list("abcd"), "status": "ok", "is_unsafe": [True, False, True, True]}
    scores = np.array([0.25, 0.5, 0.5, 0.75], np.float32)
    write_metadata(tmp_path / "metadata", {"x": pd.DataFrame(rows | {"nsfw_score": scores})})
    data = collect_twice(
        spark, str(tmp_path / "metadata"), threshold=0.5, label_column="is_unsafe",
        wanted_recall=0.6,
    )  # fmt: skip
    assert data.score.num_high == 3
    assert [shard.num_high for shard in data.shards] == [3]
    assert (data.wanted.value, data.wanted.recall, data.wanted.precision) == (0.5, 2 / 3, 2 / 3)
    assert data.wanted.false_positive_rate == 1


def test_of_more_images_a_sample_is_ranked(spark, three_scores, monkeypatch):
    directory, frame = three_scores
    monkeypatch.setattr("spark_nsfw.use.collect.MAX_RANKED", 200)
    agreement = collect_twice(spark, str(directory / "metadata")).agreement
    assert agreement.num_images == len(frame)
    assert 150 < agreement.num_ranked < 250
    expected = stats.spearmanr(frame[list(agreement.columns)]).statistic
    assert agreement.correlations == pytest.approx(expected, abs=0.15)
    (nsfw_and_other, *_) = agreement.decisions
    assert nsfw_and_other.num_images == len(frame)


def test_the_command_shows_any_score_column(spark, three_scores, tmp_path, capsys):
    directory, _ = three_scores
    output = tmp_path / "report.html"
    command = ["report", str(directory / "metadata"), "-o", str(output)]
    chosen = ["--score-column=aesthetic_score", "--threshold=6", "--threshold=nsfw_score=0.2"]
    assert main([*command, *chosen, "--shards", str(directory / "in")]) == 0
    page = output.read_text("utf-8")
    assert "<h1>aesthetic_score</h1>" in page
    assert "kept below 6</div>" in page
    assert "nsfw_<wbr>score <b>0.2</b>" in page
    assert page.count("<h2>Scores and thresholds of ") == 3
    assert page.count("Where decisions differ") == 1
    assert "Samples that two detectors rank most differently" in page
    assert page.count('class="band contested"') == 4
    assert page.count('<img alt="sample') == 10 * 8 + 4 * 8
    for unknown in ["width=0.5", "embedding_norm=0.5"]:
        assert main([*command, f"--threshold={unknown}"]) == 2
        assert "--threshold" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--threshold=high"])
    assert "'high' is neither a score nor NAME=SCORE" in capsys.readouterr().err


def test_without_nsfw_score_the_first_score_is_the_main_one(spark, three_scores, tmp_path, capsys):
    directory, _ = three_scores
    rows = spark.read.parquet(str(directory / "metadata")).drop("nsfw_score")
    rows.write.partitionBy("shard").parquet(str(tmp_path / "metadata"))
    data = collect_twice(spark, str(tmp_path / "metadata"))
    assert data.score.column == "other_score"
    rows.select("shard", "key", "status").write.parquet(str(tmp_path / "none"))
    command = ["report", str(tmp_path / "none"), "-o", str(tmp_path / "report.html")]
    assert main(command) == 2
    assert "--score-column" in capsys.readouterr().err


def test_a_page_that_cannot_be_drawn_leaves_the_older_one(labelled, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(str(path), report_data(labelled[0]))
    before = path.read_bytes()
    refuse_page_file(str(path), [])
    with pytest.raises(AttributeError):
        write_page(str(path), report_data(labelled[0], num_by_status=None))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"report.html": before}


def test_without_the_libraries_the_remedy_is_named(labelled, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'spark-nsfw\[report\]'"):
        render(report_data(labelled[0]))


def test_a_thumbnail_is_a_jpeg_of_what_the_tower_sees(jpegs):
    pixels = decode_image(jpegs[0], 160)
    again = np.asarray(Image.open(io.BytesIO(encode_jpeg(pixels))))
    assert again.shape == (160, 160, 3)
    assert np.abs(again.astype(int) - pixels).mean() < 8
