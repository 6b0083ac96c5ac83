"""Mixtures of experts that are known by name and cannot be read, each with the reason.

Whoever opens one should learn what is in the way, not only that its name is unknown.
"""

from collections.abc import Mapping
from types import MappingProxyType

_BY_REASON = {
    "its attention is multi-head latent attention (MLA)": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 longcat_flash mistral4 "
        "mistral_large4 mistral_large4_text"
    ),
    "its keys and values are compressed over tokens, and its residual stream is several streams": "deepseek_v4",
    "some of its layers are linear attention or state-space layers (Mamba, lightning attention, gated delta rule)": (
        "bailing_hybrid glm5_next glm5_next_text granitemoehybrid jamba kimi_linear minimax nemotron_h qwen3_5_moe "
        "qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text"
    ),
    "some of its layers, or what they read, are short convolutions": (
        "inkling inkling_text inkling2 inkling2_text lfm2_moe zaya"
    ),
    "what attention gives is multiplied by a gate of its own": (
        "afmoe beam laguna muse_spark muse_spark_text step3p5 step3p7"
    ),
    "its keys and values have heads of different sizes, and more heads in layers with a window": "mimo_v2_flash",
    "its attention drops keys by a learned mask, and its experts are found by product keys": "doge",
    "its attention has experts too, which choose the queries' projections": "jetmoe",
    "each layer has a dense MLP and experts with norms of their own, and heads of two sizes": "gemma4 gemma4_text",
    "it attends within chunks, scales queries by their position, and weighs what experts read, not what they give": (
        "llama4 llama4_text"
    ),
    "its bias for the choice is added to the router's logits, not to their sigmoids": "kolibri1",
    "it is an encoder and a decoder; only decoders and encoders by themselves are read": "nllb-moe switch_transformers",
    "it labels tokens of a text that it reads in both directions, and writes none": "openai_privacy_filter",
    "it fills in masked tokens in any order instead of the next one": "diffusion_gemma diffusion_gemma_text",
    "it reads images or sound beside text": (
        "aria aria_text deepseek_ocr2 deepseek_ocr2_text dots3_note dots3_note_text ernie4_5_vl_moe "
        "ernie4_5_vl_moe_text glm4v_moe glm4v_moe_text minimax_m3_vl minimax_m3_vl_text qwen3_omni_moe "
        "qwen3_omni_moe_text qwen3_omni_moe_talker_text qwen3_vl_moe qwen3_vl_moe_text unlimited_ocr "
        "unlimited_ocr_text vitpose_backbone"
    ),
}

NOT_COMPUTED: Mapping[str, str] = MappingProxyType(
    {name: reason for reason, names in _BY_REASON.items() for name in names.split()}
)
"""The reason by `model_type`."""
