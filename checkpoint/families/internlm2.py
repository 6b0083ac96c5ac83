"""InternLM 2 and 2.5: LLaMA under other names, with queries, keys and values merged group by group."""

from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import read
from ..permutation import separated_qkv
from ..table import QKV, Table, frequencies, linear, norm, output, tensor

TABLE = Table(
    prefix="model.",
    layers="layers.{layer}.",
    embedding=(tensor("tok_embeddings.weight", "token_VW"),),
    layer=(
        *norm("attention_norm", "attention_norm"),
        *linear("attention.wqkv", *QKV, reorder=separated_qkv),
        *linear("attention.wo", "attention.output"),
        *norm("ffn_norm", "mlp_norm"),
        *linear("feed_forward.w1", "mlp.gate"),
        *linear("feed_forward.w3", "mlp.up"),
        *linear("feed_forward.w2", "mlp.down"),
    ),
    head=(*norm("norm", "norm"), *output("output")),
    ignorable=(frequencies("layers.{layer}.attention"),),
)


def _read(config: Fields) -> ParsedConfig:
    bias = config.flag("bias", True)
    return read(config, norm=rms_norm(config), attention={"qkv_bias": bias, "output_bias": bias})


INTERNLM2 = Family(
    model_type="internlm2",
    architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    read=_read,
    table=TABLE,
    remote_code=("configuration_internlm2", "modeling_internlm2"),
)
