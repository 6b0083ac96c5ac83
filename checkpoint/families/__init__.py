"""The model families whose Hugging Face folders and live modules can be read: one declaration each, side by side."""

from ..family import Family
from .bert import BERT
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, GPT2, BERT)
