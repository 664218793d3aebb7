# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of a ModernALBERT: sizes, sharing pattern, and the modulation of the shared feed-forward network."""

import dataclasses
import difflib
import math

import transformers
from packaging import version
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging


logger = logging.get_logger(__name__)

MIN_TRANSFORMERS_VERSION = "5.17.0"
if version.parse(transformers.__version__) < version.parse(MIN_TRANSFORMERS_VERSION):
    raise ImportError(
        f"ModernALBERT needs transformers >= {MIN_TRANSFORMERS_VERSION}, this is {transformers.__version__}: "
        "run `pip install -U transformers`."
    )

MOL_VERSION = 1
FFN_MODULATIONS = ("mol", "moa", "depth_lora", "none")
EXPERT_MIXINGS = ("token", "ema", "uniform")
MOL_POSITIONS = ("all", "last")
CLASSIFIER_POOLINGS = ("cls", "mean")
LAYER_TYPES = ("full_attention", "sliding_attention")

# Every checkpoint states every class it can be loaded as, so that a folder saved from one head still serves the others.
AUTO_MAP = {
    "AutoConfig": "configuration_modernalbert.ModernALBERTConfig",
    "AutoModel": "modeling_modernalbert.ModernALBERTModel",
    "AutoModelForMaskedLM": "modeling_modernalbert.ModernALBERTForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_modernalbert.ModernALBERTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_modernalbert.ModernALBERTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_modernalbert.ModernALBERTForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_modernalbert.ModernALBERTForMultipleChoice",
}

# Keys that are no fields of this class and are accepted all the same, because the libraries write or pass them.
LIBRARY_KEYS = frozenset(
    {
        # transformers: consumed by PreTrainedConfig
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "_output_attentions",
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "rope_scaling",
        "tie_last_hidden_states",
        "torch_dtype",
        # transformers: written into config.json by earlier 4.x and 5.x versions
        "_attn_implementation_autoset",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "finetuning_task",
        "is_decoder",
        "prefix",
        "pruned_heads",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torchscript",
        # remote code, Trainer, quantisation, pipelines, peft, other runtimes
        "auto_map",
        "base_model_name_or_path",
        "custom_pipelines",
        "quantization_config",
        "sliding_window",  # of ModernBertConfig: sets local_attention
        "sentence_transformers",
        "transformers.js_config",
        "transformers_weights",
        "use_cache",
    }
)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse_original_release(config_dict: dict) -> None:
    """Raise a ValueError for the configuration of the original authors' release."""
    if config_dict.get("model_type") == "ModernALBERT":
        raise ValueError(
            "model_type 'ModernALBERT' is the original authors' release, whose checkpoint format belongs to other "
            "code; this code reads model_type 'modernalbert'."
        )


class ModernALBERTConfig(PreTrainedConfig):
    r"""
    Configuration of a ModernALBERT encoder. The defaults are the Tiny size.

    The encoder has `num_hidden_layers` layers but only `num_groups = num_hidden_layers // group_depth` sets of weights:
    layer `i` runs the weights of group `i // group_depth`. In the groups of `mol_groups` the shared feed-forward
    network (FFN) is modulated, by default by a Mixture of LoRAs (MoL).

    Args:
        vocab_size (`int`): Number of token ids.
        max_position_embeddings (`int`): Longest sequence the rotary embedding is meant for.
        hidden_size (`int`), num_attention_heads (`int`): Width of the token states, number of heads.
        embedding_size (`int` or `None`): Width e of a factorised embedding (V, e) x (e, d); `None` = none.
        intermediate_size (`int`): GeGLU width f of a plain group.
        mol_intermediate_size (`int` or `None`): GeGLU width of the groups in `mol_groups`, under every
            `ffn_modulation`, so that a merged model keeps its shape; `None` = `intermediate_size`.
        num_hidden_layers (`int`): Effective depth N.
        group_depth (`int`): Consecutive layers G that share one set of weights.
        ffn_modulation (`str`): "mol", "moa" (mixture of bottleneck adapters after the FFN), "depth_lora" (one static
            LoRA per layer position of the group) or "none".
        mol_groups (`list[int]`, `"all"` or `None`): 0-based groups that are modulated; `None` = the last two.
        mol_positions (`str`): "all" layers of such a group, or only its "last" one.
        num_experts (`int`), num_experts_per_tok (`int`): Experts E, and how many each token uses. E = 1 is one LoRA
            without a router and without statistics.
        moa_bottleneck (`int` or `None`): Width of an "moa" adapter; `None` = what gives as many parameters as MoL.
        mol_backend (`str`): "auto" or the name of a backend in `mol_backends.MOL_BACKENDS`.
        lora_rank (`int`), lora_alpha (`float`), lora_dropout (`float`): Rank r; scale is `lora_alpha / lora_rank`;
            dropout on the input of each LoRA path.
        expert_mixing (`str`): "token" routes each token; "ema" and "uniform" run one merged expert, weighted by the
            moving average of the routing or by 1/E, with the router frozen.
        router_per_depth (`bool`): One router per layer position of the group instead of one per group.
        router_jitter_noise (`float`): In training the router's input is multiplied by noise in [1 - x, 1 + x].
        router_aux_loss_coef (`float`), router_z_loss_coef (`float`): Weights of the balance and z losses in training.
        router_ema_decay (`float`): Decay of the moving average of the routing.
        output_router_logits (`bool`): Return the router logits with every output.
        layer_types (`list[str]` or `None`): "full_attention" or "sliding_attention" for each of the N layers; `None` =
            all full.
        local_attention (`int`): Window of the sliding layers, both sides together.
        rope_parameters (`dict` or `None`): Rotary settings by layer type, as in transformers; theta 160000 for full
            and 10000 for sliding layers by default.
        skip_first_attn_norm (`bool`): Layer 0 has no norm before its attention, as in ModernBERT: only so can a merged
            model be written as a plain ModernBERT. With `group_depth=1` that norm does not exist.
        sparse_prediction (`bool`): With labels, compute masked-LM logits only where there is a label.
        mol_version (`int`): Version of the checkpoint format.

    The remaining fields mean what they mean in transformers' `ModernBertConfig`.

    Raises:
        ValueError: a field is unknown (in a file that is loaded, unknown fields are kept with a warning), or a value or
            combination of values is not allowed.
    """

    model_type = "modernalbert"
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "router_logits"]
    default_theta = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}

    vocab_size: int = 50368
    max_position_embeddings: int = 8192
    hidden_size: int = 768
    num_attention_heads: int = 12
    embedding_size: int | None = 128
    intermediate_size: int = 1152
    mol_intermediate_size: int | None = 2624
    num_hidden_layers: int = 14
    group_depth: int = 2
    ffn_modulation: str = "mol"
    mol_groups: list[int] | str | None = None
    mol_positions: str = "all"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moa_bottleneck: int | None = None
    mol_backend: str = "auto"
    lora_rank: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    expert_mixing: str = "token"
    router_per_depth: bool = False
    router_jitter_noise: float = 0.01
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    router_ema_decay: float = 0.99
    output_router_logits: bool = False
    layer_types: list[str] | None = None
    local_attention: int = 128
    rope_parameters: dict | None = None
    skip_first_attn_norm: bool = True
    initializer_range: float = 0.02
    initializer_cutoff_factor: float | None = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    hidden_activation: str = "gelu"
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    deterministic_flash_attn: bool = False
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = -100
    tie_word_embeddings: bool = True
    mol_version: int = MOL_VERSION
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | list[int] | None = 50282
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282

    def __post_init__(self, **kwargs):
        self._refuse_unknown_fields(kwargs)
        self._check_fields()
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        kwargs["auto_map"] = AUTO_MAP | (kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)
        self.validate()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        Build from what `from_pretrained` has read, as transformers does. Unknown fields are kept, with a warning: what
        was saved can be loaded.

        Raises:
            ValueError: as for the class; or for the original authors' release, whose checkpoints are another code's
                format; or for a field that follows from others and cannot be set.
        """
        refuse_original_release(config_dict)
        unknown = cls._unknown_fields(config_dict)
        for name in unknown:
            if hasattr(cls, name):
                raise ValueError(f"{name!r} is no field of {cls.__name__}: it follows from others or is a method.")
        if unknown:
            written_by = config_dict.get("transformers_version")
            is_newer = written_by is not None and version.parse(written_by) > version.parse(transformers.__version__)
            newer = f" The file was written by transformers {written_by}, newer than {transformers.__version__}."
            logger.warning(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}: kept, without effect on the model."
                f"{newer if is_newer else ''}"
            )
        kept = {name: kwargs.pop(name, config_dict[name]) for name in unknown}
        loaded = super().from_dict({k: v for k, v in config_dict.items() if k not in kept}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in kept.items():
            setattr(config, name, value)
        return loaded

    def convert_rope_params_to_dict(self, **kwargs) -> dict:
        """Fill `rope_parameters` for both layer types (called by transformers); returns the kwargs it did not use."""
        rope_scaling = kwargs.pop("rope_scaling", None) or {}
        given = self.rope_parameters or {}
        if "rope_type" in given or "rope_theta" in given:
            # One set of settings, as models with one layer type have it: for both.
            given = dict.fromkeys(LAYER_TYPES, given)
        self.rope_parameters = {
            name: {"rope_type": "default", "rope_theta": self.default_theta[name]}
            | rope_scaling
            | (given.get(name) or {})
            for name in LAYER_TYPES
        }
        self.standardize_rope_params()
        return kwargs

    def validate(self) -> None:
        """Check all fields again, as they are now. Called on construction, by every model, and before saving."""
        self._check_fields()
        super().validate()

    # What follows from the fields

    @property
    def num_groups(self) -> int:
        """Number of weight sets, K = N / G."""
        return self.num_hidden_layers // self.group_depth

    @property
    def modulated_groups(self) -> tuple[int, ...]:
        """The 0-based groups named by `mol_groups`, in ascending order."""
        if self.mol_groups is None:
            return tuple(range(max(0, self.num_groups - 2), self.num_groups))
        if self.mol_groups == "all":
            return tuple(range(self.num_groups))
        return tuple(sorted(self.mol_groups))

    @property
    def sliding_window(self) -> int:
        """Tokens a sliding layer sees on each side."""
        return self.local_attention // 2

    @sliding_window.setter
    def sliding_window(self, value: int) -> None:
        """Set `local_attention` to twice the value, as ModernBertConfig does."""
        if not _is_int(value) or value < 1:
            raise ValueError(f"sliding_window={value!r} is not allowed: it must be an integer of at least 1.")
        self.local_attention = 2 * value

    @property
    def lora_scaling(self) -> float:
        """s = alpha / r."""
        return self.lora_alpha / self.lora_rank

    @property
    def residual_initializer_range(self) -> float:
        """Initial deviation of what writes to the residual stream: narrower by sqrt(2 N), for N effective layers."""
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)

    def ffn_width(self, group: int) -> int:
        """GeGLU width of a group's FFN, the same under every `ffn_modulation`."""
        if group in self.modulated_groups and self.mol_intermediate_size is not None:
            return self.mol_intermediate_size
        return self.intermediate_size

    def resolved_moa_bottleneck(self, group: int) -> int:
        """Bottleneck b of an "moa" adapter: 2 b d parameters, by default as many as a MoL expert's r (2 d + 3 f)."""
        if self.moa_bottleneck is not None:
            return self.moa_bottleneck
        d, f = self.hidden_size, self.ffn_width(group)
        return max(1, round(self.lora_rank * (2 * d + 3 * f) / (2 * d)))

    def is_modulated_position(self, depth: int) -> bool:
        """Return whether the layer at position `depth` (0-based) of a modulated group uses the modulation."""
        return self.mol_positions == "all" or depth == self.group_depth - 1

    # Checks

    @classmethod
    def _unknown_fields(cls, given: dict) -> list[str]:
        """Return names that are neither fields nor keys that the libraries write, in order."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return sorted(set(given) - fields - LIBRARY_KEYS - GenerationConfig._get_default_generation_params().keys())

    def _refuse_unknown_fields(self, kwargs: dict) -> None:
        unknown = self._unknown_fields(kwargs)
        if not unknown:
            return
        fields = [field.name for field in dataclasses.fields(self)]
        near = difflib.get_close_matches(unknown[0], fields, n=3) or sorted(fields)
        raise ValueError(
            f"{type(self).__name__} has no field {unknown[0]!r} (given: {kwargs[unknown[0]]!r}); "
            f"allowed are {', '.join(near)}{'' if len(near) > 3 else ' and the others its documentation lists'}."
        )

    def _require(self, ok: bool, field: str, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{field}={getattr(self, field)!r} is not allowed: it must be {allowed}.")

    def _check_fields(self) -> None:
        for field in (
            "vocab_size max_position_embeddings hidden_size num_attention_heads intermediate_size num_hidden_layers "
            "group_depth num_experts num_experts_per_tok lora_rank local_attention"
        ).split():
            value = getattr(self, field)
            self._require(_is_int(value) and value >= 1, field, "an integer of at least 1")
        for field in "embedding_size mol_intermediate_size moa_bottleneck".split():
            value = getattr(self, field)
            self._require(value is None or (_is_int(value) and value >= 1), field, "None or an integer of at least 1")
        for field in "lora_dropout attention_dropout embedding_dropout mlp_dropout classifier_dropout".split():
            value = getattr(self, field)
            self._require(_is_number(value) and 0 <= value < 1, field, "a number in [0, 1)")
        for field in "router_jitter_noise router_ema_decay".split():
            value = getattr(self, field)
            self._require(_is_number(value) and 0 <= value < 1, field, "a number in [0, 1)")
        for field in "router_aux_loss_coef router_z_loss_coef initializer_range".split():
            value = getattr(self, field)
            self._require(_is_number(value) and value >= 0, field, "a number of at least 0")
        for field in "lora_alpha norm_eps".split():
            value = getattr(self, field)
            self._require(_is_number(value) and value > 0, field, "a number above 0")
        for field in (
            "router_per_depth output_router_logits skip_first_attn_norm norm_bias attention_bias mlp_bias decoder_bias "
            "classifier_bias deterministic_flash_attn sparse_prediction tie_word_embeddings"
        ).split():
            self._require(isinstance(getattr(self, field), bool), field, "True or False")
        for field, choices in (
            ("ffn_modulation", FFN_MODULATIONS),
            ("expert_mixing", EXPERT_MIXINGS),
            ("mol_positions", MOL_POSITIONS),
            ("classifier_pooling", CLASSIFIER_POOLINGS),
        ):
            self._require(getattr(self, field) in choices, field, f"one of {', '.join(map(repr, choices))}")
        for field in ("hidden_activation", "classifier_activation"):
            self._require(getattr(self, field) in ACT2CLS, field, f"one of {', '.join(sorted(ACT2CLS))}")
        self._require(
            self.initializer_cutoff_factor is None
            or (_is_number(self.initializer_cutoff_factor) and self.initializer_cutoff_factor > 0),
            "initializer_cutoff_factor",
            "None or a number above 0",
        )
        self._require(_is_int(self.sparse_pred_ignore_index), "sparse_pred_ignore_index", "an integer")
        self._require(isinstance(self.mol_backend, str), "mol_backend", "'auto' or the name of a backend")
        self._require(
            _is_int(self.mol_version) and 1 <= self.mol_version <= MOL_VERSION,
            "mol_version",
            f"a checkpoint format this code reads, 1 to {MOL_VERSION}",
        )

        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            f"a divisor of hidden_size={self.hidden_size}",
        )
        self._require(
            (self.hidden_size // self.num_attention_heads) % 2 == 0,
            "num_attention_heads",
            f"such that hidden_size={self.hidden_size} / num_attention_heads is even, which rotary embeddings need",
        )
        self._require(
            self.num_hidden_layers % self.group_depth == 0,
            "group_depth",
            f"a divisor of num_hidden_layers={self.num_hidden_layers}",
        )
        self._require(
            self.num_experts_per_tok <= self.num_experts or self.num_experts == 1,
            "num_experts_per_tok",
            f"at most num_experts={self.num_experts}",
        )
        self._check_mol_groups()
        self._check_rope_parameters()
        self._require(
            not (self.router_per_depth and self.mol_positions == "last"),
            "router_per_depth",
            "False with mol_positions='last', where only one layer of a group is routed",
        )
        self._require(
            self.layer_types is None
            or (
                isinstance(self.layer_types, (list, tuple))
                and len(self.layer_types) == self.num_hidden_layers
                and all(name in LAYER_TYPES for name in self.layer_types)
            ),
            "layer_types",
            f"None or a list of num_hidden_layers={self.num_hidden_layers} entries out of "
            f"{', '.join(map(repr, LAYER_TYPES))}",
        )
        for field in "pad_token_id bos_token_id eos_token_id cls_token_id sep_token_id".split():
            value = getattr(self, field)
            ids = value if isinstance(value, (list, tuple)) else [value]
            self._require(
                all(i is None or (_is_int(i) and 0 <= i < self.vocab_size) for i in ids),
                field,
                f"None or an id below vocab_size={self.vocab_size}",
            )

    def _check_rope_parameters(self) -> None:
        if self.rope_parameters is None:
            return
        self._require(isinstance(self.rope_parameters, dict), "rope_parameters", "None or a dict")
        given = self.rope_parameters
        if "rope_type" in given or "rope_theta" in given:
            given = {"full_attention": given}
        rope_types = ("default", *ROPE_INIT_FUNCTIONS)
        for name, settings in given.items():
            self._require(
                name in LAYER_TYPES and (settings is None or isinstance(settings, dict)),
                "rope_parameters",
                f"a dict of settings by layer type, {' and '.join(map(repr, LAYER_TYPES))}, or one for both",
            )
            settings = settings or {}
            self._require(
                settings.get("rope_type", "default") in rope_types,
                "rope_parameters",
                f"of a rope_type out of {', '.join(map(repr, rope_types))}",
            )
            self._require(
                settings.get("partial_rotary_factor", 1) == 1, "rope_parameters", "without a partial_rotary_factor"
            )

    def _check_mol_groups(self) -> None:
        groups = self.mol_groups
        if groups is None or groups == "all":
            return
        allowed = f"None, 'all' or a list of different group numbers from 0 to {self.num_groups - 1}"
        self._require(isinstance(groups, (list, tuple)) and len(groups) > 0, "mol_groups", allowed)
        self._require(
            all(_is_int(g) and 0 <= g < self.num_groups for g in groups) and len(set(groups)) == len(groups),
            "mol_groups",
            allowed,
        )


ModernALBERTConfig.register_for_auto_class()

__all__ = ["ModernALBERTConfig"]
