"""Attention whose projections are ordinary layers.

Some of torch's and torchvision's modules read a child's ``weight`` instead of calling the child:
`nn.MultiheadAttention` (its packed in-projection and ``out_proj``), torchvision's Swin attention
(``qkv`` and ``proj``), and the fused path of `nn.TransformerEncoderLayer` and
`nn.TransformerEncoder`. Hooks on such a child never fire, and a chain of layers in its place breaks
the parent. The modules here compute the same from `nn.Linear` children that are called, and
`unpack` puts them in place of those parents.

In evaluation mode they equal what they replace, up to rounding, for every option. They never take
torch's fused path, so nested tensors are refused. Their arithmetic between the projections is
wrapped for `torch.fx`, so that a model stays as traceable as it was, with the projections visible.
"""

from compress.modules.attention.encoder import UnpackedEncoder, UnpackedEncoderLayer
from compress.modules.attention.multihead import UnpackedAttention
from compress.modules.attention.unpack import (
    attention_names,
    reads_child_weights,
    unpack,
)
from compress.modules.attention.window import UnpackedWindowAttention

__all__ = [
    "UnpackedAttention",
    "UnpackedEncoder",
    "UnpackedEncoderLayer",
    "UnpackedWindowAttention",
    "attention_names",
    "reads_child_weights",
    "unpack",
]
