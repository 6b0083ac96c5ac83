"""Files and live modules to configs and weight sources: Hugging Face folders, GGUF, the twinfer form, tokenizers."""

from .embedding_recipe import EmbeddingRecipe
from .live import from_transformers
from .model import Checkpoint, open_model
from .tokenizer import Tokenizer, TokenStream

__all__ = ["Checkpoint", "EmbeddingRecipe", "TokenStream", "Tokenizer", "from_transformers", "open_model"]
