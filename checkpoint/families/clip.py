"""CLIP's text tower, alone or beside the vision tower: an encoder whose tokens see no later ones."""

from ...spec.config import AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig
from ..family import ACTIVATIONS, Family, Understood, context, head_size, layer_norm, understand
from ..fields import MOST_LAYERS, Fields
from ..llama_like import SPLIT_QKV
from ..table import Ignorable, Table, linear, norm, tensor

TABLE = Table(
    prefix="text_model.",
    layers="encoder.layers.{layer}.",
    embedding=(
        tensor("embeddings.token_embedding.weight", "token_VE"),
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
        Ignorable(name="embeddings.position_ids", why="0, 1, 2 and so on, kept as a buffer"),
        Ignorable(name="text_projection.weight", why="into the space shared with images, from one token's vector"),
        Ignorable(name="visual_projection.weight", why="the same, of the vision tower"),
        Ignorable(name="vision_model.*", why="the vision tower"),
        Ignorable(name="logit_scale", why="by which the likeness of a text and an image is multiplied"),
    ),
)


def _read(config: Fields) -> Understood:
    config.only("is_decoder", False)
    hidden, heads = config.integer("hidden_size", 512), config.integer("num_attention_heads", 8)
    size, norm = head_size(config, hidden, heads), layer_norm(config, "layer_norm_eps")
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=heads, kv_heads=heads, head_size=size, scale=size**-0.5, qkv_bias=True, output_bias=True
        ),
        mlp=MlpConfig(
            width=config.integer("intermediate_size", 2048),
            activation=config.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
            gated=False,
            bias=True,
        ),
    )
    model = ModelConfig(
        family="clip_text_model",
        hidden=hidden,
        vocabulary=config.integer("vocab_size", 49408),
        context=context(config, "max_position_embeddings", 77),
        layers=(layer,) * config.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        final_norm=norm,
        learned_positions=True,
        head=Head.NONE,
    )
    return Understood(config=model)


def _read_beside_vision(config: Fields) -> Understood:
    """The text tower's fields stand in `text_config`, and in older files once more, those that were given."""
    text = config.section("text_config") or Fields({}, f"{config.where}text_config.")
    older = config.section("text_config_dict") or Fields({}, "")
    for name, value in older.values.items():
        if text.values.get(name) != value:
            raise older.wrong(name, "as in text_config, since they mean the same")
    return understand(CLIP_TEXT, text)


HARMLESS = {"projection_dim": "of text_projection", "tie_word_embeddings": "there is no head"}

CLIP_TEXT = Family(
    model_type="clip_text_model",
    architectures=("CLIPTextModel", "CLIPTextModelWithProjection"),
    read=_read,
    table=TABLE,
    harmless=HARMLESS,
)

CLIP = Family(
    model_type="clip",
    architectures=("CLIPModel",),
    read=_read_beside_vision,
    table=TABLE,
    harmless=HARMLESS
    | {"vision_config": "of the vision tower", "vision_config_dict": "of the vision tower"}
    | {"logit_scale_init_value": "training"},
)
