"""Files to configs and weight sources: Hugging Face folders, GGUF, tokenizers, the built-in models."""

from .model import Checkpoint, open_model
from .tokenizer import Tokenizer, TokenStream

__all__ = ["Checkpoint", "TokenStream", "Tokenizer", "open_model"]
