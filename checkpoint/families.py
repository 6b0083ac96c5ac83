"""The model families whose Hugging Face folders can be read."""

from .family import Family
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, GPT2)
