"""The model families whose Hugging Face folders and live modules can be read: one declaration each, side by side."""

from ..family import Family
from .bert import BERT
from .bloom import BLOOM
from .clip import CLIP, CLIP_TEXT
from .cohere import COHERE
from .cohere2 import COHERE2
from .cohere2_moe import COHERE2_MOE
from .dbrx import DBRX
from .distilbert import DISTILBERT
from .dots1 import DOTS1
from .ernie4_5_moe import ERNIE4_5_MOE
from .exaone_moe import EXAONE_MOE
from .falcon import FALCON, REFINED_WEB, REFINED_WEB_MODEL
from .flex_olmo import FLEX_OLMO
from .flint import FLINT
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .glm4_moe import GLM4_MOE
from .gpt2 import GPT2
from .gpt_bigcode import GPT_BIGCODE
from .gpt_neo import GPT_NEO
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .gptj import GPTJ
from .granite import GRANITE, GRANITE_MOE, GRANITE_MOE_SHARED
from .granitemoe_swa import GRANITE_MOE_SWA
from .hunyuan_moe import HUNYUAN_MOE
from .hy_v3 import HY_V3
from .internlm2 import INTERNLM2
from .llama import LLAMA, MISTRAL
from .megatron_gpt import MEGATRON_GPT
from .mellum import MELLUM
from .minimax_m2 import MINIMAX_M2
from .mixtral import MIXTRAL
from .mpt import MPT
from .olmo2 import OLMO2
from .olmoe import OLMOE
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .phimoe import PHIMOE
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from .smollm3 import SMOLLM3
from .solar_open import SOLAR_OPEN
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    GPT2,
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
    DISTILBERT,
    CLIP_TEXT,
    CLIP,
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
    COHERE,
    COHERE2,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    OLMO2,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STARCODER2,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    PHIMOE,
    DBRX,
    GPT_OSS,
    GLM4_MOE,
    HUNYUAN_MOE,
    DOTS1,
    ERNIE4_5_MOE,
    FLEX_OLMO,
    MINIMAX_M2,
    SOLAR_OPEN,
    COHERE2_MOE,
    EXAONE_MOE,
    FLINT,
    GRANITE_MOE_SWA,
    HY_V3,
    MELLUM,
)
