"""What the many families that descend from LLaMA share with it: names of tensors, and names of config fields.

RMS norms, rotary positions, grouped heads, gated MLPs, unless a family says otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..spec.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig
from ..spec.errors import ConfigError
from ..spec.moe import MoeConfig
from . import rotary_fields
from .family import ACTIVATIONS, ParsedConfig, head, head_size, rms_norm
from .fields import MOST_LAYERS, Fields
from .rotary_fields import Rotation
from .table import Stored, Table, frequencies, linear, norm, output, tensor

SPLIT_QKV = (
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
)

GATED_MLP = (
    *linear("mlp.gate_proj", "mlp.gate"),
    *linear("mlp.up_proj", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)

INPUT_NORMS = (*norm("input_layernorm", "attention_norm"), *norm("post_attention_layernorm", "mlp_norm"))


def table(*layer: Stored) -> Table:
    """LLaMA's names, with a family's own of what stands in a layer."""
    return Table(
        prefix="model.",
        layers="layers.{layer}.",
        embedding=(tensor("embed_tokens.weight", "token_VW"),),
        layer=layer,
        head=(*norm("norm", "norm"), *output("lm_head")),
        ignorable=(frequencies("layers.{layer}.self_attn"),),
    )


LLAMA_TABLE = table(*INPUT_NORMS, *SPLIT_QKV, *linear("self_attn.o_proj", "attention.output"), *GATED_MLP)


def read(
    config: Fields,
    *,
    norm: NormConfig | None = None,
    activation: str = "hidden_act",
    usual_activation: str = "silu",
    mlp_bias: bool = False,
    gated: bool = True,
    tied: bool = False,
    base: float = 10000.0,
    part: float | None = None,
    windows: Sequence[int | None] | int | None = None,
    rotations: Sequence[Rotation | None] | None = None,
    size: int | None = None,
    attention: Mapping[str, Any] | None = None,
    mlp: Mapping[str, Any] | None = None,
    feed: Callable[[int, MlpConfig], MlpConfig | MoeConfig] | None = None,
    layer: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> ParsedConfig:
    """A config with LLaMA's names of fields, and where a family differs: its fields of attention, MLP, layer and model.

    `windows` and `rotations` may differ from layer to layer; without the latter, all layers rotate as the config says,
    whole heads or, where it does not say and `part` is given, that part of them.
    `feed` makes a layer's mixture of experts, given its number and the dense MLP that the fields describe.
    `size` is that of a head where the config does not say and heads do not share the hidden elements.
    """
    layers = layer_count(config)
    size = head_size_of(config, size)
    norm = rms_norm(config) if norm is None else norm
    turns = [rotation_of(config, size, base=base, part=part)] * layers if rotations is None else rotations
    each_window = windows if isinstance(windows, Sequence) else [windows] * layers
    heads = config.integer("num_attention_heads")
    plain = AttentionConfig(
        **{
            "heads": heads,
            "kv_heads": config.integer("num_key_value_heads", heads),
            "head_size": size,
            "scale": size**-0.5,
            **(attention or {}),
        }
    )
    plain_mlp = MlpConfig(
        **{
            "width": config.integer("intermediate_size"),
            "activation": config.choice(activation, ACTIVATIONS, usual_activation),
            "gated": gated,
            "bias": mlp_bias,
            **(mlp or {}),
        }
    )

    def one(index: int, window: int | None, rotation: Rotation | None) -> LayerConfig:
        turning = None if rotation is None else rotation.config
        own = replace(plain, window=window, rotary=turning)
        own_mlp = plain_mlp if feed is None else feed(index, plain_mlp)
        return LayerConfig(norm=norm, attention=own, mlp=own_mlp, **(layer or {}))

    fields: dict[str, Any] = {
        "family": config.text("model_type", "llama"),
        "hidden": config.integer("hidden_size"),
        "vocabulary": config.integer("vocab_size"),
        "context": context(config),
        "layers": tuple(
            one(index, window, rotation)
            for index, (window, rotation) in enumerate(zip(each_window, turns, strict=True))
        ),
        "final_norm": norm,
        "learned_positions": False,
        "head": head(config, tied=tied),
    }
    return ParsedConfig(config=ModelConfig(**{**fields, **(model or {})}), rotations=tuple(turns))


def layer_count(config: Fields) -> int:
    return config.integer("num_hidden_layers", most=MOST_LAYERS)


def context(config: Fields) -> int:
    """The tokens that the model was made for.

    The first LLaMA files call them `max_sequence_length`; Vicuna's have both, and count there what scaling adds.
    """
    if not config.has("max_position_embeddings") and config.has("max_sequence_length"):
        config.ignore(("max_position_embeddings",))
        return config.integer("max_sequence_length")
    places, scaling = config.integer("max_position_embeddings"), config.values.get("rope_scaling")
    factor = scaling.get("factor", 1) if isinstance(scaling, dict) else 1
    config.only("max_sequence_length", None, places, *([places * factor] if isinstance(factor, int | float) else []))
    return places


def head_size_of(config: Fields, usual: int | None = None) -> int:
    """Elements of a head; `usual` where the config does not say, or the hidden elements that fall to one of them."""
    config.ignore(("head_dim",))
    if config.has("head_dim"):
        return config.integer("head_dim")
    return usual or head_size(config, config.integer("hidden_size"), config.integer("num_attention_heads"))


def rotation_of(config: Fields, size: int | None = None, **head: Any) -> Rotation:
    """The rotation of all layers; `size` as `head_size_of` takes it, `head` as `rotary_fields.Head`."""
    return rotary_fields.rotation(config, rotating(config, size, **head))


def rotating(config: Fields, size: int | None = None, **head: Any) -> rotary_fields.Head:
    """What the rotation depends on besides the rotary fields."""
    return rotary_fields.Head(size=head_size_of(config, size), context=context(config), **head)


def layer_types(config: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Of each layer, whether it has the window: as `layer_types` says, or as older files mean it."""
    return _named(config, "layer_types", {"full_attention": False, "sliding_attention": True}, otherwise)


def sparse_layers(config: Fields, dense: int) -> list[bool]:
    """Return which layers have experts: as `mlp_layer_types` says, or all but the first so many dense ones."""
    otherwise = [index >= dense for index in range(layer_count(config))]
    return _named(config, "mlp_layer_types", {"dense": False, "sparse": True}, otherwise)


def _named(config: Fields, name: str, known: Mapping[str, bool], otherwise: Sequence[bool]) -> list[bool]:
    """Return what a list with a word for each layer says of them; `otherwise` where there is none."""
    if not config.has(name):
        config.ignore((name,))
        return list(otherwise)
    types = config.texts(name)
    if len(types) != len(otherwise) or not set(types) <= set(known):
        raise ConfigError(
            f"{config.where}{name} is {types}; it must name, for each of the {len(otherwise)} layers, one of "
            + ", ".join(known)
        )
    return [known[each] for each in types]


def all_but_every(count: int, layers: int) -> list[bool]:
    """Which layers are of the usual kind, where each `count`-th is of another.

    >>> all_but_every(3, 4)
    [True, True, False, True]
    """
    return [(index + 1) % count != 0 for index in range(layers)]


def switched_windows(config: Fields, which: Sequence[bool], usual: int | None) -> list[int | None]:
    """Each layer's window in families that have `use_sliding_window` to switch them all off, and of `usual` size."""
    size = config.optional_integer("sliding_window", usual)
    on = config.flag("use_sliding_window", False)
    here = layer_types(config, [on and size is not None and each for each in which])
    if any(here) and not on:
        raise config.wrong("layer_types", "full_attention for every layer, since use_sliding_window is not true")
    return windows(config, here, size)


def windows(config: Fields, which: Sequence[bool], size: int | None) -> list[int | None]:
    """Each layer's window, where `which` says that it has one."""
    if any(which) and size is None:
        raise config.wrong("sliding_window", "a number of tokens, since some layers have a window")
    return [size if here else None for here in which]
