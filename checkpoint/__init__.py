"""Files to configs and weight sources: Hugging Face folders, GGUF, tokenizers, the built-in models."""
