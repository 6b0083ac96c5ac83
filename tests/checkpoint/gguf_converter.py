"""What llama.cpp's converter does, architecture by architecture: to the rows of a tensor, and which keys it writes."""

import gguf
import numpy as np
from transformers import PreTrainedConfig as Config

Rows = np.ndarray

# What the converter does to a tensor, known by its GGUF name.


def kept(name: str, rows: Rows, config: Config) -> Rows:
    return rows


def permuted(name: str, rows: Rows, config: Config) -> Rows:
    """Row j of a head's first half goes to 2j, of its second half to 2j + 1."""
    if not (".attn_q." in name or ".attn_k." in name):
        return rows
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def offset(name: str, rows: Rows, config: Config) -> Rows:
    return rows + np.float32(1) if name.endswith("norm.weight") else rows


def by_kind(name: str, rows: Rows, config: Config) -> Rows:
    """Rows that stand group by group (queries, then a key, then a value): all queries, all keys, all values."""
    if "attn_qkv" not in name:
        return rows
    groups = getattr(config, "num_kv_heads", config.num_attention_heads)
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        groups = 1 if config.multi_query else config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    grouped = rows.reshape(groups, -1, size, *rows.shape[1:])
    kinds = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    return np.concatenate([kind.reshape(-1, *rows.shape[1:]) for kind in kinds])


def turned(name: str, rows: Rows, config: Config) -> Rows:
    """GPT-2's linear layers are kept as [inputs, outputs]."""
    turning = any(
        part in name for part in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    )
    return rows.T.copy() if turning else rows


# Which keys it writes.


def base_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """Of a config with LLaMA's names."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name in ("layer_norm_eps", "norm_epsilon"):
        if hasattr(config, name):
            writer.add_layer_norm_eps(getattr(config, name))
    rope_keys(writer, config)
    writer.add_file_type(0)


def rope_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])


def llama_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    writer.add_vocab_size(config.vocab_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)


def granite_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    llama_keys(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def olmo_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    if config.model_type == "olmo3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def phi3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    rope = config.rope_parameters
    size = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * size))
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def gemma_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    if config.model_type != "gemma" and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def partly_rotating_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """StableLM, Phi and GPT-NeoX, which write this in their own ways."""
    base_keys(writer, config)
    size = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * size))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)


def cohere_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if config.model_type == "cohere2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def gpt_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """GPT-2, StarCoder, BLOOM, Falcon and MPT: no key for what all their models share."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(getattr(config, "n_positions", getattr(config, "max_seq_len", 40)))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", 1e-5))
    if config.model_type == "gpt_bigcode":
        writer.add_head_count_kv(1)
    if config.model_type == "falcon":
        writer.add_tensor_data_layout("jploski")
        multi = 1 if config.multi_query else config.num_attention_heads
        writer.add_head_count_kv(config.num_kv_heads if config.new_decoder_architecture else multi)
    if config.model_type == "mpt":
        writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
        if config.attn_config.clip_qkv is not None:
            writer.add_clamp_kqv(config.attn_config.clip_qkv)


def bert_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config.type_vocab_size)
