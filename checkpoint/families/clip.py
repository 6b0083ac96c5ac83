"""CLIP's text tower, alone or beside the vision tower: an encoder whose tokens see no later ones."""

from ...spec.config import Head, LayerConfig
from ..family import Family, ParsedConfig, layer_norm, parse_config
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..llama_like import SPLIT_QKV
from ..table import POSITION_IDS, Ignorable, Table, linear, norm, tensor

TABLE = Table(
    prefix="text_model.",
    layers="encoder.layers.{layer}.",
    embedding=(
        tensor("embeddings.token_embedding.weight", "token_VW"),
        tensor("embeddings.position_embedding.weight", "position_PM"),
    ),
    layer=(
        *norm("layer_norm1", "attention_norm"),
        *SPLIT_QKV,
        *linear("self_attn.out_proj", "attention.output"),
        *norm("layer_norm2", "mlp_norm"),
        *linear("mlp.fc1", "mlp.up"),
        *linear("mlp.fc2", "mlp.down"),
    ),
    head=norm("final_layer_norm", "norm"),
    ignorable=(
        POSITION_IDS,
        Ignorable(name="text_projection.weight", why="into the space shared with images, from one token's vector"),
        Ignorable(name="visual_projection.weight", why="the same, of the vision tower"),
        Ignorable(name="vision_model.*", why="the vision tower"),
        Ignorable(name="logit_scale", why="by which the likeness of a text and an image is multiplied"),
    ),
)


def _read(config: Fields) -> ParsedConfig:
    config.only("is_decoder", False)
    hidden, heads = config.integer("hidden_size", 512), config.integer("num_attention_heads", 8)
    layer = LayerConfig(
        norm=layer_norm(config, "layer_norm_eps"),
        attention=multi_head(config, hidden, heads),
        mlp=plain_mlp(config, config.integer("intermediate_size", 2048), "hidden_act", "quick_gelu"),
    )
    parsed = model(
        config,
        "clip_text_model",
        hidden,
        (layer,) * layer_count(config, "num_hidden_layers", 12),
        vocabulary=config.integer("vocab_size", 49408),
        context=config.integer("max_position_embeddings", 77),
        learned_positions=True,
        head=Head.NONE,
    )
    return ParsedConfig(config=parsed)


def _read_beside_vision(config: Fields) -> ParsedConfig:
    """The text tower's fields stand in `text_config`, and in older files once more, those that were given."""
    text = config.section("text_config") or Fields({}, f"{config.where}text_config.")
    older = config.section("text_config_dict") or Fields({}, "")
    for name, value in older.values.items():
        if text.values.get(name) != value:
            raise older.wrong(name, "as in text_config, since they mean the same")
    return parse_config(CLIP_TEXT, text)


IGNORED = {"projection_dim": "of text_projection", "tie_word_embeddings": "there is no head"}

CLIP_TEXT = Family(
    model_type="clip_text_model",
    architectures=("CLIPTextModel", "CLIPTextModelWithProjection"),
    read=_read,
    table=TABLE,
    ignored=IGNORED,
)

CLIP = Family(
    model_type="clip",
    architectures=("CLIPModel",),
    read=_read_beside_vision,
    table=TABLE,
    ignored=IGNORED
    | {"vision_config": "of the vision tower", "vision_config_dict": "of the vision tower"}
    | {"logit_scale_init_value": "training"},
)
