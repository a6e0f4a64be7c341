import copy
import hashlib
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from pyarrow import fs
from safetensors.torch import save_file

from spark_nsfw import TimmImageEmbedder
from spark_nsfw.errors import (
    ChecksumError,
    InputError,
    UndecodableImageError,
    WeightsError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.score.checkpoint import load_state_dict
from spark_nsfw.score.download import download, file_sha256, local_file
from spark_nsfw.score.pixels import decode_image
from spark_nsfw.score.timm_embedder import RANDOM_SEED

B32 = "vit_base_patch32_clip_quickgelu_224.openai"


@pytest.fixture(scope="module")
def clip_b32():
    """open_clip's ViT-B/32 with random weights, an implementation independent of timm's."""
    torch.manual_seed(1)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    return model.half().float()  # weights that OpenAI's float16 files hold exactly


def write_checkpoint(model, directory: Path, style: str) -> Path:
    """One model in the file formats that CLIP's weights come in."""
    path = directory / f"{style}.pt"
    tensors = model.state_dict()
    if style == "open_clip":
        torch.save({"epoch": 1, "name": "x", "state_dict": tensors}, path)
    elif style == "open_clip_ddp":
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    elif style == "open_clip_safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    elif style == "openai":  # a TorchScript archive of float16 weights
        with torch.no_grad(), pytest.warns():
            visual = copy.deepcopy(model.visual).half()
            script = torch.jit.trace(visual, torch.zeros(1, 3, 224, 224).half())
            wrapper = torch.nn.Module()
            wrapper.visual = script
            wrapper.logit_scale = torch.nn.Parameter(torch.ones([]))
            torch.jit.save(torch.jit.script(wrapper), str(path))
    return path


def open_clips_embeddings(model, images):
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    pixels = np.stack([decode_image(image, 224) for image in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return model.encode_image((x - mean) / std, normalize=True).numpy()


@pytest.mark.parametrize("style", ["openai", "open_clip", "open_clip_ddp", "open_clip_safetensors"])
def test_embeddings_are_those_of_open_clip(tmp_path, clip_b32, jpegs, style):
    path = write_checkpoint(clip_b32, tmp_path, style)
    embedder = TimmImageEmbedder(B32, checkpoint_path=str(path), decode="exact")
    embeddings = embedder.embed(jpegs[:4], device="cpu")
    expected = open_clips_embeddings(clip_b32, jpegs[:4])
    assert embeddings.shape == (4, 512)
    assert np.abs(embeddings - expected).max() < 1e-5
    assert np.abs(expected - np.roll(expected, 1, axis=0)).max() > 1e-3  # images do differ
    assert embedder.ready().weights.sha256 == file_sha256(path)


def test_embeddings_of_vit_l_14_are_those_of_open_clip(tmp_path, jpegs):
    torch.manual_seed(2)
    model = open_clip.create_model("ViT-L-14-quickgelu").eval()
    path = write_checkpoint(model, tmp_path, "open_clip_safetensors")
    embedder = TimmImageEmbedder(
        "vit_large_patch14_clip_quickgelu_224.openai", checkpoint_path=str(path), decode="exact"
    )
    embeddings = embedder.embed(jpegs[:2], device="cpu")
    assert embeddings.shape == (2, 768)
    assert np.abs(embeddings - open_clips_embeddings(model, jpegs[:2])).max() < 1e-5
    path.unlink()


def test_timms_own_file_is_read(tmp_path, jpegs):
    torch.manual_seed(5)
    network = timm.create_model("test_vit2", num_classes=768)
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    embedder = TimmImageEmbedder(
        "test_vit2", checkpoint_path=str(path), embedding_size=768, decode="exact"
    )
    embeddings = embedder.embed(jpegs[:2], device="cpu")
    config = timm.data.resolve_data_config({}, model=network)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = torch.from_numpy(np.stack([decode_image(image, 160) for image in jpegs[:2]]))
    with torch.no_grad():
        raw = network.eval()((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    expected = torch.nn.functional.normalize(raw, dim=-1).numpy()
    assert np.abs(embeddings - expected).max() < 1e-5


def test_pretrained_loads_timms_file_from_the_hubs_cache(tmp_path, monkeypatch, clip_b32, jpegs):
    repository = timm.get_pretrained_cfg(B32).hf_hub_id
    cached = tmp_path / f"models--{repository.replace('/', '--')}"
    snapshot = cached / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    write_checkpoint(clip_b32, tmp_path, "open_clip_safetensors").rename(
        snapshot / "model.safetensors"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    embeddings = TimmImageEmbedder(B32, pretrained=True, decode="exact").embed(
        jpegs[:2], device="cpu"
    )
    expected = open_clips_embeddings(clip_b32, jpegs[:2])
    assert np.abs(embeddings - expected).max() < 1e-5


def test_pretrained_weights_that_cannot_be_fetched_say_what_to_do(tmp_path, monkeypatch, jpegs):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match="--clip-checkpoint"):
        TimmImageEmbedder(B32, pretrained=True).embed(jpegs[:1], device="cpu")


def test_a_checkpoint_of_another_tower_is_refused_with_the_tensors_that_do_not_fit(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu")
    path = write_checkpoint(model, tmp_path, "open_clip")
    with pytest.raises(WeightsMismatchError, match=r"pos_embed has shape|patch_embed"):
        TimmImageEmbedder(B32, checkpoint_path=str(path)).tower("cpu")


def test_a_checkpoint_for_another_resolution_is_refused_not_resized(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", force_image_size=256)
    path = write_checkpoint(model, tmp_path, "open_clip")
    with pytest.raises(WeightsMismatchError, match="pos_embed"):
        TimmImageEmbedder(B32, checkpoint_path=str(path)).tower("cpu")


def test_a_checkpoint_without_the_projection_is_refused(tmp_path):
    tensors = timm.create_model("test_vit2", num_classes=0).state_dict()
    save_file(tensors, tmp_path / "x.safetensors")
    embedder = TimmImageEmbedder(
        "test_vit2", checkpoint_path=str(tmp_path / "x.safetensors"), embedding_size=768
    )
    with pytest.raises(WeightsMismatchError, match=r"missing head\.weight"):
        embedder.tower("cpu")


def test_a_truncated_checkpoint_is_refused(tmp_path, clip_b32):
    path = write_checkpoint(clip_b32, tmp_path, "open_clip_safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        TimmImageEmbedder(B32, checkpoint_path=str(path)).tower("cpu")


def test_a_file_that_changed_since_it_was_pinned_is_refused(tmp_path):
    torch.manual_seed(5)
    path = tmp_path / "model.safetensors"
    tensors = timm.create_model("test_vit2", num_classes=768).state_dict()
    save_file(tensors, path)
    embedder = TimmImageEmbedder("test_vit2", checkpoint_path=str(path), embedding_size=768)
    embedder = embedder.ready()
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    with pytest.raises(ChecksumError, match=r"model\.safetensors"):
        pickle.loads(pickle.dumps(embedder)).tower("cpu")


CONTENT = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """An HTTP server, and the number of bytes after which it cuts each connection."""
    cuts = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            cut = cuts.pop(0)
            if cut == "slow":  # so that whoever does not wait for a lock asks meanwhile
                time.sleep(0.5)
                cut = None
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:cut])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever).start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pt", cuts
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def test_a_download_that_was_cut_is_not_kept(server, cache):
    url, cuts = server
    cuts += [1_000_000, None]
    with pytest.raises(WeightsUnavailableError, match="cut after 1,000,000 of 2,560,000 bytes"):
        download(url, "weights.pt", SHA256)
    assert [path.name for path in cache.iterdir()] == [".weights.pt.lock"]
    assert download(url, "weights.pt", SHA256).read_bytes() == CONTENT
    assert download(url, "weights.pt", SHA256) == cache / "weights.pt"
    assert cuts == []  # the third call asked for nothing


def test_half_a_file_in_the_cache_is_fetched_again(server, cache):
    url, cuts = server
    cache.mkdir()
    (cache / "weights.pt").write_bytes(CONTENT[:1000])
    cuts += [None]
    assert download(url, "weights.pt", SHA256).read_bytes() == CONTENT


def test_a_server_with_another_file_is_refused_and_leaves_nothing(server, cache):
    url, cuts = server
    cuts += [None]
    with pytest.raises(ChecksumError, match=rf"{url} is not the expected file: sha256 {SHA256}"):
        download(url, "weights.pt", "0" * 64)
    assert not (cache / "weights.pt").exists()


def test_a_remote_file_is_copied_again_where_the_copy_is_not_whole(tmp_path, monkeypatch, cache):
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())  # no local one, to us
    monkeypatch.setattr(
        "spark_nsfw.score.download.resolve", lambda url: (remote, url.split("/")[-1])
    )
    monkeypatch.setattr(
        "spark_nsfw.score.download.open_input",
        lambda url: (tmp_path / url.split("/")[-1]).open("rb"),
    )
    (tmp_path / "x.pt").write_bytes(CONTENT)
    copy = local_file("s3://bucket/x.pt")
    assert (copy.parent, copy.read_bytes()) == (cache, CONTENT)
    copy.write_bytes(CONTENT[:-1])
    assert local_file("s3://bucket/x.pt").read_bytes() == CONTENT
    copy.write_bytes(bytes(len(CONTENT)))
    assert local_file("s3://bucket/x.pt", SHA256).read_bytes() == CONTENT


#: Says when it could begin, and begins when it is told.
FETCH = """
import sys
from spark_nsfw.score.download import download
print("ready", flush=True)
sys.stdin.readline()
print(download(sys.argv[1], "weights.pt", sys.argv[2]).stat().st_size)
"""


def test_processes_side_by_side_fetch_a_file_once(server, cache):
    url, cuts = server
    cuts += ["slow"]  # a second request finds no answer
    command = [sys.executable, "-c", FETCH, url, SHA256]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(6)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 6
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0] for process in processes]
    assert found == [f"{len(CONTENT)}\n"] * 6


def state_by_a_slow_clock(file):
    """What is seen of a file on a file system whose clock ticks every two seconds, as FAT's."""
    stat = os.fstat(file.fileno())
    return (stat.st_ino, stat.st_size, int(stat.st_mtime // 2)), stat.st_mtime // 2 * 2


@pytest.mark.parametrize("how", ["just_now", "within_a_tick", "time_of_change_kept"])
def test_no_rewrite_goes_unnoticed_however_quick(tmp_path, monkeypatch, how):
    if how == "within_a_tick":
        monkeypatch.setattr("spark_nsfw.score.download._file_state", state_by_a_slow_clock)
    path = tmp_path / "weights.pt"
    for number in range(40):
        content = bytes([number]) * 100
        path.write_bytes(content)
        if how == "time_of_change_kept":
            os.utime(path, (1_600_000_000, 1_600_000_000))
        assert file_sha256(path) == hashlib.sha256(content).hexdigest(), number


def test_the_hash_of_a_file_that_is_old_enough_is_remembered(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_bytes(CONTENT)
    now = time.time()
    monkeypatch.setattr("spark_nsfw.score.download.time.time", lambda: now + 60)
    assert file_sha256(path) == SHA256
    monkeypatch.setattr("spark_nsfw.score.download._BLOCK_BYTES", 0)  # nothing can be read now
    assert file_sha256(path) == SHA256
    path.write_bytes(CONTENT)
    assert file_sha256(path) == hashlib.sha256(b"").hexdigest()


def test_others_can_read_the_cache(server, cache):
    url, cuts = server
    cuts += [None]
    before = os.umask(0o022)
    try:
        path = download(url, "weights.pt", SHA256)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_cache_that_cannot_be_written_says_which_setting_to_change(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SPARK_NSFW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsUnavailableError, match=r"set \$SPARK_NSFW_CACHE"):
        download("http://127.0.0.1:9/", "weights.pt", SHA256)


def test_a_user_without_a_home_is_told_which_setting_to_give(monkeypatch):
    monkeypatch.delenv("SPARK_NSFW_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(WeightsUnavailableError, match=r"set \$SPARK_NSFW_CACHE"):
        download("http://127.0.0.1:9/", "weights.pt", SHA256)


@pytest.mark.parametrize("content", [[torch.ones(1)], 7, torch.ones(2), {"epoch": 1}])
def test_a_file_without_named_tensors_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_state_dict(tmp_path / "x.pt")


def test_random_weights_are_the_same_in_every_process(tmp_path, embedder, jpegs):
    script = (
        "import pickle, sys, numpy, torch\n"
        "torch.manual_seed(99); torch.rand(5)\n"
        "embedder, images = pickle.load(open(sys.argv[1], 'rb'))\n"
        "numpy.save(sys.argv[2], embedder.embed(images, device='cpu'))\n"
    )
    (tmp_path / "job").write_bytes(pickle.dumps((embedder, jpegs[:3])))
    arguments = [str(tmp_path / "job"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    assert np.array_equal(np.load(tmp_path / "out.npy"), embedder.embed(jpegs[:3], device="cpu"))
    assert embedder.weights.is_random
    assert str(embedder.weights) == f"random (seed {RANDOM_SEED})"


def test_building_random_weights_leaves_the_callers_randomness_alone(embedder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    embedder.tower("cpu")
    assert torch.equal(torch.rand(2), expected)


def test_embeddings_have_norm_one_unless_told_otherwise(jpegs):
    normal = TimmImageEmbedder("test_vit2", embedding_size=768).embed(jpegs[:3], device="cpu")
    raw = TimmImageEmbedder("test_vit2", embedding_size=768, normalize_embeddings=False)
    raw_embeddings = raw.embed(jpegs[:3], device="cpu")
    norms = np.linalg.norm(raw_embeddings, axis=1, keepdims=True)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-6)
    assert np.abs(norms - 1).min() > 0.01
    assert np.allclose(raw_embeddings / norms, normal, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20, 64])
def test_batch_size_does_not_change_a_bit(jpegs, batch_size):
    expected = TimmImageEmbedder("test_vit2", batch_size=16, embedding_size=768).embed(
        jpegs, device="cpu"
    )
    embedder = TimmImageEmbedder("test_vit2", batch_size=batch_size, embedding_size=768)
    assert np.array_equal(embedder.embed(jpegs, device="cpu"), expected)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.02), ("float16", 0.005)])
def test_precision_is_what_was_asked_for(jpegs, precision, tolerance):
    exact = TimmImageEmbedder("test_vit2", embedding_size=768).embed(jpegs[:4], device="cpu")
    embedder = TimmImageEmbedder("test_vit2", embedding_size=768, precision=precision)
    rough = embedder.embed(jpegs[:4], device="cpu")
    assert embedder.tower("cpu").network.head.weight.dtype == getattr(torch, precision)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < tolerance


def test_autocast_means_float16_on_a_gpu_and_float32_on_a_cpu():
    embedder = TimmImageEmbedder("test_vit2")
    assert (embedder.precision_on("cuda:0"), embedder.precision_on("cpu")) == ("float16", "float32")
    assert TimmImageEmbedder("test_vit2", autocast=False).precision_on("cuda") == "float32"
    assert TimmImageEmbedder("test_vit2", precision="bfloat16").precision_on("cpu") == "bfloat16"


def test_the_model_that_the_job_defaults_to_fits_laions_detector():
    embedder = TimmImageEmbedder("vit_large_patch14_clip_quickgelu_224.openai")
    assert (embedder.embedding_size, embedder.image_size) == (768, 224)
    assert TimmImageEmbedder(B32).embedding_size == 512


def test_an_image_that_cannot_be_decoded_is_named(embedder, jpegs):
    with pytest.raises(UndecodableImageError, match=r"images\[9\]"):
        embedder.embed([*jpegs[:9], b"no"], device="cpu")


def test_an_unknown_model_is_refused_with_close_names():
    with pytest.raises(InputError, match="vit_large_patch14_clip_quickgelu_224"):
        TimmImageEmbedder("vit_large_patch14_clip_quickgelu_244")


@pytest.mark.parametrize(
    "bad",
    [{"batch_size": 0}, {"num_threads_per_worker": 0}, {"precision": "float8"}, {"decode": "x"}],
)
def test_arguments_that_cannot_work_are_refused(bad):
    with pytest.raises(InputError):
        TimmImageEmbedder("test_vit2", **bad)


def test_a_pickled_embedder_is_small_and_has_no_weights(embedder):
    embedder.tower("cpu")
    assert len(pickle.dumps(embedder)) < 4000


@pytest.mark.parametrize("wrong", [None, "photo.jpg", 3])
def test_what_is_no_bytes_is_named(embedder, jpegs, wrong):
    with pytest.raises(InputError, match=r"images\[1\] is of type"):
        embedder.embed([jpegs[0], wrong], device="cpu")


def test_embedders_and_classifiers_take_datasets_only(embedder):
    for step in (embedder, embedder.classifiers[0]):
        with pytest.raises(InputError, match="expected an ImageTextPairDataset, not list"):
            step([])
