"""Pairs of tiny random models of every architecture that has a language model and a sequence classifier.

No architecture has a configuration written by hand: the defaults of its class are made small by rules on the names of
settings. `EXCEPTIONS` has what rules cannot know, such as sizes that must divide each other.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *(f"word{i}" for i in range(27))]
SPARE = 16  # tokens of images, sounds and the like, which no sentence holds
VOCABULARY = len(WORDS) + SPARE
LAYERS, HEADS, WIDTH, PER_HEAD, INNER, LENGTH = 2, 2, 16, 8, 24, 64

# Tasks of the pretraining stage, in the order in which an architecture's first one is searched.
TASKS = {
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "pretraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
}
CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


class Pair(NamedTuple):
    """An architecture, the class of its language model, and that of its classifier."""

    architecture: str
    task: str
    language_model: str
    classifier: str

    @property
    def name(self) -> str:
        return f"{self.architecture}/{self.task}"


def pairs(tasks: str = "first") -> list[Pair]:
    """Every architecture with both heads; its first task, or "all" that have a class of their own."""
    result = []
    for architecture, classifier in CLASSIFIERS.items():
        classes = [(task, _first(names[architecture])) for task, names in TASKS.items() if architecture in names]
        new = [(task, name) for i, (task, name) in enumerate(classes) if name not in {n for _, n in classes[:i]}]
        chosen = new if tasks == "all" else new[:1]
        result += [Pair(architecture, task, name, _first(classifier)) for task, name in chosen]
    return result


def _first(names: Any) -> str:
    return names if isinstance(names, str) else names[0]


# --- configurations

# The first pattern that a setting's name matches says its value; a number, or what makes one of the default.
RULES: list[tuple[str, int | Callable[[int], int]]] = [
    (r"type_vocab_size|entity_vocab_size|type_vocab_sizes", lambda n: min(n, 4)),
    (r"vocab_size|vocab_size_.*|n_vocab", VOCABULARY),
    (r"(num_|n_)?((hidden|encoder|decoder|self_attends_per|conv|mamba|num)_)*(layers?|blocks?)(_per_block)?", LAYERS),
    (r"(num_)?(first_k_dense_replace|n_dense_layers|num_hash_layers|num_groups|n_groups?|num_hidden_groups)", 1),
    (r"topk_group|n_shared_experts|num_shared_experts|decoder_sparse_step|mamba_n_groups|mamba_ngroups", 1),
    (r"(expert|attn)_layer_period", 2),
    (r"(expert|attn)_layer_offset", 1),
    (r"num_kv_shared_layers", 0),
    (r".*(attention_heads|n_heads?|num_heads|_heads|n_head)", HEADS),
    (r"(num_experts_per_tok|moe_topk|moe_top_k|top_k|num_experts_per_token|experts_per_token)", lambda n: min(n, 2)),
    (r".*(num_experts|n_routed_experts|num_local_experts)", 4),
    (r"(qk_(nope|rope)_|v_|global_|index_|attention_)?head_(dim|size)|attention_key_value_channels", PER_HEAD),
    (
        r"(attention_)?d_(kv|head)|kv_channels|qk_(nope|rope)_head_dim|mamba_(d_)?head_?dim|linear_.*_head_dim",
        PER_HEAD,
    ),
    (r"moe_intermediate_size|shared_expert_intermediate_size|moe_ffn_hidden_size|expert_ffn.*", 8),
    (r"(q|kv|o|.*)_lora_rank|.*adapter_rank|.*_low_rank", 8),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|inner_dim|hidden_dim|feed_forward_size)",
        INNER,
    ),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|emb_size|latents|d_embed|hidden)", WIDTH),
    (r"dim|width|lru_width|projection_dim|output_dim|qk_channels|v_channels|pooler_hidden_size", WIDTH),
    (
        r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|context_length)",
        LENGTH,
    ),
    (r"max_2d_position_embeddings|max_source_positions|max_target_positions|max_.*positions", LENGTH),
    (r".*(sliding_window|attention_window|window_size|local_attention|attention_chunk_size)", 8),
    (r"image_size", 8),
    (r"patch_size", 4),
    (r".*(state_size|d_state|conv_kernel|d_conv|num_channels|n_channels|kernel_size)", lambda n: min(n, 3)),
    (r"rotary_dim", 4),
]
TOKENS = {"pad": 0, "bos": 2, "cls": 2, "decoder_start": 2, "eos": 3, "sep": 3, "mask": 4, "unk": 1}
LARGEST_UNKNOWN = 64

DERIVED = ("model_type", "transformers_version", "architectures", "id2label", "label2id", "dtype", "rope_parameters")
SET_WHERE_NONE = {"vocab_size": VOCABULARY, "head_dim": PER_HEAD, "num_experts_per_tok": 2}
TWO_HYBRID_LAYERS = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**TWO_HYBRID_LAYERS, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": WIDTH},
    "zamba2": TWO_HYBRID_LAYERS,
}


def tiny_config(architecture: str, kind: type[PretrainedConfig] | None = None) -> PretrainedConfig:
    """The configuration of an architecture, with its defaults made small."""
    kind = kind or CONFIG_MAPPING[architecture]
    default = kind()
    declared = {f.name for f in dataclasses.fields(kind)}  # what a configuration derives itself is not given to it
    defaults, settings = {key: v for key, v in default.to_dict().items() if key in declared}, dict[str, Any]()
    layers = next((value for key, value in defaults.items() if _is_number_of_layers(key, value)), None)
    for key, value in defaults.items():
        if isinstance(value, dict) and key in kind.sub_configs and getattr(default, key, None) is not None:
            settings[key] = tiny_config("", type(getattr(default, key))).to_dict()
        elif re.fullmatch(r"num_key_value_heads|num_kv_heads|n_head_kv", key):
            shared = value is not None and value < (defaults.get("num_attention_heads") or value)
            settings[key] = 1 if shared else HEADS
        elif key not in DERIVED:
            settings[key] = _tiny(key, SET_WHERE_NONE.get(key) if value is None else value, layers)
    return kind(**settings | EXCEPTIONS.get(default.model_type, {}))


def _is_number_of_layers(key: str, value: Any) -> bool:
    return type(value) is int and key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def _tiny(key: str, value: Any, layers: int | None) -> Any:
    """The small value of a setting, given its default; `layers`: how many layers there are by default."""
    if key.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(key, value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        for pattern, small in RULES:
            if re.fullmatch(pattern, key):
                return small(value) if callable(small) else small
        return WIDTH if value > LARGEST_UNKNOWN else value
    if isinstance(value, (list, tuple)) and value:
        if len(value) == layers or key.endswith(("layer_types", "block_type", "mlp_layer_types")):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else list(value[:LAYERS])
            value = [kinds[i % len(kinds)] for i in range(LAYERS)]
        return [_tiny(key, entry, None) for entry in value]
    if isinstance(value, dict):
        return {name: _tiny(name, entry, None) for name, entry in value.items()}
    return value


def _token(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return _token(key, value[0]) if value else value
    for name, number in TOKENS.items():
        if key.startswith(name + "_"):
            return number
    return None if value is None else len(WORDS) + sum(map(ord, key)) % SPARE


# --- models


def models_of(pair: Pair, dtype: torch.dtype, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The language model and the classifier, with random weights that are not those of initialisation alone."""
    kinds = [getattr(transformers, name) for name in (pair.language_model, pair.classifier)]
    config = tiny_config(pair.architecture)
    result = []
    for kind in kinds:
        own = copy.deepcopy(_config_for(kind, config))
        if kind.__name__ == pair.language_model and pair.task == "causal" and hasattr(own, "is_decoder"):
            own.is_decoder = not own.is_encoder_decoder
        own.num_labels = 2
        if own.is_encoder_decoder and getattr(own, "decoder_start_token_id", None) is None:
            own.decoder_start_token_id = TOKENS["decoder_start"]
        torch.manual_seed(seed)
        result.append(perturbed(kind(own).to(dtype), seed))
    return result[0], result[1]


def _config_for(kind: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, or the one in it that a class of models takes."""
    candidates = [config, *(getattr(config, key) for key in config.sub_configs)]
    of_kind = [c for c in candidates if isinstance(c, kind.config_class)]
    return of_kind[0] if of_kind else kind.config_class(text_config=config.to_dict())


def perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """No normalisation stays the identity and no bias zero, so that a tensor left out of a derivative shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return model


def pass_on(before: PreTrainedModel, after: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Writes the parameters of a model into another one; `names`: name there → name here."""
    with torch.no_grad():
        for name, source in names.items():
            after.get_parameter(name).copy_(before.get_parameter(source))


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Whole words between [CLS] and [SEP]."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": word for name, word in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=LENGTH // 2, bos_token="[CLS]", eos_token="[SEP]", **names
    )
