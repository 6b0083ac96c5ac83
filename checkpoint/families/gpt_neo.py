"""GPT-Neo: GPT-2 with scores that are not scaled, and a window in every other layer."""

from dataclasses import replace

from ...spec.config import LayerConfig
from ...spec.errors import ConfigError
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..gpt_like import layer_count, model, multi_head, plain_mlp
from ..table import linear, masks, norm
from . import gpt2

TABLE = replace(
    gpt2.TABLE,
    layer=(
        *norm("ln_1", "attention_norm"),
        *linear("attn.attention.q_proj", "attention.query"),
        *linear("attn.attention.k_proj", "attention.key"),
        *linear("attn.attention.v_proj", "attention.value"),
        *linear("attn.attention.out_proj", "attention.output"),
        *norm("ln_2", "mlp_norm"),
        *linear("mlp.c_fc", "mlp.up"),
        *linear("mlp.c_proj", "mlp.down"),
    ),
    ignorable=masks("h.{layer}.attn.attention"),
)


def _read(config: Fields) -> ParsedConfig:
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads")
    norm, window = layer_norm(config, "layer_norm_epsilon"), config.integer("window_size", 256)
    mlp = plain_mlp(config, config.integer("intermediate_size", 4 * hidden), "activation_function", "gelu_new")

    def layer(kind: str) -> LayerConfig:
        seen = window if kind == "local" else None
        attention = multi_head(config, hidden, heads, scale=1.0, qkv_bias=False, window=seen)
        return LayerConfig(norm=norm, attention=attention, mlp=mlp)

    layers = tuple(layer(kind) for kind in _kinds(config, layer_count(config, "num_layers")))
    places = config.integer("max_position_embeddings")
    return ParsedConfig(config=model(config, "gpt_neo", hidden, layers, context=places, learned_positions=True))


def _kinds(config: Fields, layers: int) -> list[str]:
    """Each layer's attention: `attention_layers` names it, `attention_types` says it in groups and how often."""
    config.ignore(("attention_layers", "attention_types"))
    said = {"attention_layers": config.texts("attention_layers")} if config.has("attention_layers") else {}
    if config.has("attention_types") or not said:
        said["attention_types"] = _ungrouped(config, config.values.get("attention_types"), layers)
    for field, kinds in said.items():
        if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
            raise config.wrong(field, f"such as to name, for each of the {layers} layers, global or local")
    first, *others = said.values()
    if first not in (others or [first]):
        raise ConfigError(f"{config.where}attention_layers and attention_types disagree; leave one of them out")
    return first


def _ungrouped(config: Fields, groups: object, layers: int) -> list[str]:
    kinds: list[str] = []
    for group in groups if isinstance(groups, list) else [groups]:
        match group:
            case [list(names), int(times)] if (
                0 <= times <= layers
                and len(kinds) + len(names) * times <= layers
                and all(isinstance(name, str) for name in names)
            ):
                kinds += names * times
            case _:
                raise config.wrong("attention_types", 'names, each group with how often: [[["global", "local"], 6]]')
    return kinds


GPT_NEO = Family(
    model_type="gpt_neo",
    architectures=("GPTNeoForCausalLM", "GPTNeoModel"),
    read=_read,
    table=TABLE,
)
