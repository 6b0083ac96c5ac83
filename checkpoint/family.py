"""What a model family is: how its config.json reads, and how its files name weights.

One declaration a family; everything else in this package is the same for all. A family is added by writing one and
listing it in `families.FAMILIES`; docs/adding-a-family.md does it once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from ..spec.config import Activation, Head, ModelConfig, NormConfig, NormKind
from ..spec.errors import CheckpointError, ConfigError
from .fields import Fields
from .not_computed import NOT_COMPUTED
from .plan import Buffers, TensorStore
from .rotary_fields import Rotation
from .source import FileSource
from .table import Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParsedConfig:
    """What a config.json means."""

    config: ModelConfig
    rotations: tuple[Rotation | None, ...] = ()
    """Of each layer; empty where none rotates. Layers may share one."""
    slopes: Callable[[], Tensor] | None = None
    """Makes ALiBi's slopes of every layer, float64 [H]."""
    first_position: int = 0
    """The row of the table of positions that belongs to a sequence's first token: 2 in OPT."""
    plain_norms: tuple[str, ...] = ()
    """Norms of every layer, and the head's, that only normalize: their gains are 1 and in no file."""
    shared_at_half: bool = False
    """Whether shared MLPs count half: their gates' maps are zeros, of which a sigmoid is a half, and in no file."""
    table: Table | None = None
    """Where the config decides how files keep the weights; None where the family's own table holds for all."""

    def buffers(self) -> Buffers:
        """What no file holds; each is made when it is first asked for, and then shared."""
        gain = cache(partial(torch.ones, self.config.hidden, dtype=torch.float32, device="cpu"))
        names = [f"{norm}.gain_M" for norm in self.plain_norms]
        head: dict[str, Callable[[], Tensor]] = {name: gain for name in names if name == "norm.gain_M"}
        every: dict[str, Callable[[], Tensor]] = {name: gain for name in names if name not in head}
        if self.slopes is not None:
            every["attention.alibi_slope_H"] = cache(self.slopes)
        turning: list[dict[str, Callable[[], Tensor]]] = [
            {} if rotation is None else {"attention.rotary_frequency_J": partial(_given, rotation.frequency_J)}
            for rotation in self.rotations or (None,) * len(self.config.layers)
        ]
        zeros = cache(partial(torch.zeros, 1, self.config.hidden, dtype=torch.float32, device="cpu"))
        halved = self.config.mixtures if self.shared_at_half else {}
        gates: list[dict[str, Callable[[], Tensor]]] = [
            {"mlp.shared_gate.weight_NI": zeros} if index in halved else {} for index in range(len(turning))
        ]
        return Buffers(layers=[every | own | gate for own, gate in zip(turning, gates, strict=True)], head=head)


def _given(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    model_type: str
    """As config.json says it."""
    architectures: tuple[str, ...]
    """Classes that save such files, as config.json names them: plain language models, with or without the head."""
    read: Callable[[Fields], ParsedConfig]
    """Takes every field that changes results; whatever it leaves must be in `IGNORED` or `ignored`."""
    table: Table
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Further fields of this family that leave the results unchanged, each with why."""
    remote_code: tuple[str, ...] = ()
    """Modules that come with published models and that `auto_map` may name, since what they compute is declared here.
    They are never run."""


IGNORED = {
    "who wrote the file, with what, and how to load it": (
        "_name_or_path transformers_version torch_dtype dtype tokenizer_class use_cache model_max_length "
        "transformers.js_config transformers_weights _commit_hash _from_model_config unsloth_fixed unsloth_version"
    ),
    "what the library that wrote it returns, or how it computes the same result": (
        "output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript "
        "use_return_dict chunk_size_feed_forward pretraining_tp _attn_implementation _attn_implementation_autoset "
        "attn_implementation _flash_attn_2_enabled tf_legacy_loss use_bfloat16 is_decoder gradient_checkpointing "
        "output_past cache_implementation attention_softmax_in_fp32 scale_attention_softmax_in_fp32"
    ),
    "training": (
        "initializer_range initializer_factor init_std attention_dropout hidden_dropout resid_dropout embed_dropout "
        "dropout layerdrop resid_pdrop embd_pdrop emb_pdrop attn_pdrop attention_probs_dropout_prob "
        "hidden_dropout_prob"
    ),
    "tokens by role (read separately, where they matter) and classifiers": (
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix "
        "predict_special_tokens id2label label2id num_labels _num_labels finetuning_task problem_type "
        "task_specific_params classifier_dropout "
        "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
    ),
    "how text was generated by default, before generation_config.json": (
        "do_sample max_length min_length num_beams temperature top_k top_p repetition_penalty length_penalty "
        "no_repeat_ngram_size num_return_sequences early_stopping diversity_penalty num_beam_groups typical_p "
        "bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id "
        "encoder_no_repeat_ngram_size exponential_decay_length_penalty remove_invalid_values"
    ),
}
"""Fields that leave the logits unchanged in every family, by what they are about."""

REQUIRED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "quantization_config": None,
    "pruned_heads": None,
    "n_special": 0,
}
"""Fields that every family has, with the one value that is computed."""

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "quick_gelu": Activation.GELU_SIGMOID,
    "relu": Activation.RELU,
}
"""The names that config.json has for activations."""


def parse_config(family: Family, config: Fields) -> ParsedConfig:
    """Read a config.json as this family's. Raises `ConfigError` for any field that is not fully parsed."""
    config.ignore(family.ignored)
    common(config)
    _refuse_other_code(family, config)
    parsed = family.read(config)
    config.finish()
    return parsed


def common(config: Fields) -> None:
    """Take the fields that every family has; older files repeat them in sections. Raises `ConfigError` as `only`."""
    config.ignore(("model_type", "architectures"))
    for names in IGNORED.values():
        config.ignore(names.split())
    for name, value in REQUIRED.items():
        config.only(name, value, *(({},) if value is None else ()))


def _refuse_other_code(family: Family, config: Fields) -> None:
    """A model that brings code along means what that code computes: refuse it, unless the family is declared for it."""
    config.ignore(("auto_map",))
    named = config.values.get("auto_map") or {}
    if not isinstance(named, dict):
        raise config.wrong("auto_map", "an object or null")
    for kind, code in named.items():
        module = str(code).rpartition("--")[2].rpartition(".")[0]  # in a copy, "owner/name--" says whose code it is
        if kind != "AutoTokenizer" and module not in family.remote_code:
            known = f", or name {' and '.join(family.remote_code)} alone" if family.remote_code else ""
            raise config.wrong("auto_map", f"null, since code that comes with a model is not run here{known}")


def weights_of(families: tuple[Family, ...], config: Fields, store: TensorStore) -> FileSource:
    """The weights in a store, by the config that came with it. Raises as `find`, `understand` and `FileSource` do."""
    family = find(families, config)
    parsed = parse_config(family, config)
    return FileSource(
        parsed.config,
        parsed.table or family.table,
        store,
        parsed.buffers(),
        first_position=parsed.first_position,
        most_tokens=config.most_tokens,
        notes=config.notes,
    )


def find(families: tuple[Family, ...], config: Fields) -> Family:
    """The family that a config.json names. Raises `CheckpointError` listing the known ones."""
    known = ", ".join(family.model_type for family in families)
    model_type = config.text("model_type", "")
    classes = config.texts("architectures") if config.has("architectures") else []
    for family in families:
        ours = [name for name in classes if name in family.architectures]
        if model_type == family.model_type or (not model_type and ours):
            if classes and not ours:
                raise CheckpointError(
                    f"{config.where}architectures is {classes}, but model_type is {family.model_type!r}, of which only "
                    f"{' and '.join(family.architectures)} are known here"
                )
            return family
    refuse_latent_attention(config)
    if reason := NOT_COMPUTED.get(model_type):
        raise CheckpointError(
            f"{config.where}model_type is {model_type!r}, which cannot be read: {reason}; it must be one of: {known}"
        )
    if not model_type and not classes:
        raise CheckpointError(f"{config.where}model_type is missing; the families known here are: {known}")
    raise CheckpointError(
        f"{config.where}model_type is {model_type!r} (architectures {classes}); the families known here are: {known}"
    )


LATENT_RANKS = ("kv_lora_rank", "q_lora_rank")


def refuse_latent_attention(config: Fields, prefix: str = "") -> None:
    """Raise `CheckpointError` for a model whose keys and values go through a narrower map: DeepSeek-V2 and V3."""
    ranks = [f"{prefix}{rank} is {config.values[prefix + rank]}" for rank in LATENT_RANKS if config.has(prefix + rank)]
    if ranks:
        raise CheckpointError(
            f"{config.where}{' and '.join(ranks)}: its attention is multi-head latent attention (MLA), which this "
            "version does not compute; it must be a model without these fields, whose layers have query, key and "
            "value projections of their own, such as GLM-4.5, Qwen 3 or DeepSeek's distilled models"
        )


def alias(config: Fields, *names: str) -> str:
    """The name by which a config has a field of several; the first where it has none.

    Raises `ConfigError` where it has two that disagree.
    """
    there = [name for name in names if config.has(name)] or [names[0]]
    config.ignore(names)
    for name in there[1:]:
        if config.values[name] != config.values[there[0]]:
            raise config.wrong(name, f"as {there[0]} is, or left out, since they mean the same")
    return there[0]


def head_size(config: Fields, hidden: int, heads: int) -> int:
    """Hidden elements of each head, where the config does not say. Raises `ConfigError` if they do not divide."""
    if hidden % heads:
        raise ConfigError(f"{config.where}{hidden} hidden elements do not divide into {heads} heads")
    return hidden // heads


def layer_norm(config: Fields, name: str, default: float = 1e-5, *, bias: bool = True) -> NormConfig:
    """A layer norm whose epsilon is the field's."""
    return NormConfig(kind=NormKind.LAYER, epsilon=config.number(name, default), bias=bias)


def rms_norm(
    config: Fields, name: str = "rms_norm_eps", default: float = 1e-6, *, from_one: bool = False
) -> NormConfig:
    """An RMS norm whose epsilon is the field's."""
    return NormConfig(kind=NormKind.RMS, epsilon=config.number(name, default), gain_from_one=from_one)


def head(config: Fields, *, tied: bool) -> Head:
    """Whether the head is the token table; `tied` where the config does not say."""
    return Head.TIED if config.flag("tie_word_embeddings", tied) else Head.UNTIED
