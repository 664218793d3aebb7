# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Report of where the routers of a Mixture of LoRAs send the tokens of a text, and how different the experts are."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.markdown import markdown_table
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.diagnostics.routing_tally import RoutingTally
from modernalbert.merging.ffn_recorder import mixture_calls
from modernalbert.mol_backends import Experts


# What `save` writes, and may therefore replace.
OUTPUT_FILES = ("routing_report.json", "routing_report.md", "routing_report.png")
# Least occurrences of a token that is shown for an expert, and the number of tokens shown.
MIN_COUNT, NUM_TOKENS = 5, 8


@dataclass
class RouterUse:
    """
    One layer's routing. H is an entropy as a share of log E, q the weights that mix the experts.

    Attributes:
        layer, group: 0-based.
        usage: (E) mean q of each expert; they sum to 1.
        slots: (E) share of the k slots of all tokens that each expert holds.
        probability_entropy: Mean over tokens of H(softmax): 1 = the router does not know, 0 = it is certain.
        usage_entropy: H(usage): 1 = all experts alike, 0 = one has everything.
        token_dependence: H(usage) less the mean over tokens of H(q), what a token says about its experts: 0 where all
            tokens are mixed alike, at most H(usage).
        balance_loss: Switch's, 1 when balanced.
        chosen_together: (E, E) share of the tokens that have both experts among their k.
    """

    layer: int
    group: int
    usage: list[float]
    slots: list[float]
    probability_entropy: float
    usage_entropy: float
    token_dependence: float
    balance_loss: float
    chosen_together: list[list[float]]


@dataclass
class GroupExperts:
    """
    The experts of one group.

    Attributes:
        moving_average: (E) of the routing in training, which an "ema" merge uses; a mean over positions where each has
            its own.
        similarity: (E, E) cosines between experts' deltas, both projections taken together.
        relative_norm: (E) Frobenius norms of the deltas, as shares of that of the shared weights.
        tokens: For each expert the tokens that weigh most for it, with their mean q; None without a tokenizer.
    """

    group: int
    moving_average: list[float]
    similarity: list[list[float]]
    relative_norm: list[float]
    tokens: list[list[tuple[str, float]]] | None


@dataclass
class RoutingReport:
    """Report of the routing of a text by a ModernALBERT; made by `measure`, written by `save`."""

    num_experts: int
    num_experts_per_tok: int
    num_tokens: int
    measured_on: str
    layers: list[RouterUse]
    groups: list[GroupExperts]

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: PreTrainedModel,
        batches: Iterable[dict],
        tokenizer: PreTrainedTokenizerBase | None = None,
        measured_on: str = "the given text",
    ) -> "RoutingReport":
        """
        Run a text through the encoder, in evaluation mode, and look at every router.

        Args:
            model: A ModernALBERT with `ffn_modulation="mol"`, `expert_mixing="token"` and more than one expert; with
                any head, though the encoder alone is the fastest.
            batches: Of model inputs, on the model's device. Padding counts nowhere.
            tokenizer: Names the experts' tokens, where the inputs are `input_ids`.
            measured_on: What the text is, for the report.

        Raises:
            ValueError: the model routes no tokens, or there is no text.
        """
        config = model.config
        names = ("ffn_modulation", "expert_mixing", "num_experts")
        modulation, mixing, num_experts = found = [getattr(config, name, None) for name in names]
        if modulation != "mol" or mixing != "token" or num_experts < 2:
            given = ", ".join(f"{name}={value!r}" for name, value in zip(names, found))
            raise ValueError(
                f"{given} is not allowed: a routing report needs a Mixture of LoRAs ('mol') of at least 2 experts that "
                "routes tokens (expert_mixing='token')."
            )
        tallies: dict[int, RoutingTally] = {}
        dense_weights: dict[int, torch.Tensor] = {}  # of the last forward, by layer
        by_token = {
            k: torch.zeros(config.vocab_size, config.num_experts + 1, dtype=torch.float64)
            for k in config.modulated_groups
        }

        def visit(group, mlp, position, x, output):
            layer = group * config.group_depth + position
            tally = tallies.setdefault(layer, RoutingTally(config.num_experts, config.num_experts_per_tok))
            dense_weights[layer] = tally.add(mlp.mol_router(x, position).cpu())

        with mixture_calls(model, visit) as tokens:
            for batch in batches:
                model(**batch)
                if tokenizer is None or batch.get("input_ids") is None:
                    continue
                ids = tokens(batch["input_ids"].flatten(0, -2)).cpu()
                for layer, weights in dense_weights.items():
                    counted = torch.nn.functional.pad(weights, (0, 1), value=1.0)  # the last column counts
                    by_token[layer // config.group_depth].index_add_(0, ids, counted)
        if not any(tally.num_tokens for tally in tallies.values()):
            raise ValueError("batches is not allowed to be without tokens: a routing report needs a text.")
        uses = len(tallies) // len(by_token)
        return cls(
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            num_tokens=next(iter(tallies.values())).num_tokens,
            measured_on=measured_on,
            layers=[
                RouterUse(layer, layer // config.group_depth, **tallies[layer].figures()) for layer in sorted(tallies)
            ],
            groups=[
                GroupExperts(
                    k,
                    *describe_experts(model.base_model.groups[k].mlp),
                    None if tokenizer is None else top_tokens(by_token[k], uses, tokenizer),
                )
                for k in config.modulated_groups
            ],
        )

    @property
    def idle_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) of each expert with less than a quarter of an even share of a layer's routing weight."""
        floor = 1 / (4 * self.num_experts)
        return [(use.layer, e) for use in self.layers for e, share in enumerate(use.usage) if share < floor]

    def to_dict(self) -> dict:
        """Return the figures, ready for JSON."""
        return asdict(self) | {"idle_experts": self.idle_experts}

    @classmethod
    def from_dict(cls, values: dict) -> "RoutingReport":
        """Build from what `to_dict` gave, for example from JSON."""
        values = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        layers = [RouterUse(**use) for use in values["layers"]]
        return cls(**values | {"layers": layers, "groups": [GroupExperts(**group) for group in values["groups"]]})

    def to_markdown(self) -> str:
        """Format a section for a model card."""
        lines = [
            "## Routing",
            "",
            f"{self.num_tokens:,} tokens of {self.measured_on}; {self.num_experts} experts, "
            f"{self.num_experts_per_tok} per token. Entropies are shares of log {self.num_experts}. Token dependence: "
            "what a token says about its experts, 0 where all tokens are mixed alike.",
            "",
        ]
        header = ["layer", "group", "usage, least to most", "entropy of usage", "entropy of the router"]
        rows = []
        for use in self.layers:
            figures = use.usage_entropy, use.probability_entropy, use.token_dependence, use.balance_loss
            usage = f"{min(use.usage):.3f} to {max(use.usage):.3f}"
            rows.append([use.layer, use.group, usage, *(f"{figure:.3f}" for figure in figures)])
        lines.append(markdown_table([*header, "token dependence", "balance loss"], rows, num_words=7))
        idle = ", ".join(f"{expert} in layer {layer}" for layer, expert in self.idle_experts) or "none"
        lines += ["", f"Experts with less than a quarter of an even share: {idle}.", ""]
        rows = []
        for group in self.groups:
            for e, row in enumerate(group.similarity):
                cosine, nearest = max((value, other) for other, value in enumerate(row) if other != e)
                words = "" if group.tokens is None else " ".join(_cell(token) for token, _ in group.tokens[e])
                norm = f"{100 * group.relative_norm[e]:.1f} %"
                rows.append([group.group, e, norm, f"{nearest} (cosine {cosine:.2f})", words])
        lines.append(
            markdown_table(["group", "expert", "norm of its delta", "nearest expert", "its tokens"], rows, num_words=5)
        )
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write `routing_report.json`, `.md` and, where matplotlib is installed, `.png`; a complete folder or none."""
        folder = Path(folder)
        with atomic_folder(folder, replaceable=OUTPUT_FILES) as temporary:
            (temporary / "routing_report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            (temporary / "routing_report.md").write_text(self.to_markdown(), encoding="utf-8")
            self.plot(temporary / "routing_report.png")
        return folder

    def plot(self, file: str | Path) -> bool:
        """Plot usage, entropies and similarity of experts. Without matplotlib: write nothing and return False."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        count = 2 + len(self.groups)
        figure = Figure(figsize=(4.6 * count, 4.2), layout="constrained")  # no pyplot: a notebook keeps its backend
        axes = figure.subplots(1, count)
        usage = axes[0].imshow([use.usage for use in self.layers], vmin=0, aspect="auto", cmap="viridis")
        figure.colorbar(usage, ax=axes[0], label=f"mean weight (even: {1 / self.num_experts:.3f})")
        names = [str(use.layer) for use in self.layers]
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set(title="Usage of experts", xlabel="expert", ylabel="layer")

        for name in ("usage_entropy", "probability_entropy", "token_dependence"):
            values = [getattr(use, name) for use in self.layers]
            axes[1].plot(names, values, marker="o", label=name.replace("_", " "))
        axes[1].set(title="Routing", xlabel="layer", ylabel=f"share of log {self.num_experts}", ylim=(0, 1.05))
        axes[1].legend()

        for axis, group in zip(axes[2:], self.groups):
            image = axis.imshow(group.similarity, vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set(title=f"Cosine between experts, group {group.group}", xlabel="expert", ylabel="expert")
        figure.colorbar(image, ax=axes[-1])
        figure.savefig(file, dpi=110)
        return True


def _cell(token: str) -> str:
    """Format a token as code in a markdown table."""
    token = token.replace("|", "\\|")
    return f"`` {token} ``" if "`" in token else f"`{token}`"


def describe_experts(mlp) -> tuple[list[float], list[list[float]], list[float]]:
    """
    Describe the experts of a routed FFN: moving average (E), cosines between deltas (E, E), norms relative to the FFN's
    (E).
    """
    experts: Experts = mlp.experts
    products = sum(
        _inner_products(A.double(), B.double())
        for A, B in ((experts.A_in, experts.B_in), (experts.A_out, experts.B_out))
    )
    norms = products.diagonal().sqrt()
    # An expert that is still zero resembles none.
    cosines = products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    shared = sum(layer.weight.double().square().sum() for layer in (mlp.Wi, mlp.Wo)).sqrt()
    average = mlp.mol_usage if mlp.mol_usage.dim() == 1 else mlp.mol_usage.mean(dim=0)
    return average.tolist(), cosines.tolist(), (experts.scaling * norms / shared).tolist()


def _inner_products(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Compute <B_i A_i, B_j A_j> for all i, j of (E, r, x) and (E, y, r), without building a delta."""
    return (torch.einsum("irx,jsx->ijrs", A, A) * torch.einsum("iyr,jys->ijrs", B, B)).sum(dim=(-2, -1))


def top_tokens(by_token: torch.Tensor, uses: int, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, float]]]:
    """
    Return the tokens that weigh most for each expert.

    Args:
        by_token: (vocabulary, E + 1) sums of q by token, and counts.
        uses: How often the group's FFN works on each token of the text.
    """
    counts = by_token[:, -1]
    seen = (counts >= MIN_COUNT * uses).nonzero().flatten()
    means = by_token[seen, :-1] / counts[seen, None]
    order = means.argsort(dim=0, descending=True, stable=True)[:NUM_TOKENS].T
    return [
        [(tokenizer.convert_ids_to_tokens(seen[i].item()), means[i, e].item()) for i in row]
        for e, row in enumerate(order)
    ]
