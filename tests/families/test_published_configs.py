"""Config.json files in the form in which models were published: understood, and of as many parameters as the model has.

The files in `published/` carry what config classes do not know: fields of the code that trained the model, and of the
libraries that passed it on. Phi-3's 96 divisors are stand-ins. The configs of families with experts were written from
the published sizes, not copied, so such fields may be missing there. How many parameters a model has is published
beside it, so a size that is read wrongly shows.
"""

from typing import Any

import pytest

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import ParsedConfig, find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.table import Heads
from twinfer.spec.counts import total
from twinfer.spec.errors import ConfigError

from .published_config import PUBLISHED, published

PARAMETERS: dict[str, int | str] = {
    "all-minilm-l6-v2": 22_565_376,
    "aya-expanse-8b": 8_028_033_024,
    "bert-base-multilingual-cased": 177_262_848,
    "bert-base-uncased": 108_891_648,
    "bloom-560m": 559_214_592,
    "camembert-base": 110_031_360,
    "clip-vit-base-patch32": 63_165_952,
    "command-r": 34_980_831_232,
    "command-r-08-2024": 32_296_476_672,
    "command-r7b": 8_028_033_024,
    "command-r-plus": 103_810_674_688,
    "dbrx-instruct": 131_596_523_520,
    "distilbert-base-uncased": 66_362_880,
    "distilgpt2": 81_912_576,
    "dots.llm1": "143B",
    "ernie-4.5-21b-a3b": "21.8B",
    "falcon-11b": "11B",
    "falcon-40b": 41_303_293_952,
    "falcon-40b-first": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "falcon-7b-first": 6_921_720_704,
    "falcon-rw-1b": 1_311_625_216,
    "flexolmo-7x7b": "33B",
    "galactica-6.7b": "6.7B",
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-2b-first": 2_506_172_416,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "glm-4.5-air": "107B",
    "flint": "39.8B",
    "gpt-j-6b": 6_050_882_784,
    "gpt-neo-125m": 125_198_592,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-oss-20b": 20_914_757_184,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "granite-3.0-1b-a400m": "1.3B",
    "granite-3.0-2b": 2_533_531_648,
    "granite-swash-3b-a600m": "3B",
    "hunyuan-a13b": "80B",
    "hy3": "295B",
    "internlm2-7b": 7_737_708_544,
    "k-exaone-236b-a23b": "237B",
    "llama-3.2-1b-unsloth": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-7b": 6_738_415_616,
    "mellum2-12b-a2.5b": "12B",
    "minimax-m2": "229B",
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-7b": 6_649_286_656,
    "mpt-7b-llm-foundry": 6_649_286_656,
    "mpt-7b-storywriter": 6_649_286_656,
    "north-mini-code-1.0": "30B",
    "olmo-2-7b": 7_298_617_344,
    "olmoe-1b-7b": 6_919_161_856,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "phi-2": 2_779_683_840,
    "phi-2-first": 2_779_683_840,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3.5-moe": 41_873_153_344,
    "phi-4": 14_659_507_200,
    "pythia-160m": 162_322_944,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-8b": 8_190_735_360,
    "qwen3-0.6b": 596_049_920,
    "roberta-base": 124_055_040,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "solar-open-100b": "103B",
    "stable-diffusion-text-encoder": 123_060_480,
    "stablelm-2-1_6b": 1_644_515_328,
    "stablelm-2-12b": "12B",
    "stablelm-zephyr-3b": 2_795_443_200,
    "starcoder": 15_517_456_384,
    "starcoder2-15b": 15_957_889_024,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "vicuna-7b-v1.5-16k": 6_738_415_616,
    "xlm-roberta-base": 277_453_056,
}
"""As published, exactly, or to the digits of the model's name. Encoders without the poolers and heads that are not
read, CLIP's text tower alone without its projection, a tied head once."""


def understood(values: dict[str, Any]) -> ParsedConfig:
    fields = Fields(values, "config.json: ")
    return parse_config(find(FAMILIES, fields), fields)


def in_the_file(values: dict[str, Any]) -> int:
    """Our count, as the model's makers count: with rows of positions that are never used, and a gain that all heads
    share once."""
    meaning, table = understood(values), find(FAMILIES, Fields(values, "")).table
    count = total(meaning.config).parameters + meaning.first_position * meaning.config.hidden
    if any(entry.heads is Heads.SHARED for entry in table.layer):
        for layer in meaning.config.layers:
            attention = layer.attention
            if attention.qk_norm is not None:
                count -= (attention.heads - 1 + attention.kv_heads - 1) * attention.head_size
    return count


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configs_are_understood_to_the_last_parameter(name: str) -> None:
    count, said = in_the_file(published(name)), PARAMETERS[name]
    if isinstance(said, str):
        digits = len(said.partition(".")[2].removesuffix("B"))
        assert f"{count / 1e9:.{digits}f}B" == said
    else:
        assert count == said


def test_every_published_file_is_tried_and_every_family_has_one() -> None:
    """But Megatron's GPT, whose checkpoints come with Megatron's arguments, which nobody published as config.json, and
    Granite MoE with a shared MLP, of which no model was published."""
    assert {path.stem for path in PUBLISHED.iterdir()} == set(PARAMETERS)
    assert {published(name)["model_type"] for name in PARAMETERS} == {
        family.model_type for family in FAMILIES if family.model_type not in ("megatron_gpt", "granitemoeshared")
    }


REFUSED: list[tuple[str, str, object]] = [
    ("starcoder2-3b", "mlp_type", "gated"),
    ("starcoder2-3b", "norm_type", "rms_norm"),
    ("starcoder2-3b", "scale_attn_weights", False),
    ("starcoder2-3b", "layer_norm_epsilon", 1e-6),
    ("galactica-6.7b", "learned_embeddings", False),
    ("galactica-6.7b", "scale_embeddings", True),
    ("gpt2-medium", "n_special", 2),
    ("aya-expanse-8b", "position_embedding_type", "rope_neox"),
    ("aya-expanse-8b", "rotary_pct", 0.5),
    ("aya-expanse-8b", "use_embedding_sharing", False),
    ("aya-expanse-8b", "use_gated_activation", False),
    ("aya-expanse-8b", "use_parallel_block", False),
    ("vicuna-7b-v1.5-16k", "max_sequence_length", 8192),
    ("stablelm-zephyr-3b", "num_heads", 16),
    ("stablelm-zephyr-3b", "rotary_scaling_factor", 2.0),
    ("gemma-3-270m", "sliding_window_pattern", 5),
    ("granite-swash-3b-a600m", "layer_rope_theta", [0] * 27),
    ("granite-swash-3b-a600m", "layer_rope_theta", [False] * 28),
    ("hy3", "expert_hidden_dim", 1024),
    ("hy3", "mlp_layer_types", ["sparse"] * 79),
    ("hy3", "moe_router_enable_expert_bias", False),
    ("hy3", "moe_router_use_sigmoid", False),
    ("hy3", "qk_norm", False),
    ("hy3", "route_norm", False),
    ("k-exaone-236b-a23b", "is_moe_layer", [True] * 48),
    ("k-exaone-236b-a23b", "scoring_func", "softmax"),
    ("k-exaone-236b-a23b", "topk_method", "greedy"),
    ("mellum2-12b-a2.5b", "decoder_sparse_step", 2),
    ("mellum2-12b-a2.5b", "mlp_only_layers", [0]),
    ("mellum2-12b-a2.5b", "use_sliding_window", False),
    ("north-mini-code-1.0", "expert_selection_fn", "tanh"),
    ("north-mini-code-1.0", "first_k_dense_replace", 50),
    ("north-mini-code-1.0", "shared_expert_combination_strategy", "concatenate"),
    ("north-mini-code-1.0", "use_parallel_block", False),
    ("north-mini-code-1.0", "use_qk_norm", True),
    ("mpt-7b-llm-foundry", "norm_type", "rmsnorm"),
    ("mpt-7b-llm-foundry", "fc_type", "te"),
    ("mpt-7b-llm-foundry", "layer_norm_epsilon", 1e-6),
    ("mpt-7b-llm-foundry", "final_logit_softcapping", 30.0),
    ("mpt-7b-llm-foundry", "block_overrides", {"order": [{"name": "default"}]}),
    ("mpt-7b-llm-foundry", "attn_config.attn_logit_softcapping", 50.0),
    ("mpt-7b-llm-foundry", "attn_config.fused_qkv", False),
    ("mpt-7b-llm-foundry", "attn_config.kv_n_heads", 8),
    ("mpt-7b-llm-foundry", "attn_config.qk_gn", True),
    ("mpt-7b-llm-foundry", "attn_config.rope", True),
    ("mpt-7b-llm-foundry", "attn_config.sliding_window_size", 1024),
    ("mpt-7b-llm-foundry", "ffn_config.ffn_type", "mptglu"),
    ("mpt-7b-llm-foundry", "ffn_config.ffn_act_fn", {"name": "silu"}),
]
"""A field of each file, and a value of it that contradicts the others, or that is not computed."""


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_those_fields_may_not_say_is_refused(name: str, field: str, value: object) -> None:
    values = published(name)
    *section, last = field.split(".")
    (values[section[0]] if section else values)[last] = value
    with pytest.raises(ConfigError, match=rf"\b{last}\b"):
        understood(values)


def test_the_context_goes_by_two_names() -> None:
    """LLaMA's first files have the older alone; where they disagree without a scaling between them, neither counts."""
    first, extended = published("llama-7b"), published("vicuna-7b-v1.5-16k")
    assert understood(first).config.context == 2048
    assert understood(extended).config.context == 4096
    with pytest.raises(ConfigError, match="max_sequence_length is 2048"):
        understood(first | {"max_position_embeddings": 4096})
    del first["max_sequence_length"]
    with pytest.raises(ConfigError, match="max_position_embeddings is missing"):
        understood(first)


def test_minimax_turns_as_much_of_a_head_as_its_own_field_says() -> None:
    """Its files have `rotary_dim` alone; what transformers saves has the part of a head besides."""
    for size in (64, 32):
        layer = understood(published("minimax-m2") | {"rotary_dim": size}).config.layers[0]
        assert layer.attention.rotary is not None
        assert layer.attention.rotary.size == size


def test_a_width_in_mpts_own_section_counts() -> None:
    values = published("mpt-7b-llm-foundry")
    values["ffn_config"]["ffn_hidden_size"] = 11008
    assert understood(values).config.layers[0].dense_mlp.width == 11008
