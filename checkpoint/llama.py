"""LLaMA 1, 2 and 3, SmolLM, and Mistral: RMS norms, rotary positions, grouped heads, gated MLPs."""

from ..spec.config import (
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from . import rotary
from .family import ACTIVATIONS, Family, Understood, head_size
from .fields import MOST_LAYERS, Fields
from .table import Ignorable, Stored, Table

TABLE = Table(
    prefix="model.",
    embedding=(Stored(name="embed_tokens.weight", fills=("token_VE",)),),
    layer=(
        Stored(name="layers.{layer}.input_layernorm.weight", fills=("attention_norm.gain_M",)),
        Stored(name="layers.{layer}.self_attn.q_proj.weight", fills=("attention.query.weight_NI",)),
        Stored(name="layers.{layer}.self_attn.q_proj.bias", fills=("attention.query.bias_N",)),
        Stored(name="layers.{layer}.self_attn.k_proj.weight", fills=("attention.key.weight_NI",)),
        Stored(name="layers.{layer}.self_attn.k_proj.bias", fills=("attention.key.bias_N",)),
        Stored(name="layers.{layer}.self_attn.v_proj.weight", fills=("attention.value.weight_NI",)),
        Stored(name="layers.{layer}.self_attn.v_proj.bias", fills=("attention.value.bias_N",)),
        Stored(name="layers.{layer}.self_attn.o_proj.weight", fills=("attention.output.weight_NI",)),
        Stored(name="layers.{layer}.self_attn.o_proj.bias", fills=("attention.output.bias_N",)),
        Stored(name="layers.{layer}.post_attention_layernorm.weight", fills=("mlp_norm.gain_M",)),
        Stored(name="layers.{layer}.mlp.gate_proj.weight", fills=("mlp.gate.weight_NI",)),
        Stored(name="layers.{layer}.mlp.gate_proj.bias", fills=("mlp.gate.bias_N",)),
        Stored(name="layers.{layer}.mlp.up_proj.weight", fills=("mlp.up.weight_NI",)),
        Stored(name="layers.{layer}.mlp.up_proj.bias", fills=("mlp.up.bias_N",)),
        Stored(name="layers.{layer}.mlp.down_proj.weight", fills=("mlp.down.weight_NI",)),
        Stored(name="layers.{layer}.mlp.down_proj.bias", fills=("mlp.down.bias_N",)),
    ),
    head=(
        Stored(name="norm.weight", fills=("norm.gain_M",)),
        Stored(name="lm_head.weight", fills=("projection.weight_NI",)),
    ),
    ignorable=(
        Ignorable(
            name="layers.{layer}.self_attn.rotary_emb.inv_freq",
            why="rotary frequencies, rounded to the file's dtype; they follow from the config, and are made from it",
        ),
    ),
)


def _read(config: Fields, *, biases: bool, window: int | None) -> Understood:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    size = config.integer("head_dim") if config.has("head_dim") else head_size(config, hidden, heads)
    attention_bias = config.flag("attention_bias", False) if biases else False
    norm = NormConfig(kind=NormKind.RMS, epsilon=config.number("rms_norm_eps", 1e-6))
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", heads),
            head_size=size,
            scale=size**-0.5,
            window=window,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=size),
            qkv_bias=attention_bias,
            output_bias=attention_bias,
        ),
        mlp=MlpConfig(
            width=config.integer("intermediate_size"),
            activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
            gated=True,
            bias=config.flag("mlp_bias", False) if biases else False,
        ),
    )
    model = ModelConfig(
        family=config.text("model_type", "llama"),
        hidden=hidden,
        vocabulary=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings"),
        layers=(layer,) * config.integer("num_hidden_layers", most=MOST_LAYERS),
        final_norm=norm,
        learned_positions=False,
        head=Head.TIED if config.flag("tie_word_embeddings", False) else Head.OWN,
    )
    config.only("partial_rotary_factor", 1.0)
    frequency_J = rotary.from_config(config, size)
    return Understood(config=model, frequencies=(frequency_J,) * len(model.layers))


def _read_llama(config: Fields) -> Understood:
    config.only("rope_interleaved", False)
    return _read(config, biases=True, window=None)


def _read_mistral(config: Fields) -> Understood:
    return _read(config, biases=False, window=config.optional_integer("sliding_window", 4096))


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    read=_read_llama,
    table=TABLE,
    harmless=("is_llama_config",),
)

MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    read=_read_mistral,
    table=TABLE,
)
