"""Rearranged towers give timm's embeddings."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import LayerNorm, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spark_nsfw import TimmImageEmbedder
from spark_nsfw.score.transformer import rearrange


def vision_transformer(**arguments):
    """A small one built as OpenAI's CLIP is, with weights that are far from their start."""
    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 24,
        "global_pool": "token",
        "pre_norm": True,
        "act_layer": QuickGELU,
    }
    network = VisionTransformer(**settings | arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def embeddings(network):
    torch.manual_seed(1)
    return nn.functional.normalize(network(torch.randn(6, 3, 32, 32)), dim=1)


@pytest.mark.parametrize(
    "built",
    [
        {},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"init_values": 0.5},
        {"reg_tokens": 3},
        {"act_layer": nn.GELU},
        {"fc_norm": True},
        {"depth": 1},
    ],
    ids=str,
)
def test_the_class_token_alone_gives_the_same_embeddings(built):
    network = vision_transformer(**built)
    expected = embeddings(network)
    calls = []
    rearranged = rearrange(network)
    rearranged.blocks[-1].register_forward_hook(lambda *call: calls.append(call[2].shape))
    assert (embeddings(rearranged) - expected).abs().max() < 1e-6
    assert calls == [(6, 1, 32)]  # that part of the work is left out


@pytest.mark.parametrize(
    "built",
    [
        {"global_pool": "avg"},
        {"global_pool": "map"},
        {"qk_norm": True, "norm_layer": LayerNorm},
        {"scale_attn_norm": True, "norm_layer": LayerNorm},
        {"class_token": False, "global_pool": "avg"},
    ],
    ids=str,
)
def test_networks_that_need_all_tokens_keep_them(built):
    network = vision_transformer(**built)
    expected, last = embeddings(network), network.blocks[-1]
    rearranged = rearrange(network)
    assert rearranged.blocks[-1] is last
    assert (embeddings(rearranged) - expected).abs().max() < 1e-6


def test_quick_gelu_becomes_one_kernel():
    network = vision_transformer()
    kinds = {type(module) for module in rearrange(network).modules()}
    assert nn.SiLU in kinds
    assert QuickGELU not in kinds


def test_an_mlp_that_normalises_between_its_layers_stays():
    network = vision_transformer(scale_mlp_norm=True, norm_layer=partial(LayerNorm, eps=1e-6))
    expected = embeddings(network)
    rearranged = rearrange(network)
    assert any(isinstance(module, QuickGELU) for module in rearranged.modules())
    assert (embeddings(rearranged) - expected).abs().max() < 1e-6


def test_other_networks_stay_as_they_are():
    network = timm.create_model("test_efficientnet", pretrained=False).eval()
    before = copy.deepcopy(network.state_dict())
    rearrange(network)
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_vit_b_32_is_timms():
    """Of CLIP's real architecture, on random pixels, in the embedder as it is used."""
    name = "vit_base_patch32_clip_quickgelu_224.openai"
    embedder = TimmImageEmbedder(name)
    torch.manual_seed(0)  # the seed of random towers
    network = timm.create_model(name, pretrained=False).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in embedder.statistics)
    pixels = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network((pixels.permute(0, 3, 1, 2).float() - mean) / std)
        expected = nn.functional.normalize(expected, dim=1)
        got = embedder.tower("cpu")(pixels)
    assert (got - expected).abs().max() < 1e-6
