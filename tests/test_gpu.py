"""What only a GPU can show; all of it is skipped where there is none."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import timm
import torch
from conftest import shared_file
from safetensors.torch import save_file
from scoring import score_into
from test_scorer import all_shards, score

from spark_nsfw import (
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageClassifier,
    TimmImageEmbedder,
    iter_sample_batches,
)
from spark_nsfw.score.multi_headed import HEADS, MultiHeadedClassifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OwnClassifier(NsfwClassifier):
    """Code that is not the package's: its passes are computed step by step."""


def tower(detector_path, classifier=NsfwClassifier, **arguments):
    return TimmImageEmbedder(
        "test_vit2",
        embedding_size=768,
        classifiers=[classifier(model_path=detector_path)],
        **arguments,
    )


def arrays(table):
    """Embeddings and scores of the rows that have them."""
    rows = table.filter(pc.is_valid(table.column("nsfw_score")))
    embeddings = np.stack(rows.column("image_embedding").to_numpy())
    return embeddings, rows.column("nsfw_score").to_numpy()


def told(table):
    """What rows say but for numbers."""
    return table.select(["key", "status"]).to_pylist()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_a_gpu_gives_the_rows_of_a_cpu(shards, detector_path, precision, tolerance):
    on_cpu = score(Scorer(tower(detector_path), device="cpu"), shards)
    on_gpu = score(Scorer(tower(detector_path, precision=precision), device="cuda"), shards)
    assert told(on_gpu) == told(on_cpu)
    for ours, theirs in zip(arrays(on_gpu), arrays(on_cpu), strict=True):
        assert np.abs(ours - theirs).max() < tolerance


def test_the_default_of_a_gpu_is_float16_recorded_as_a_graph(detector_path):
    scorer = Scorer(tower(detector_path))
    scorer.passes.load()
    assert next(scorer.passes.embedder.tower("cuda:0").network.parameters()).dtype == torch.float16
    assert scorer.passes._is_recorded


def test_neighbours_threads_and_graphs_change_no_bit(shards, detector_path):
    base = score(Scorer(tower(detector_path, batch_size=16)), shards)
    step_by_step = Scorer(tower(detector_path, batch_size=16, num_threads_per_worker=1))
    step_by_step.passes.records = False
    assert score(step_by_step, shards).equals(base)
    scorer = Scorer(tower(detector_path, batch_size=16))
    alone = [
        pa.Table.from_batches(scorer.score(iter_sample_batches([shard], SampleOptions())))
        for shard in all_shards(shards)
    ]
    assert pa.concat_tables(alone).combine_chunks().equals(base.combine_chunks())


def test_code_of_ones_own_is_not_recorded_and_scores_the_same(shards, detector_path):
    scorer = Scorer(tower(detector_path, OwnClassifier))
    rows = score(scorer, shards)
    assert not scorer.passes._is_recorded
    assert rows.equals(score(Scorer(tower(detector_path)), shards))


@pytest.mark.parametrize("records", [True, False])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(shards, detector_path, records, caplog):
    scorer = Scorer(tower(detector_path, batch_size=4096, precision="float32"))
    scorer.passes.records = records
    everything = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / everything)
    try:
        rows = score(scorer, shards)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.passes.fitting_batch_size < 4096
    assert "has no memory for a batch of 4096 images, going on with 2048" in caplog.text
    expected = score(Scorer(tower(detector_path), device="cpu"), shards)
    assert told(rows) == told(expected)
    for ours, theirs in zip(arrays(rows), arrays(expected), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("variant", ["torch", "laion"])
def test_laions_detector_gives_the_scores_of_a_cpu_and_of_tensorflow(detector_path, variant):
    golden = np.load(shared_file("laion/golden_vit_l_14.npz"))
    classifier = NsfwClassifier(model_path=detector_path, variant=variant)
    on_cpu, on_gpu = (
        classifier.classify(golden["embedding_f32"], each) for each in ("cpu", "cuda")
    )
    assert np.abs(on_gpu - on_cpu).max() < 1e-6
    if variant == "laion":
        assert np.abs(on_gpu - golden["score_f32"]).max() < 1e-6


def test_heads_give_their_golden_scores():
    golden = np.load(shared_file("heads/golden_heads.npz"))
    classifier = MultiHeadedClassifier(model_path=str(shared_file("heads")))
    projections = golden["embedding"] * golden["embedding_norm"][:, None]
    expected = np.stack([golden[f"mhsc_{head}"] for head in HEADS], axis=1)
    assert np.abs(classifier.classify(projections, "cuda") - expected).max() < 1e-5


def test_a_classifier_of_pixels_gives_the_scores_of_a_cpu(tmp_path, jpegs):
    torch.manual_seed(5)
    model = timm.create_model("test_vit2", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit2", "label_names": ["ok", "nudity", "gore"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    classifier = TimmImageClassifier(
        "hf-hub:somebody/detector", ["nudity"], model_path=str(tmp_path / "model.safetensors")
    ).ready("cpu")
    difference = classifier.classify(jpegs, "cuda") - classifier.classify(jpegs, "cpu")
    assert np.abs(difference).max() < 5e-3


@pytest.mark.parametrize("plan", ["fused", "dataframe"])
def test_the_job_takes_the_gpu_and_gives_the_scorers_rows(
    spark, tmp_path, shards, detector_path, plan
):
    embedder = tower(detector_path, batch_size=16)
    summary = score_into(spark, str(shards), tmp_path / "out", embedder, plan=plan)
    assert summary.provenance["embedder"]["precision"] == "float16"
    rows = spark.read.parquet(str(tmp_path / "out")).collect()
    written = {(row["shard"], row["key"]): row for row in rows if row["key"] is not None}
    expected = score(Scorer(embedder), shards).to_pylist()
    assert written.keys() == {(r["shard"], r["key"]) for r in expected if r["key"] is not None}
    for row in expected:
        if row["key"] is not None:
            found = written[row["shard"], row["key"]]
            for name in ("status", "image_embedding", "nsfw_score"):
                assert found[name] == row[name], (row["shard"], row["key"], name)
