"""timm's Vision Transformers rearranged: the same embeddings in fewer steps."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp, QuickGELU
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

__all__ = ["rearrange"]

#: Of OpenAI's QuickGELU: ``x * sigmoid(1.702 x)``.
_QUICK_GELU = 1.702


def rearrange(network: nn.Module) -> nn.Module:
    """Rearrange a network for inference, in place, while its weights are float32.

    QuickGELU takes three passes over the activations and SiLU takes one; a factor in the weights
    around it makes them the same. And nothing but the class token leaves the last block where
    the embedding is made of nothing else. In float32 both move embeddings by less than 1e-6.

    Networks, and parts of them, that are built in another way stay as they are.
    """
    for module in network.modules():
        if type(module) is Mlp and isinstance(module.act, QuickGELU):
            _with_silu(module)
    if type(network) is VisionTransformer and _embeds_class_token(network):
        blocks: Any = network.blocks
        blocks[-1] = _LastBlock(blocks[-1])
    return network


def _with_silu(mlp: Mlp) -> None:
    """``x * sigmoid(a x)`` is ``silu(a x) / a``."""
    if not (isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)):
        return
    with torch.no_grad():
        for parameter in mlp.fc1.parameters():
            parameter.mul_(_QUICK_GELU)
        mlp.fc2.weight.div_(_QUICK_GELU)
    mlp.act = nn.SiLU()


def _embeds_class_token(network: VisionTransformer) -> bool:
    """Whether the embedding depends on the last block's first token alone, in a way known here."""
    blocks: Any = network.blocks
    last = blocks[-1]
    if not (network.global_pool == "token" and network.attn_pool is None):
        return False
    if not (type(last) is Block and type(last.attn) is Attention):
        return False
    attention = last.attn
    parts = [attention.q_norm, attention.k_norm, getattr(attention, "norm", nn.Identity())]
    return (
        all(isinstance(part, nn.Identity) for part in parts)
        and getattr(attention, "gate", None) is None
    )


class _LastBlock(nn.Module):
    """A transformer block that gives its first token only: (N, T, C) → (N, 1, C).

    All tokens attend, although the others' results are not needed: the kernel that CUDA has for a
    single query does not give the same bits every time.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.block
        attention = block.attn
        num_images, num_tokens, _ = x.shape
        shape = (num_images, num_tokens, 3, attention.num_heads, attention.head_dim)
        queries, keys, values = attention.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        attended = attended[:, :, 0].reshape(num_images, 1, -1)
        first: torch.Tensor = x[:, :1] + block.ls1(attention.proj(attended))
        first = first + block.ls2(block.mlp(block.norm2(first)))
        return first
