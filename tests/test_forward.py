"""Forward passes as a GPU makes them, as far as a CPU can show it."""

import pytest
import torch

from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from spark_nsfw.score.forward import ForwardPasses
from spark_nsfw.score.lanes import Lane, out_of_memory
from spark_nsfw.score.pipeline import Pipeline
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.tower import batch_size_on, compute_exactly


@pytest.fixture
def passes(detector_path):
    """Of a CPU that takes itself for a GPU."""
    embedder = TimmImageEmbedder("test_vit", embedding_size=768, batch_size=8)
    classifier = NsfwClassifier(model_path=detector_path)
    made = ForwardPasses(Recipe.of(embedder, [classifier]).ready(), "cpu")
    made.on_gpu = True
    return made


@pytest.fixture
def pixels(passes):
    transform = passes.embedder.transform
    torch.manual_seed(0)
    return {transform: torch.randint(0, 256, (8, 160, 160, 3), dtype=torch.uint8)}


def sizes_of(passes, monkeypatch):
    """The sizes of the passes to come."""
    sizes, tower = [], passes.embedder.tower("cpu")

    def with_norms(images, original=tower.with_norms):
        sizes.append(len(images))
        return original(images)

    monkeypatch.setattr(tower, "with_norms", with_norms)
    return sizes


@pytest.mark.parametrize(
    ("fitting", "expected"), [(8, [8]), (4, [4, 4]), (3, [3, 3, 3]), (1, 8 * [1])]
)
def test_every_pass_of_a_gpu_has_the_same_number_of_images(
    passes, pixels, monkeypatch, fitting, expected
):
    whole = passes.score(pixels, 5)
    sizes = sizes_of(passes, monkeypatch)
    passes.fitting_batch_size = fitting
    results = passes.score(pixels, 5)
    assert sizes == expected
    assert torch.equal(results.embeddings[:5], whole.embeddings[:5])
    assert torch.equal(results.norms[:5], whole.norms[:5])
    assert torch.equal(results.scores[0][:5], whole.scores[0][:5])


def test_a_cpu_computes_no_image_that_is_not_there(passes, pixels, monkeypatch):
    passes.on_gpu = False
    sizes = sizes_of(passes, monkeypatch)
    assert len(passes.score(pixels, 5).embeddings) == 5
    assert sizes == [5]


@pytest.mark.parametrize(
    ("fitting", "tried", "kept"), [(8, [8], 8), (4, [8, 4], 4), (1, [8, 4, 2, 1], 1)]
)
def test_a_graph_is_recorded_of_as_many_images_as_fit(passes, monkeypatch, fitting, tried, kept):
    sizes, forgotten = [], []

    def record(lane, compute, transforms, num_images):
        if lane is passes._lanes.all[0]:
            sizes.append(num_images)
        if num_images > fitting:
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Lane, "record", record)
    monkeypatch.setattr(Lane, "forget", lambda lane: forgotten.append(lane))
    passes._record()
    assert sizes == tried
    assert passes.fitting_batch_size == kept
    assert len(forgotten) == (len(tried) - 1) * passes.num_threads
    passes._record()
    assert sizes == tried  # once is enough


def test_no_memory_to_record_a_single_image_is_an_error(passes, monkeypatch):
    def record(*_):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(Lane, "record", record)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        passes._record()


def test_what_cannot_be_recorded_is_computed_step_by_step(passes, pixels, monkeypatch, caplog):
    def record(*_):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    tried = []
    monkeypatch.setattr(Lane, "record", record)
    passes._record()
    assert "step by step, without a CUDA graph: operation not permitted" in caplog.text
    assert not passes.records
    assert len(tried) == 1
    assert passes.fitting_batch_size == 8
    assert len(passes.score(pixels, 5).embeddings) == 8


class OwnEmbedder(TimmImageEmbedder):
    """A user's own."""


class OwnClassifier(NsfwClassifier):
    """A user's own."""


def test_only_networks_of_this_package_are_recorded(passes, detector_path):
    assert passes._can_be_recorded
    embedder = TimmImageEmbedder("test_vit", embedding_size=768)
    own = OwnEmbedder("test_vit", embedding_size=768)
    classifier = NsfwClassifier(model_path=detector_path)
    for recipe in (
        Recipe.of(own, [classifier]),
        Recipe.of(embedder, [OwnClassifier(model_path=detector_path)]),
    ):
        assert not ForwardPasses(recipe.ready(), "cpu")._can_be_recorded


def test_a_model_that_is_no_network_is_not_recorded():
    pytest.importorskip("onnxruntime")
    from spark_nsfw import OpenNsfwClassifier

    recipe = Recipe.of(None, [OpenNsfwClassifier()]).ready()
    assert not ForwardPasses(recipe, "cpu")._can_be_recorded


@pytest.mark.parametrize(
    "words",
    [
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_cuda_has_several_words_for_a_want_of_memory(words):
    assert out_of_memory(RuntimeError(words))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize(
    ("device", "given", "taken"),
    [
        ("cuda", None, 256),
        ("cuda:1", 1024, 1024),
        ("cpu", None, 64),
        ("cpu", 256, 64),
        ("cpu", 3, 3),
    ],
)
def test_batches_suit_the_device(monkeypatch, device, given, taken):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert batch_size_on(device, given) == taken


def test_tasks_of_one_core_share_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert [batch_size_on("cuda", given) for given in (None, 100)] == [64, 100]


@pytest.mark.parametrize(
    ("on_gpu", "cores", "given", "threads"),
    [(True, 16, None, 14), (True, 1, None, 4), (False, 16, None, 4), (True, 16, 3, 3)],
)
def test_decoding_threads_suit_the_task(passes, monkeypatch, on_gpu, cores, given, threads):
    monkeypatch.setattr("torch.get_num_threads", lambda: cores)
    passes.on_gpu = on_gpu
    embedder = TimmImageEmbedder("test_vit", num_threads_per_worker=given)
    pipeline = Pipeline(Recipe.of(embedder, []), passes)
    assert pipeline._decoders._max_workers == threads


def test_float32_is_computed_in_float32(monkeypatch):
    flags = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(where, name) for where, name in flags]
    try:
        for where, name in flags:
            setattr(where, name, True)
        compute_exactly("cpu")
        assert all(getattr(where, name) for where, name in flags)
        compute_exactly("cuda")
        assert not any(getattr(where, name) for where, name in flags)
    finally:
        for (where, name), value in zip(flags, before, strict=True):
            setattr(where, name, value)
