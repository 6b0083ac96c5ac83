"""SmolLM 3: LLaMA's, with layers that do not rotate, every fourth; those have the window, if there is one."""

from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, all_but_every, layer_count, read, rotation_of, switched_windows


def _read(config: Fields) -> ParsedConfig:
    turning = _turning(config, layer_count(config))
    rotation = rotation_of(config, base=2e6)
    bias = config.flag("attention_bias", False)
    return read(
        config,
        mlp_bias=config.flag("mlp_bias", False),
        tied=True,
        windows=switched_windows(config, [not turns for turns in turning], None),
        rotations=[rotation if turns else None for turns in turning],
        attention={"qkv_bias": bias, "output_bias": bias},
    )


def _turning(config: Fields, layers: int) -> list[bool]:
    """Whether each layer rotates: 1 in `no_rope_layers`, despite its name."""
    usual = all_but_every(config.integer("no_rope_layer_interval", 4), layers)
    given = config.integers("no_rope_layers")
    if not config.has("no_rope_layers"):
        return usual
    if len(given) < layers or not set(given) <= {0, 1}:
        raise config.wrong("no_rope_layers", f"a list of {layers} numbers, 1 for each layer that rotates, 0 for others")
    return [each == 1 for each in given[:layers]]


SMOLLM3 = Family(
    model_type="smollm3",
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    read=_read,
    table=LLAMA_TABLE,
    ignored={"max_window_layers": "of Qwen 2, from whose files it was taken over"},
)
