import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from spark_nsfw import (
    ImageClassifier,
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_batches,
)
from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.schema import metadata_schema


def all_shards(directory):
    return [
        (str(path), path.relative_to(directory).with_suffix("").as_posix())
        for path in sorted(directory.rglob("*.tar"))
    ]


def score(scorer, directory, **options):
    batches = iter_sample_batches(all_shards(directory), SampleOptions(**options))
    return pa.Table.from_batches(scorer.score(batches))


@pytest.fixture(scope="module")
def expected(shards, detector_path):
    """The rows, one image at a time through the public calls for images and embeddings."""
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768)
    classifier = NsfwClassifier(model_path=detector_path)
    rows = []
    for path, name in all_shards(shards):
        for sample in iter_samples(path):
            image = next(
                (v for k, v in sample.members.items() if k in ("jpg", "png", "webp")), None
            )
            try:
                if sample.status != "ok":
                    raise ValueError(sample.status)
                embedding = embedder.embed([image], device="cpu")
                rows.append(
                    (name, sample.key, embedding[0], classifier.classify(embedding, "cpu")[0])
                )
            except Exception:
                rows.append((name, sample.key, None, None))
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 8, 64])
@pytest.mark.parametrize("batch_rows", [3, 256])
def test_every_sample_is_a_row_in_order_whatever_the_batches(
    shards, embedder, expected, batch_size, batch_rows
):
    embedder.batch_size = batch_size
    table = score(Scorer(embedder, device="cpu"), shards, batch_rows=batch_rows)
    assert table["shard"].to_pylist() == [row[0] for row in expected]
    assert table["key"].to_pylist() == [row[1] for row in expected]
    for row, (_, key, embedding, nsfw_score) in zip(table.to_pylist(), expected, strict=True):
        assert (row["status"] == "ok") == (embedding is not None), key
        assert (row["error_message"] is None) == (embedding is not None), key
        if embedding is None:
            assert (row["image_embedding"], row["nsfw_score"]) == (None, None)
        else:
            assert np.array_equal(np.float32(row["image_embedding"]), embedding), key
            assert row["nsfw_score"] == nsfw_score, key


def test_damaged_samples_get_their_status(shards, embedder):
    table = score(Scorer(embedder, device="cpu"), shards)
    found = {
        (row["shard"], row["key"]): row["status"]
        for row in table.to_pylist()
        if row["status"] != "ok"
    }
    cut = next(key for shard, key in found if shard == "00003" and key)
    assert found == {
        ("00003", cut): "member_truncated",
        ("00003", None): "shard_truncated",
        ("odd/00000", "cut_in_half"): "image_undecodable",
        ("odd/00000", "empty_file"): "image_undecodable",
        ("odd/00000", "not_an_image"): "image_undecodable",
        ("odd/00000", "caption_only"): "image_missing",
        ("odd/00000", "two_images"): "member_duplicated",
        ("odd/00000", "too_many_pixels"): "image_oversized",
    }


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_do_not_change_a_bit(shards, embedder, num_threads):
    embedder.num_threads_per_worker = num_threads
    one = score(Scorer(embedder, device="cpu"), shards)
    embedder.num_threads_per_worker = 3
    assert one.equals(score(Scorer(embedder, device="cpu"), shards))


def test_the_schema_is_the_declared_one(shards, embedder):
    options = SampleOptions(captions=True)
    scorer = Scorer(embedder, device="cpu")
    (first, *_) = scorer.score(iter_sample_batches(all_shards(shards)[:1], options))
    assert first.schema.equals(metadata_schema(options.schema, scorer.result_fields))
    assert first.schema.field("image_embedding").type == pa.list_(pa.float32())
    assert first.schema.field("nsfw_score").type == pa.float32()


def test_embeddings_can_be_left_out(shards, embedder):
    table = score(Scorer(embedder, device="cpu", keep_embeddings=False), shards)
    assert "image_embedding" not in table.column_names
    assert table["nsfw_score"].null_count == 8


def test_an_empty_input_gives_nothing(embedder):
    assert list(Scorer(embedder, device="cpu").score([])) == []


class SumClassifier(ImageClassifier):
    def __init__(self):
        super().__init__("x", pred_column="x")

    def load_model(self, device):
        return lambda embeddings: embeddings.sum(dim=1)


def test_several_classifiers_share_one_pass(shards, embedder):
    embedder.classifiers = (*embedder.classifiers, SumClassifier())
    table = score(Scorer(embedder, device="cpu"), shards)
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    sums = [np.float32(row["image_embedding"]).sum() for row in rows]
    assert np.allclose([row["x"] for row in rows], sums, atol=1e-5)


def test_an_embedding_that_is_not_finite_is_no_score(shards, embedder, expected):
    tower = embedder.tower("cpu")
    tower.network.head.bias += float("nan")
    table = score(Scorer(embedder, device="cpu"), shards)
    scored = sum(embedding is not None for _, _, embedding, _ in expected)
    assert table["status"].to_pylist().count("embedding_invalid") == scored > 30
    assert table["nsfw_score"].null_count == table["image_embedding"].null_count == len(table)


def test_two_results_in_one_column_are_refused(embedder, detector_path):
    twice = [NsfwClassifier(model_path=detector_path)] * 2
    with pytest.raises(InputError, match="nsfw_score, nsfw_score"):
        Scorer(embedder, twice)


def test_a_classifier_for_another_width_is_refused_before_any_work(detector_path):
    with pytest.raises(EmbeddingWidthError, match=r"768.*32"):
        Scorer(
            TimmImageEmbedder("test_vit2", embedding_size=32),
            [NsfwClassifier(model_path=detector_path)],
        )


def test_a_closed_generator_stops_its_threads(shards, embedder):
    before = threading.active_count()
    rows = Scorer(embedder, device="cpu").score(
        iter_sample_batches(all_shards(shards), SampleOptions(batch_rows=2))
    )
    next(rows)
    assert threading.active_count() > before
    rows.close()
    assert threading.active_count() == before


def test_an_error_of_the_source_comes_through_and_stops_the_threads(shards, embedder):
    def failing():
        yield from iter_sample_batches(all_shards(shards)[:1], SampleOptions(batch_rows=2))
        raise OSError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        list(Scorer(embedder, device="cpu").score(failing()))
    assert threading.active_count() == before


def test_jpegs_take_the_fast_way(shards, embedder, monkeypatch):
    def pillow(*_):
        raise AssertionError("a colour JPEG went to pillow")

    monkeypatch.setattr("spark_nsfw.score.pixels.Image.open", pillow)
    batches = iter_sample_batches(all_shards(shards)[:2], SampleOptions())
    table = pa.Table.from_batches(Scorer(embedder, device="cpu").score(batches))
    assert table["status"].to_pylist() == ["ok"] * 22


def test_an_error_in_a_decoding_thread_is_the_tasks_error_not_a_hang(shards, embedder, monkeypatch):
    def out_of_memory(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("spark_nsfw.score.pipeline.decode_once", out_of_memory)
    with pytest.raises(MemoryError, match="no room"):
        score(Scorer(embedder, device="cpu"), shards)


def test_decoding_runs_ahead_but_not_away(shards, embedder):
    """The source is asked for a few device batches more than are done, whatever its length."""
    asked = 0

    def endless():
        nonlocal asked
        while True:
            for batch in iter_sample_batches(all_shards(shards)[:1], SampleOptions(batch_rows=4)):
                asked += batch.num_rows
                yield batch

    scorer = Scorer(embedder, device="cpu")
    bound = (scorer.passes.num_threads + 4) * scorer.passes.batch_size
    rows = scorer.score(endless())
    done = 0
    for _ in range(30):
        done += next(rows).num_rows
        time.sleep(0.001)
        assert asked - done <= bound
    rows.close()


@pytest.mark.parametrize("fitting", [1, 3, 6])
def test_a_batch_that_does_not_fit_into_memory_is_halved(shards, embedder, expected, fitting):
    scorer = Scorer(embedder, device="cpu")
    tower = embedder.tower("cpu")
    sizes = []

    def small_tower(pixels):
        sizes.append(len(pixels))
        if len(pixels) > fitting:
            raise torch.cuda.OutOfMemoryError("no room")
        return tower.with_norms(pixels)

    embedder._towers["cpu"] = SimpleNamespace(with_norms=small_tower)
    table = score(scorer, shards)
    scores = [row[3] for row in expected]
    assert table["nsfw_score"].to_pylist() == [None if s is None else float(s) for s in scores]
    assert scorer.passes.fitting_batch_size <= fitting < 2 * scorer.passes.fitting_batch_size
    # it is found once, by the threads that run into it together, not for each batch
    assert sum(size > fitting for size in sizes) <= 3 * scorer.passes.num_threads


def test_one_image_that_does_not_fit_is_an_error(shards, embedder):
    def no_tower(pixels):
        raise torch.cuda.OutOfMemoryError("no room")

    embedder._towers["cpu"] = SimpleNamespace(with_norms=no_tower)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        score(Scorer(embedder, device="cpu"), shards)


def test_a_want_of_memory_that_passes_teaches_nothing_about_a_rest(shards, embedder, expected):
    """A batch that is not full is tried again, alone, and the size of the full ones stays."""
    scorer = Scorer(embedder, device="cpu")
    tower = embedder.tower("cpu")
    sizes = []

    def busy_tower(pixels):
        sizes.append(len(pixels))
        if len(sizes) == 1:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return tower.with_norms(pixels)

    embedder._towers["cpu"] = SimpleNamespace(with_norms=busy_tower)
    batches = list(iter_sample_batches(all_shards(shards)[:1], SampleOptions()))
    for num_images in (1, 3):
        sizes.clear()
        (rows,) = scorer.score([batches[0].slice(0, num_images)])
        assert rows["nsfw_score"].to_pylist() == [row[3] for row in expected[:num_images]]
        assert sizes[0] == num_images
    assert scorer.passes.fitting_batch_size == scorer.passes.batch_size


def test_another_error_of_the_tower_is_no_want_of_memory(shards, embedder):
    def broken_tower(pixels):
        raise RuntimeError("a kernel failed")

    embedder._towers["cpu"] = SimpleNamespace(with_norms=broken_tower)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        score(Scorer(embedder, device="cpu"), shards)


def test_rows_without_images_do_not_wait_for_a_batch_to_fill(shards, embedder):
    (batch,) = iter_sample_batches(all_shards(shards)[:1], SampleOptions())
    missing = batch.slice(1, 1).set_column(
        batch.schema.get_field_index("status"),
        batch.schema.field("status"),
        pa.array(["image_missing"]),
    )
    asked = 0

    def one_image_then_none():
        nonlocal asked
        yield batch.slice(0, 1)
        while True:
            asked += 1
            assert asked < 1000, "rows pile up"
            yield pa.Table.from_batches([missing] * 500).combine_chunks().to_batches()[0]

    rows = Scorer(embedder, device="cpu").score(one_image_then_none())
    assert next(rows)["status"].to_pylist() == ["ok"]
    rows.close()


def test_an_image_that_is_null_is_missing(shards, embedder):
    (batch,) = iter_sample_batches(all_shards(shards)[:1], SampleOptions(images=False))
    (rows,) = Scorer(embedder, device="cpu").score([batch])
    assert set(rows["status"].to_pylist()) == {"image_missing"}
    assert rows["nsfw_score"].null_count == rows.num_rows > 0


class RandomClassifier(ImageClassifier):
    num_loads = 0

    def __init__(self):
        super().__init__("x", pred_column="x")

    def load_model(self, device):
        type(self).num_loads += 1
        time.sleep(0.05)
        return torch.nn.Linear(768, 1)


def test_a_classifier_is_loaded_once_not_by_every_thread(shards, embedder, monkeypatch):
    embedder.batch_size = 1
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    scorer = Scorer(embedder, [RandomClassifier()], device="cpu")
    score(scorer, shards)
    assert RandomClassifier.num_loads == 1


class TwoScores(ImageClassifier):
    def __init__(self):
        super().__init__("x", pred_column="x")

    def load_model(self, device):
        return torch.nn.Linear(768, 2)


def test_a_classifier_with_two_scores_is_refused(shards, embedder):
    with pytest.raises(InputError, match=r"TwoScores gives \(2,\)"):
        score(Scorer(embedder, [TwoScores()], device="cpu"), shards)
