"""GGUF files: their tables, configs, weights and tokenizers."""
