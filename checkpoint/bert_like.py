"""What BERT and the encoders that descend from it share: names, and layers whose sums are normalized."""

from typing import Any

from ..spec.config import Head, LayerConfig, ModelConfig, NormConfig, NormPlacement
from .family import ParsedConfig, layer_norm
from .fields import Fields
from .gpt_like import layer_count, model, multi_head, plain_mlp
from .table import POSITION_IDS, Ignorable, Table, linear, norm, tensor

IGNORED = {"tie_word_embeddings": "of the masked-language head alone"}
"""Fields that leave every encoder's hidden vectors unchanged."""


def table(prefix: str, *heads: Ignorable) -> Table:
    """BERT's names, with those of the heads that it was trained under."""
    return Table(
        prefix=prefix,
        layers="encoder.layer.{layer}.",
        embedding=(
            tensor("embeddings.word_embeddings.weight", "token_VW"),
            tensor("embeddings.position_embeddings.weight", "position_PM"),
            tensor("embeddings.token_type_embeddings.weight", "type_YM"),
            *norm("embeddings.LayerNorm", "norm"),
        ),
        layer=(
            *linear("attention.self.query", "attention.query"),
            *linear("attention.self.key", "attention.key"),
            *linear("attention.self.value", "attention.value"),
            *linear("attention.output.dense", "attention.output"),
            *norm("attention.output.LayerNorm", "attention_output_norm"),
            *linear("intermediate.dense", "mlp.up"),
            *linear("output.dense", "mlp.down"),
            *norm("output.LayerNorm", "mlp_output_norm"),
        ),
        head=(),
        ignorable=(
            POSITION_IDS,
            *unused("pooler.dense", why="a further layer over the first token, for classifiers"),
            *heads,
        ),
        older_ends=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    )


def unused(*modules: str, why: str) -> tuple[Ignorable, ...]:
    """The weight and bias of modules that follow the hidden vectors."""
    return tuple(Ignorable(name=f"{each}.{kind}", why=why) for each in modules for kind in ("weight", "bias"))


def layer(config: Fields, norm: NormConfig, *, hidden: str, heads: str, width: str, activation: str) -> LayerConfig:
    """An encoder's layer whose sums are normalized, from fields of these names."""
    return LayerConfig(
        norm=norm,
        attention=multi_head(config, config.integer(hidden), config.integer(heads), causal=False),
        mlp=plain_mlp(config, config.integer(width), activation, "gelu"),
        norm_placement=NormPlacement.POST_NORM,
    )


def encoder(config: Fields, family: str, hidden: str, layers: tuple[LayerConfig, ...], **other: Any) -> ModelConfig:
    """Layers behind normalized embeddings, without a final norm or a head."""
    plain: dict[str, Any] = {
        "final_norm": None,
        "learned_positions": True,
        "head": Head.NONE,
        "embedding_norm": layers[0].norm,
    }
    return model(config, family, config.integer(hidden), layers, **plain, **other)


def read(config: Fields, *, first_position: int = 0) -> ParsedConfig:
    """A config with BERT's names of fields; `first_position` as `ParsedConfig` has it."""
    config.only("is_decoder", False)
    config.only("position_embedding_type", "absolute")
    norm = layer_norm(config, "layer_norm_eps", 1e-12)
    names = {"heads": "num_attention_heads", "width": "intermediate_size", "activation": "hidden_act"}
    each = layer(config, norm, hidden="hidden_size", **names)
    parsed = encoder(
        config,
        config.text("model_type", "bert"),
        "hidden_size",
        (each,) * layer_count(config, "num_hidden_layers"),
        context=config.integer("max_position_embeddings", 512) - first_position,
        token_types=config.integer("type_vocab_size", 2),
    )
    return ParsedConfig(config=parsed, first_position=first_position)
