"""Models of transformers with random weights, small enough to build anywhere."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM


def llama(layers: int = 4, hidden: int = 512, vocabulary: int = 2000) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=1000,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def tokens(rows: int, length: int, vocabulary: int, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, vocabulary, (rows, length), generator=generator).to(device)
