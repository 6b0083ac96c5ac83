"""Published families against transformers: tiny random models, our truth beside their float32.

Every convention that the configs can express stands in some model here as its authors' library computes it. What
transformers returns must lie within the budget of our float64 truth, as any other float32 implementation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from twinfer.oracle.budget import judge_rows
from twinfer.oracle.paths import WHOLE_MODEL
from twinfer.oracle.scale import linear_scale
from twinfer.oracle.yardstick import Yardstick, worst_of
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    QkNormSpan,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, assemble

HIDDEN, HEADS, KV_HEADS, SIZE, WIDTH, VOCABULARY, CONTEXT, LAYERS = 24, 4, 2, 6, 40, 50, 32, 2
Named = dict[str, Tensor]
RMS = NormConfig(kind=NormKind.RMS, epsilon=1e-6)
LAYER = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
BIASLESS = NormConfig(kind=NormKind.LAYER, epsilon=1e-5, bias=False)


@dataclass(frozen=True)
class Given:
    """A weight source of named tensors."""

    config: ModelConfig
    ends: tuple[Named, Named]
    layers: list[Named]

    def embedding(self) -> EmbeddingWeights:
        return assemble(EmbeddingWeights, self.ends[0])

    def layer(self, index: int) -> LayerWeights:
        return assemble(LayerWeights, self.layers[index])

    def head(self) -> HeadWeights:
        return assemble(HeadWeights, self.ends[1])


def named(**modules: Any) -> Named:
    """Weights and biases of linear maps and norms; `attention__query` names attention.query."""
    found = {}
    for name, module in modules.items():
        is_linear = module.weight.ndim == 2
        prefix = name.replace("__", ".")
        found[f"{prefix}.{'weight_NI' if is_linear else 'gain_M'}"] = module.weight.detach()
        if getattr(module, "bias", None) is not None:
            found[f"{prefix}.{'bias_N' if is_linear else 'bias_M'}"] = module.bias.detach()
    return found


def separate(module: torch.nn.Linear) -> Named:
    """Query, key and value of a projection whose rows stand head by head: those of the first head come first."""
    found = {}
    for index, name in enumerate(("query", "key", "value")):
        rows = module.weight.detach().view(HEADS, 3, SIZE, -1)[:, index]
        found[f"attention.{name}.weight_NI"] = rows.reshape(HEADS * SIZE, -1)
        found[f"attention.{name}.bias_N"] = module.bias.detach().view(HEADS, 3, SIZE)[:, index].flatten()
    return found


def frequencies(size: int) -> Named:
    exponent_J = torch.arange(0, size, 2, dtype=torch.float64) / size
    return {"attention.rotary_frequency_J": 10000.0**-exponent_J}


def slopes() -> Named:
    return {"attention.alibi_slope_H": 2.0 ** (-8 * torch.arange(1, HEADS + 1, dtype=torch.float64) / HEADS)}


def projections(attention: Any, output: str) -> Named:
    return named(
        attention__query=attention.q_proj,
        attention__key=attention.k_proj,
        attention__value=attention.v_proj,
        attention__output=getattr(attention, output),
    )


def llama_like(layer: Any) -> Named:
    return {
        **projections(layer.self_attn, "o_proj"),
        **named(mlp__gate=layer.mlp.gate_proj, mlp__up=layer.mlp.up_proj, mlp__down=layer.mlp.down_proj),
        **frequencies(SIZE),
    }


def attention(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"heads": HEADS, "kv_heads": HEADS, "head_size": SIZE, "scale": SIZE**-0.5, **fields})


def grouped(**fields: Any) -> AttentionConfig:
    rotary = RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=SIZE)
    return attention(**{"kv_heads": KV_HEADS, "rotary": rotary, **fields})


GATED = MlpConfig(width=WIDTH, activation=Activation.SILU, gated=True)
BIASED = {"qkv_bias": True, "output_bias": True}


def plain(activation: Activation, *, bias: bool = True) -> MlpConfig:
    return MlpConfig(width=WIDTH, activation=activation, gated=False, bias=bias)


def model(*layers: LayerConfig, **fields: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "family": "test",
            "hidden": HIDDEN,
            "vocabulary": VOCABULARY,
            "context": CONTEXT,
            "layers": layers if len(layers) > 1 else layers * LAYERS,
            "final_norm": layers[0].norm,
            "learned_positions": False,
            "head": Head.TIED,
            **fields,
        }
    )


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
GROUPED = {**SIZES, "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "tie_word_embeddings": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
Twin = tuple[Any, Callable[[Any], Given]]


def olmo2() -> Twin:
    """Norms after attention and MLP; queries and keys normed over all heads."""
    layer = LayerConfig(
        norm=RMS,
        attention=grouped(qk_norm=RMS, qk_norm_span=QkNormSpan.ALL_HEADS),
        mlp=GATED,
        norm_placement=NormPlacement.AFTER,
    )

    def given(theirs: Any) -> Given:
        layers = [
            llama_like(each)
            | named(
                attention_output_norm=each.post_attention_layernorm,
                mlp_output_norm=each.post_feedforward_layernorm,
                attention__query_norm=each.self_attn.q_norm,
                attention__key_norm=each.self_attn.k_norm,
            )
            for each in theirs.model.layers
        ]
        ends = {"token_VE": theirs.model.embed_tokens.weight.detach()}, named(norm=theirs.model.norm)
        return Given(model(layer), ends, layers)

    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED, rms_norm_eps=1e-6)), given


def gemma2() -> Twin:
    """Norms around both, gains from one, capped scores and logits, scaled embeddings, windows on every other layer."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-6, gain_from_one=True)
    layers = [
        LayerConfig(
            norm=norm,
            attention=grouped(scale=9**-0.5, softcap=3.0, window=window),
            mlp=MlpConfig(width=WIDTH, activation=Activation.GELU_TANH, gated=True),
            norm_placement=NormPlacement.AROUND,
        )
        for window in (4, None)
    ]
    config = model(*layers, embedding_scale=HIDDEN**0.5, logit_softcap=2.0)

    def given(theirs: Any) -> Given:
        named_layers = [
            llama_like(each)
            | named(
                attention_norm=each.input_layernorm,
                attention_output_norm=each.post_attention_layernorm,
                mlp_norm=each.pre_feedforward_layernorm,
                mlp_output_norm=each.post_feedforward_layernorm,
            )
            for each in theirs.model.layers
        ]
        ends = {"token_VE": theirs.model.embed_tokens.weight.detach()}, named(norm=theirs.model.norm)
        return Given(config, ends, named_layers)

    options = {
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, **options)), given


def pre_norm(theirs: Any, config: ModelConfig, more: Callable[[Any], Named] = lambda layer: {}) -> Given:
    """LLaMA's names."""
    layers = [
        llama_like(each)
        | named(attention_norm=each.input_layernorm, mlp_norm=each.post_attention_layernorm)
        | more(each)
        for each in theirs.model.layers
    ]
    ends = {"token_VE": theirs.model.embed_tokens.weight.detach()}, named(norm=theirs.model.norm)
    return Given(config, ends, layers)


def qwen3() -> Twin:
    """Queries and keys normed head by head, all heads with the same gains."""

    def gains(layer: Any) -> Named:
        query, key = layer.self_attn.q_norm.weight.detach(), layer.self_attn.k_norm.weight.detach()
        return {
            "attention.query_norm.gain_M": query.repeat(HEADS),
            "attention.key_norm.gain_M": key.repeat(KV_HEADS),
        }

    config = model(LayerConfig(norm=RMS, attention=grouped(qk_norm=RMS), mlp=GATED))
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)), lambda theirs: pre_norm(theirs, config, gains)


def granite() -> Twin:
    """Embeddings, residuals, scores and logits scaled."""
    layer = LayerConfig(norm=RMS, attention=grouped(scale=0.3), mlp=GATED, residual_scale=0.25)
    options = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    }
    config = model(layer, embedding_scale=3.0, logit_scale=0.5)
    return hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED, **options)), lambda theirs: pre_norm(theirs, config)


def cohere() -> Twin:
    """Attention beside MLP, one norm without bias for both, interleaved rotation, centred norms of queries and keys."""
    layer = LayerConfig(
        norm=BIASLESS,
        attention=grouped(rotary=RotaryConfig(layout=RotaryLayout.INTERLEAVED, size=SIZE), qk_norm=BIASLESS),
        mlp=GATED,
        residual=Residual.PARALLEL_SHARED_NORM,
    )

    def given(theirs: Any) -> Given:
        layers = [
            llama_like(each)
            | named(attention_norm=each.input_layernorm)
            | {
                "attention.query_norm.gain_M": each.self_attn.q_norm.weight.detach().flatten(),
                "attention.key_norm.gain_M": each.self_attn.k_norm.weight.detach().flatten(),
            }
            for each in theirs.model.layers
        ]
        ends = {"token_VE": theirs.model.embed_tokens.weight.detach()}, named(norm=theirs.model.norm)
        return Given(model(layer, logit_scale=0.0625), ends, layers)

    return hf.CohereForCausalLM(
        hf.CohereConfig(**GROUPED, use_qk_norm=True, logit_scale=0.0625, rope_parameters=ROPE)
    ), given


def gpt_neox() -> Twin:
    """Attention beside MLP with two norms; a third of each head rotates."""
    layer = LayerConfig(
        norm=LAYER,
        attention=attention(rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=2), **BIASED),
        mlp=plain(Activation.GELU),
        residual=Residual.PARALLEL,
    )

    def given(theirs: Any) -> Given:
        layers = [
            separate(each.attention.query_key_value)
            | frequencies(2)
            | named(
                attention__output=each.attention.dense,
                attention_norm=each.input_layernorm,
                mlp_norm=each.post_attention_layernorm,
                mlp__up=each.mlp.dense_h_to_4h,
                mlp__down=each.mlp.dense_4h_to_h,
            )
            for each in theirs.gpt_neox.layers
        ]
        ends = (
            {"token_VE": theirs.gpt_neox.embed_in.weight.detach()},
            named(norm=theirs.gpt_neox.final_layer_norm, projection=theirs.get_output_embeddings()),
        )
        return Given(model(layer, head=Head.OWN), ends, layers)

    rope = {**ROPE, "partial_rotary_factor": 0.34}
    config = hf.GPTNeoXConfig(**SIZES, rope_parameters=rope, use_parallel_residual=True, layer_norm_eps=1e-5)
    return hf.GPTNeoXForCausalLM(config), given


def gptj() -> Twin:
    """Attention beside MLP with one norm, interleaved rotation of a part, a bias on the head."""
    layer = LayerConfig(
        norm=LAYER,
        attention=attention(rotary=RotaryConfig(layout=RotaryLayout.INTERLEAVED, size=4)),
        mlp=plain(Activation.GELU_TANH),
        residual=Residual.PARALLEL_SHARED_NORM,
    )

    def given(theirs: Any) -> Given:
        layers = [
            projections(each.attn, "out_proj")
            | frequencies(4)
            | named(attention_norm=each.ln_1, mlp__up=each.mlp.fc_in, mlp__down=each.mlp.fc_out)
            for each in theirs.transformer.h
        ]
        head = named(norm=theirs.transformer.ln_f) | {
            "projection.weight_NI": theirs.lm_head.weight.detach(),
            "bias_V": theirs.lm_head.bias.detach(),
        }
        ends = {"token_VE": theirs.transformer.wte.weight.detach()}, head
        return Given(model(layer, head=Head.OWN, head_bias=True), ends, layers)

    config = hf.GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        rotary_dim=4,
        n_inner=WIDTH,
    )
    return hf.GPTJForCausalLM(config), given


def bloom() -> Twin:
    """ALiBi, and a norm of the embeddings."""
    mlp = MlpConfig(width=4 * HIDDEN, activation=Activation.GELU_TANH, gated=False, bias=True)
    layer = LayerConfig(norm=LAYER, attention=attention(alibi=True, **BIASED), mlp=mlp)

    def given(theirs: Any) -> Given:
        layers = [
            separate(each.self_attention.query_key_value)
            | slopes()
            | named(
                attention__output=each.self_attention.dense,
                attention_norm=each.input_layernorm,
                mlp_norm=each.post_attention_layernorm,
                mlp__up=each.mlp.dense_h_to_4h,
                mlp__down=each.mlp.dense_4h_to_h,
            )
            for each in theirs.transformer.h
        ]
        tokens = {"token_VE": theirs.transformer.word_embeddings.weight.detach()}
        embedding = tokens | named(norm=theirs.transformer.word_embeddings_layernorm)
        return Given(model(layer, embedding_norm=LAYER), (embedding, named(norm=theirs.transformer.ln_f)), layers)

    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    return hf.BloomForCausalLM(config), given


def mpt() -> Twin:
    """ALiBi, queries, keys and values clipped, no bias anywhere."""
    mlp = MlpConfig(width=4 * HIDDEN, activation=Activation.GELU, gated=False)
    layer = LayerConfig(norm=BIASLESS, attention=attention(alibi=True, qkv_clip=0.75), mlp=mlp)

    def given(theirs: Any) -> Given:
        layers = []
        for each in theirs.transformer.blocks:
            query, key, value = each.attn.Wqkv.weight.detach().chunk(3)
            of_attention = {"query": query, "key": key, "value": value}
            layers.append(
                slopes()
                | {f"attention.{name}.weight_NI": weight_NI for name, weight_NI in of_attention.items()}
                | named(
                    attention__output=each.attn.out_proj,
                    attention_norm=each.norm_1,
                    mlp_norm=each.norm_2,
                    mlp__up=each.ffn.up_proj,
                    mlp__down=each.ffn.down_proj,
                )
            )
        ends = {"token_VE": theirs.transformer.wte.weight.detach()}, named(norm=theirs.transformer.norm_f)
        return Given(model(layer), ends, layers)

    config = hf.MptConfig(d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, vocab_size=VOCABULARY, max_seq_len=CONTEXT)
    config.attn_config.clip_qkv = 0.75
    return hf.MptForCausalLM(config), given


def opt_350m() -> Twin:
    """Sums normed, no final norm, a table narrower than the hidden vector, positions counted from 2."""
    layer = LayerConfig(
        norm=LAYER,
        attention=attention(**BIASED),
        mlp=plain(Activation.RELU),
        norm_placement=NormPlacement.ON_SUM,
    )

    def given(theirs: Any) -> Given:
        decoder = theirs.model.decoder
        layers = [
            projections(each.self_attn, "out_proj")
            | named(
                attention_output_norm=each.self_attn_layer_norm,
                mlp_output_norm=each.final_layer_norm,
                mlp__up=each.fc1,
                mlp__down=each.fc2,
            )
            for each in decoder.layers
        ]
        embedding = {
            "token_VE": decoder.embed_tokens.weight.detach(),
            "position_PM": decoder.embed_positions.weight.detach()[2:],
        } | named(projection=decoder.project_in)
        config = model(layer, learned_positions=True, embedding_size=10, final_norm=None)
        return Given(config, (embedding, named(reduction=decoder.project_out)), layers)

    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    config = hf.OPTConfig(**sizes, ffn_dim=WIDTH, do_layer_norm_before=False, word_embed_proj_dim=10)
    return hf.OPTForCausalLM(config), given


def bert() -> Twin:
    """An encoder: every token sees every other; sums normed, token types."""
    layer = LayerConfig(
        norm=LAYER,
        attention=attention(causal=False, **BIASED),
        mlp=plain(Activation.GELU),
        norm_placement=NormPlacement.ON_SUM,
    )

    def given(theirs: Any) -> Given:
        layers = [
            named(
                attention__query=each.attention.self.query,
                attention__key=each.attention.self.key,
                attention__value=each.attention.self.value,
                attention__output=each.attention.output.dense,
                attention_output_norm=each.attention.output.LayerNorm,
                mlp__up=each.intermediate.dense,
                mlp__down=each.output.dense,
                mlp_output_norm=each.output.LayerNorm,
            )
            for each in theirs.encoder.layer
        ]
        tables = theirs.embeddings
        embedding = {
            "token_VE": tables.word_embeddings.weight.detach(),
            "position_PM": tables.position_embeddings.weight.detach(),
            "type_YM": tables.token_type_embeddings.weight.detach(),
        } | named(norm=tables.LayerNorm)
        options = {"learned_positions": True, "token_types": 2, "embedding_norm": LAYER}
        return Given(model(layer, head=Head.NONE, final_norm=None, **options), (embedding, {}), layers)

    return hf.BertModel(hf.BertConfig(**SIZES, layer_norm_eps=1e-5), add_pooling_layer=False), given


def clip_text() -> Twin:
    """A causal encoder; GELU by a sigmoid."""
    layer = LayerConfig(norm=LAYER, attention=attention(**BIASED), mlp=plain(Activation.GELU_SIGMOID))

    def given(theirs: Any) -> Given:
        text = getattr(theirs, "text_model", theirs)
        layers = [
            projections(each.self_attn, "out_proj")
            | named(
                attention_norm=each.layer_norm1,
                mlp_norm=each.layer_norm2,
                mlp__up=each.mlp.fc1,
                mlp__down=each.mlp.fc2,
            )
            for each in text.encoder.layers
        ]
        embedding = {
            "token_VE": text.embeddings.token_embedding.weight.detach(),
            "position_PM": text.embeddings.position_embedding.weight.detach(),
        }
        ends = embedding, named(norm=text.final_layer_norm)
        return Given(model(layer, learned_positions=True, head=Head.NONE), ends, layers)

    return hf.CLIPTextModel(hf.CLIPTextConfig(**SIZES, hidden_act="quick_gelu", eos_token_id=1)), given


FAMILIES = (olmo2, gemma2, qwen3, granite, cohere, gpt_neox, gptj, bloom, mpt, opt_350m, bert, clip_text)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.__name__ for family in FAMILIES])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_what_transformers_computes_is_within_the_budget(family: Callable[[], Twin], seed: int) -> None:
    theirs, given = family()
    theirs.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    source = given(theirs.eval())
    token_T = torch.randint(2, VOCABULARY, (9,), generator=generator)
    out = theirs(token_T[None], use_cache=False) if source.config.extensible else theirs(token_T[None])
    yardstick = Yardstick.of(source)
    (hidden_TE,), runs = yardstick.truth.encode([token_T]), [eager.encode([token_T])[0] for eager in yardstick.eager]
    if source.config.extensible:
        projection = yardstick.truth.weights.projection
        truth, got = yardstick.truth.logits(hidden_TE), out.logits[0]
        runs = [eager.logits(run) for eager, run in zip(yardstick.eager, runs, strict=True)]
        scale = source.config.logit_scale * linear_scale(hidden_TE.abs(), projection)
    else:
        truth, got, scale = hidden_TE, out.last_hidden_state[0], hidden_TE.abs()
    scale = scale.amax(-1, keepdim=True)
    verdict = judge_rows(WHOLE_MODEL, "R V", got, worst_of(runs, truth), truth, scale)
    assert not verdict.failed, f"{verdict.complaint} {verdict.details}"
