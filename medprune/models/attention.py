"""Attention of one-token steps on a CPU, registered with transformers under the name GROUPED."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "medprune_grouped"


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **arguments):
    """Attend with one new token per row as one matrix product a key head; anything else goes to transformers' SDPA.

    query (batch, heads, 1, width), key and value (batch, key heads, seq, width), attention_mask (batch, 1, 1, seq),
    False for padding, or None; returns ((batch, 1, heads, width), None). On CPU, torch's flash kernel takes more than
    ten times as long for a single query row (benchmarks/attention.py).
    """
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    if query.shape[2] > 1 or additive or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **arguments)
    batch, heads, _, width = query.shape
    seq, key, value = key.shape[2], _with_room(key), _with_room(value)
    scores = (query.view(batch, key.shape[1], -1, width) @ key.transpose(-1, -2))[..., :seq]
    scores = scores.float() * (scaling or width**-0.5)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    weights = nn.functional.pad(weights, (0, value.shape[2] - seq))
    return (weights @ value).view(batch, 1, heads, width), None


def _with_room(states: torch.Tensor) -> torch.Tensor:
    """Return (batch, heads, room, width) of which `states` (batch, heads, seq, width) are the first, in a roomy cache.

    What is not contiguous torch would copy at every step; the room's values are zero (`answers.decoding.Roomy`).
    """
    batch, heads, seq, width = states.shape
    room = states.stride(1) // width
    strides = (heads * room * width, room * width, width, 1)
    if room <= seq or states.stride()[1:] != strides[1:] or (batch > 1 and states.stride(0) != strides[0]):
        return states
    return states.as_strided((batch, heads, room, width), strides)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
