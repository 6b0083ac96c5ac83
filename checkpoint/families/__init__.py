"""The model families whose Hugging Face folders and live modules can be read: one declaration each, side by side."""

from ..family import Family
from .bert import BERT
from .bloom import BLOOM
from .falcon import FALCON, REFINED_WEB, REFINED_WEB_MODEL
from .gpt2 import GPT2
from .gpt_bigcode import GPT_BIGCODE
from .gpt_neo import GPT_NEO
from .gpt_neox import GPT_NEOX
from .gptj import GPTJ
from .internlm2 import INTERNLM2
from .llama import LLAMA, MISTRAL
from .megatron_gpt import MEGATRON_GPT
from .mpt import MPT
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .stablelm import STABLELM

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    GPT2,
    BERT,
    BLOOM,
    FALCON,
    REFINED_WEB,
    REFINED_WEB_MODEL,
    GPT_NEO,
    GPT_NEOX,
    GPTJ,
    OPT,
    GPT_BIGCODE,
    INTERNLM2,
    MEGATRON_GPT,
    MPT,
    PHI,
    PHI3,
    STABLELM,
)
