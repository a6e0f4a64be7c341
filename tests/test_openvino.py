"""The engine OpenVINO: torch's embeddings, in any batch, by any number of threads."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_scorer import all_shards

from spark_nsfw import NsfwClassifier, SampleOptions, Scorer, TimmImageEmbedder, iter_sample_batches
from spark_nsfw.cli import main
from spark_nsfw.errors import InputError
from spark_nsfw.score.openvino_engine import OpenVinoNetwork
from spark_nsfw.score.tower import create_network

pytest.importorskip("openvino")


def embedder(model="test_vit", **arguments):
    return TimmImageEmbedder(model, **{"embedding_size": 768} | arguments)


@pytest.mark.parametrize(
    ("model", "size"),
    [("test_vit", 768), ("test_vit2", 768), ("test_vit4", 768), ("test_efficientnet", 768),
     ("vit_base_patch32_clip_quickgelu_224.openai", None)],
)  # fmt: skip
def test_embeddings_are_torchs(jpegs, model, size):
    torchs = embedder(model, embedding_size=size).embed(jpegs, "cpu")
    openvinos = embedder(model, embedding_size=size, engine="openvino").embed(jpegs, "cpu")
    assert np.abs(torchs - openvinos).max() < 1e-6


def test_bfloat16_is_as_far_from_float32_as_torchs(jpegs):
    exact = embedder().embed(jpegs, "cpu")
    torchs = embedder(precision="bfloat16").embed(jpegs, "cpu")
    openvinos = embedder(precision="bfloat16", engine="openvino").embed(jpegs, "cpu")
    assert 0 < np.abs(exact - openvinos).max() < 2 * np.abs(exact - torchs).max()


def test_a_score_depends_on_nothing_but_its_image(shards, detector_path):
    """Of batches, threads of torch and of decoding, and whose turn it is."""
    threads_before, seen = torch.get_num_threads(), []
    try:
        for threads, batch_size, rows in [(1, 64, 256), (2, 8, 3), (2, 3, 256), (1, 1, 4)]:
            torch.set_num_threads(threads)
            scorer = Scorer(
                embedder(engine="openvino", batch_size=batch_size, num_threads_per_worker=threads),
                [NsfwClassifier(model_path=detector_path)],
                "cpu",
            )
            batches = iter_sample_batches(all_shards(shards), SampleOptions(batch_rows=rows))
            scores = [row["nsfw_score"] for b in scorer.score(batches) for row in b.to_pylist()]
            seen.append(scores)
    finally:
        torch.set_num_threads(threads_before)
    assert sum(score is not None for score in seen[0]) > 30
    assert all(scores == seen[0] for scores in seen)


def test_threads_do_not_disturb_each_other():
    torch.manual_seed(0)
    network = OpenVinoNetwork(create_network("test_vit", 768).eval(), 160, "float32")
    inputs = [torch.randn(8, 3, 160, 160) for _ in range(12)]
    alone = [network(pixels) for pixels in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(network, inputs), alone))
    with pytest.raises(ValueError, match=r"pixels are \(3, 3, 160, 160\)"):
        network(inputs[0][:3])


def test_the_output_says_so_and_does_not_mix(spark, shards, detector_path, tmp_path, capsys):
    arguments = [
        "score", str(shards / "00000.tar"), str(tmp_path / "out"), "--model=test_vit",
        "--embedding-size=768", "--no-pretrained", f"--detector=laion={detector_path}",
    ]  # fmt: skip
    assert main([*arguments, "--engine=openvino"]) == 0
    field = spark.read.parquet(str(tmp_path / "out")).schema["nsfw_score"]
    assert json.loads(field.metadata["spark_nsfw"])["embedder"]["engine"] == "openvino"
    capsys.readouterr()
    assert main(arguments) == 1
    assert "engine" in capsys.readouterr().err
    assert "engine" not in embedder().describe()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_it_computes_on_no_gpu(device):
    with pytest.raises(InputError, match=r"--engine openvino .* not on cuda.*--device cpu"):
        embedder(engine="openvino").ready(device)
    assert embedder(engine="openvino").ready("cpu").is_ready


def test_what_it_cannot_do_is_refused(spark, shards, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="computes in float32 or bfloat16, not float16"):
        embedder(engine="openvino", precision="float16").ready()
    assert main(["score", "x.tar", "out", "--detector=open_nsfw", "--engine=openvino"]) == 2
    assert "x.tar" in capsys.readouterr().err
    shard = str(shards / "00000.tar")
    assert main(["score", shard, "out", "--detector=open_nsfw", "--engine=openvino"]) == 2
    assert "no detector here needs one" in capsys.readouterr().err
    with pytest.raises(InputError, match="torch or openvino, not 'onnx'"):
        embedder(engine="onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("spark_nsfw.score.openvino_engine.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'spark-nsfw\[openvino\]'"):
        embedder(engine="openvino").ready()
