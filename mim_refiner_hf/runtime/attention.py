"""Training in bfloat16 on a CPU, with attention in single precision.

    attend_in_fp32(encoder)     # once, before training under autocast

torch's attention for CPUs is slower backward in bfloat16 than in single precision, the more so the
fewer the tokens, while matrix products are faster. So the products run in bfloat16 and attention
does not; `python -m benchmarks attention-bf16 step-bf16` measures it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_fp32_on_cpu"


def fp32_on_cpu(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", on a CPU in single precision whatever autocast says.

    Args:
        query, key, value: (B, heads, T, head_dim).
        attention_mask: added to the logits, (B or 1, heads or 1, T, T).
        scaling: of the logits; None for head_dim ** -0.5.

    Returns the output (B, T, heads, head_dim) in the dtype of the query, and no weights.
    """
    if query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    mask = attention_mask
    if mask is not None:
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        output = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask, dropout, scale=scaling
        )
    return output.transpose(1, 2).contiguous().to(query.dtype), None


AttentionInterface.register(NAME, fp32_on_cpu)


def attend_in_fp32(network: nn.Module) -> None:
    """Let every transformers model in a network that attends by "sdpa" do so in fp32 on a CPU.

    Another kind of attention was asked for, and stays. Nothing of it is saved with a model.
    """
    for module in network.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(NAME)
