"""The Llamas of the stories, with random weights."""

from transformers import LlamaConfig


def llama_config(hidden: int = 2048, layers: int = 16) -> LlamaConfig:
    """Return a Llama's shape: 0.9 billion parameters, unless told otherwise."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        pad_token_id=0,
        eos_token_id=None,
    )
