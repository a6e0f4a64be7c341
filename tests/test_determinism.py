"""One image, one score, to the last bit: whatever it came in with (CPU, float32)."""

import random

import pytest
import torch

from examples.photographs import write_shard
from spark_nsfw import NsfwClassifier, SampleOptions, Scorer, TimmImageEmbedder, iter_sample_batches


@pytest.fixture(scope="module")
def images(jpegs):
    return {f"{number:02}": jpeg for number, jpeg in enumerate(jpegs)}


def score(directory, layout, images, detector_path, variant, **settings):
    """Key → embedding and score, for images spread over shards as ``layout`` says."""
    for number, keys in enumerate(layout):
        write_shard(directory / f"{number}.tar", [(key, [("jpg", images[key])]) for key in keys])
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, **settings)
    classifier = NsfwClassifier(model_path=detector_path, variant=variant)
    scorer = Scorer(embedder, [classifier], "cpu")
    shards = [(str(directory / f"{number}.tar"), str(number)) for number in range(len(layout))]
    found = {}
    for batch in scorer.score(iter_sample_batches(shards, SampleOptions(batch_rows=3))):
        for row in batch.to_pylist():
            found[row["key"]] = (row["image_embedding"], row["nsfw_score"])
    return found


@pytest.mark.parametrize("variant", ["torch", "laion"])
def test_batch_shard_order_and_threads_do_not_change_a_bit(
    tmp_path, images, detector_path, variant
):
    keys = sorted(images)
    expected = score(tmp_path / "all", [keys], images, detector_path, variant, batch_size=32)
    assert len(expected) == 20
    assert len({row[1] for row in expected.values()}) == 20  # the scores do differ
    draw = random.Random(0)
    threads_before = torch.get_num_threads()
    try:
        for trial in range(8):
            shuffled = draw.sample(keys, len(keys))
            cuts = sorted(draw.sample(range(1, 20), draw.randint(1, 6)))
            layout = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
            torch.set_num_threads(draw.choice([1, 2]))
            found = score(
                tmp_path / str(trial), layout, images, detector_path, variant,
                batch_size=draw.choice([1, 3, 8, 17, 64]),
                num_threads_per_worker=draw.choice([1, 4]),
            )  # fmt: skip
            assert found == expected
    finally:
        torch.set_num_threads(threads_before)


def test_the_tower_of_vit_b_32_gives_the_same_bits_in_any_batch(jpegs):
    def embed(batch_size):
        return TimmImageEmbedder(
            "vit_base_patch32_clip_quickgelu_224.openai",
            batch_size=batch_size,
        ).embed(jpegs[:9], device="cpu")

    assert (embed(9) == embed(2)).all()
