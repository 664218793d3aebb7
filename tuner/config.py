# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The configuration of a Mixture of LoRAs, and its type in peft."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig
from peft.utils import PeftType

from modernalbert.configuration_modernalbert import EXPERT_MIXINGS


# 1: factors without ".weight" in their names. 2: as peft's LoRA names its own.
MOL_VERSION = 2
SCORES = ("linear", "absolute")


# --- the peft type ---------------------------------------------------------------------------------------------------


def add_peft_type(name: str) -> "PeftType":
    """
    Return the member of peft's enumeration of that name, added if peft has none.

    peft keeps its methods in an enumeration, which is closed to others; a plain string fails later on.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
    return PeftType[name]


MOL = add_peft_type("MOL")


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class MoLConfig(PeftConfig):
    """
    Configuration of a [`MoLModel`].

    Args:
        r: Rank of an expert.
        lora_alpha: The experts' scale is lora_alpha / r.
        lora_dropout: Dropout probability on the input of the low-rank paths.
        num_experts: E, experts per FFN. One expert needs no router: it is a LoRA on all projections of the FFN.
        num_experts_per_tok: k, experts per token.
        target_modules: Names of the modules that hold an FFN, or a regular expression for the whole name. An FFN that
            is no module of its own (BERT, Whisper) is reached through its layer. None = by the type of the model.
        exclude_modules: Names, or a regular expression, of modules to leave alone.
        layers_to_transform: Numbers of the layers to adapt; None = all.
        layers_pattern: Name in front of the layer's number; None = the first number in a module's name counts.
        ffn_projections: Where an FFN is not recognised, the names of its linear layers inside the target, as
            `{"up": "w1", "down": "w2"}`, for a gated one with "gate" too.
        expert_mixing: "token" routes each token; "ema" and "uniform" run the weighted mean of the experts as one, with
            the moving average of the routing, or 1 / E, as weights: merging is then exact.
        num_frozen_experts: How many of the experts, the first ones, are not trained. All of them = only the router is.
        router_score: A token's score for an expert is its product with the router's row, "linear", or the "absolute"
            value of that, as for rows that are directions without a sign (`experts_from_loras`).
        router_bias: Whether the router has a bias (`add_experts` gives it one).
        router_target_coef: Weight of the cross-entropy of the routing against `expert_labels`, where a forward is given
            them: one expert number per row, as the number of its task.
        router_aux_loss_coef: Weight of the balance loss, added to the loss of a training forward.
        router_z_loss_coef: Weight of the router's z loss, likewise.
        router_jitter_noise: Half-width of the multiplicative noise on the router's input in training.
        router_ema_decay: Decay of the moving average of the routing.
        modules_to_save: Modules besides the adapter to train and save, as a classifier.
        init_weights: True = the adapted model starts as the base model. False is for tests.
        mol_version: Version of the adapter's format. None = no adapter has been made with this configuration; one
            that is made writes the version here.

    Raises:
        ValueError: a value is not allowed; the error names the field, the value, and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The experts' scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank paths."})
    num_experts: int = field(default=8, metadata={"help": "Experts per FFN."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that hold an FFN: names, or a regular expression."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name in front of the layer's number."}
    )
    ffn_projections: dict[str, str] | None = field(
        default=None, metadata={"help": "Names of gate, up and down projection in an FFN that is not recognised."}
    )
    expert_mixing: str = field(default="token", metadata={"help": "'token', 'ema' or 'uniform'."})
    num_frozen_experts: int = field(default=0, metadata={"help": "How many of the experts are not trained."})
    router_score: str = field(default="linear", metadata={"help": "'linear' or 'absolute'."})
    router_bias: bool = field(default=False, metadata={"help": "Whether the router has a bias."})
    router_target_coef: float = field(default=1.0, metadata={"help": "Weight of the routing's loss on expert_labels."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router's z loss."})
    router_jitter_noise: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    router_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the moving average of the routing."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model."})
    mol_version: int | None = field(default=None, metadata={"help": "Version of the adapter's format."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MOL
        if self.num_experts == 1:
            self.num_experts_per_tok = 1
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.validate()

    def validate(self) -> None:
        def require(name: str, is_allowed: bool, allowed: str) -> None:
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")

        def whole(name: str) -> bool:
            return isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool)

        def number(name: str) -> bool:
            value = getattr(self, name)
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        for name in ("r", "num_experts", "num_experts_per_tok"):
            require(name, whole(name) and getattr(self, name) >= 1, "a whole number of at least 1")
        most = f"at most num_experts={self.num_experts}"
        require("num_experts_per_tok", self.num_experts_per_tok <= self.num_experts, most)
        require("lora_alpha", number("lora_alpha") and self.lora_alpha > 0, "a number greater than 0")
        require("target_modules", self.target_modules != "all-linear", "modules that hold a feed-forward network")
        for name in ("lora_dropout", "router_jitter_noise", "router_ema_decay"):
            require(name, number(name) and 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        require("expert_mixing", self.expert_mixing in EXPERT_MIXINGS, "one of " + ", ".join(map(repr, EXPERT_MIXINGS)))
        require("router_score", self.router_score in SCORES, "one of " + ", ".join(map(repr, SCORES)))
        frozen = whole("num_frozen_experts") and 0 <= self.num_frozen_experts <= self.num_experts
        require("num_frozen_experts", frozen, f"from 0 to num_experts={self.num_experts}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_target_coef"):
            require(name, number(name) and getattr(self, name) >= 0, "a number of at least 0")
        names = self.ffn_projections
        is_named = names is None or (
            isinstance(names, dict)
            and {"up", "down"} <= names.keys() <= {"gate", "up", "down"}
            and all(isinstance(name, str) for name in names.values())
        )
        require("ffn_projections", is_named, "a dictionary with 'up' and 'down', and 'gate' where there is one")
        is_known = self.mol_version is None or (whole("mol_version") and self.mol_version <= MOL_VERSION)
        require("mol_version", is_known, f"at most {MOL_VERSION}: a newer modernalbert wrote this adapter")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    @property
    def is_routed(self) -> bool:
        """Whether there is a router: one expert needs none."""
        return self.num_experts > 1

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json`, and tell in the card how to load an adapter that peft alone does not know."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, "adapter_config.json")
        written = json.loads(file.read_text())
        # peft names the class and module of the base; loaded as remote code it lives in no importable module.
        if "transformers_modules" in str(written.get("auto_mapping")):
            file.write_text(json.dumps(written | {"auto_mapping": None}, indent=2, sort_keys=True))
        # An adapter of another name than "default" lies in a folder inside the one that has the card.
        outer = Path(save_directory).parent / "README.md"
        if outer.exists() and "library_name: peft" in outer.read_text(encoding="utf-8"):
            add_notice(outer)
        add_notice(Path(save_directory, "README.md"))


def add_notice(card: Path) -> None:
    """Put `CARD_NOTICE` in front of a card's text, once."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if CARD_NOTICE not in text:
        front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
        at = front.end() if front else 0
        card.write_text(f"{text[:at]}{CARD_NOTICE}\n{text[at:]}", encoding="utf-8")


CARD_NOTICE = (
    "> **`pip install modernalbert` and `import modernalbert` before loading this adapter**: it is a Mixture of LoRAs "
    "(peft type `MOL`), which peft alone does not know.\n"
)
