# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The mathematics of a Mixture of LoRAs (MoL), in plain torch.

One token state x, a feed-forward network (FFN) with first projection P_in, activation step u(.) and second projection
P_out, and E LoRA experts (A_in, B_in, A_out, B_out) with scale s:

    h_e = P_in(x) + s B_in,e A_in,e x            u_e = u(h_e)
    MoL(x) = sum_e q_e (P_out(u_e) + s B_out,e A_out,e u_e)

with q the renormalised top-k of a softmax router (paper, section on the MoL layer). Because the q of a token sum to 1,
P_in and P_out run once per token, whatever k is:

    MoL(x) = P_out(sum_e q_e u_e) + s sum_e B_out,e A_out,e (q_e u_e)

Shapes used below: T tokens, d hidden size, f FFN width, n_in outputs of P_in (2 f for a GLU, f for a plain MLP),
E experts of rank r, k experts per token.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .mol_backends import (
    FFN,
    DropoutMasks,
    Experts,
    check_mol_backend,
    concatenate_experts,
    expert_mask,
    select_mol_backend,
    single_expert_forward,
)


# --- routing ---------------------------------------------------------------------------------------------------------


class MoLRouter(nn.Module):
    """
    Linear router from token states to one logit per expert.

    `weight` is (E, d), or (G, E, d) when each of `num_depths` = G layers of the group has its own router.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_depths: int | None = None, jitter_noise: float = 0.0):
        super().__init__()
        shape = (num_experts, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape if num_depths is None else (num_depths, *shape)))
        self.jitter_noise = jitter_noise

    def forward(self, hidden_states: torch.Tensor, depth: int = 0) -> torch.Tensor:
        """Map (..., d) -> logits (..., E), float32 (float64 for float64 input). Jitter acts in training only."""
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        logits = self.score(hidden_states, depth)
        return logits if logits.dtype == torch.float64 else logits.float()

    def score(self, hidden_states: torch.Tensor, depth: int) -> torch.Tensor:
        """Map (..., d) -> logits (..., E) in the dtype of the product."""
        return nn.functional.linear(hidden_states, self.weight if self.weight.dim() == 2 else self.weight[depth])


def route(router_logits: torch.Tensor, num_experts_per_tok: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Choose k experts per token.

    Args:
        router_logits: (..., E), float32 or float64.
        num_experts_per_tok: k.

    Returns:
        The softmax p (..., E), the routing weights q (..., k) which sum to 1, and the expert indices (..., k). For
        k = 1 renormalising gives the constant 1, so q = p / stop_gradient(p) keeps the gradient (our decision).
    """
    probabilities = router_logits.softmax(dim=-1)
    top_k_weights, top_k_index = probabilities.topk(num_experts_per_tok, dim=-1)
    total = top_k_weights.sum(dim=-1, keepdim=True)
    return probabilities, top_k_weights / (total.detach() if num_experts_per_tok == 1 else total), top_k_index


class RoutingSummary(NamedTuple):
    """Summary of the routing of one forward, over its R router calls and its real tokens."""

    balance_loss: torch.Tensor  # scalar, mean over calls; 1 when balanced
    z_loss: torch.Tensor  # scalar, mean over calls of mean logsumexp^2
    usage: torch.Tensor  # (R, E) mean routing weight q per expert, no gradient
    num_tokens: torch.Tensor  # scalar, real tokens


def summarise_routing(
    router_logits: tuple[torch.Tensor, ...], num_experts_per_tok: int, token_mask: torch.Tensor | None = None
) -> RoutingSummary:
    """
    Balance loss, z loss and expert usage of one forward.

    The balance loss is Switch's (Fedus et al. 2021), E sum_e f_e P_e with f_e the share of the k T slots that expert e
    holds and P_e its mean probability. Tokens where `token_mask` is false count nowhere.

    Args:
        router_logits: R tensors (..., E), one per router call.
        num_experts_per_tok: k.
        token_mask: (...) booleans, true for real tokens; None = all are real.
    """
    logits = torch.stack(router_logits).flatten(1, -2)  # (R, T, E)
    num_experts = logits.shape[-1]
    probabilities, top_k_weights, top_k_index = route(logits, num_experts_per_tok)
    chosen = expert_mask(top_k_index, num_experts).to(logits.dtype)  # (R, T, k, E)
    slots = chosen.sum(dim=-2)
    usage = (chosen * top_k_weights.detach().unsqueeze(-1)).sum(dim=-2)
    z = logits.logsumexp(dim=-1, keepdim=True).square()
    if token_mask is None:
        real = logits.new_ones(logits.shape[1])
    else:
        real = token_mask.reshape(-1).to(device=logits.device, dtype=logits.dtype)
    num_tokens = real.sum()
    # 1 / 0 tokens: a batch of padding alone has losses of 0, not NaN.
    share = real / num_tokens.clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        """Over tokens, (R, T, n) -> (R, n). No product of matrices, which autocast would do in half precision."""
        return (values * share[:, None]).sum(dim=1)

    fractions, mean_probabilities = mean(slots) / num_experts_per_tok, mean(probabilities)
    return RoutingSummary(
        balance_loss=num_experts * (fractions * mean_probabilities).sum(dim=-1).mean(),
        z_loss=mean(z).mean(),
        usage=mean(usage),
        num_tokens=num_tokens,
    )


def sum_over_processes(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Sum each tensor over the processes of the run, in one communication."""
    if not tensors or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(tensors)
    sums = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(sums)
    return [part.view_as(tensor) for part, tensor in zip(sums.split([t.numel() for t in tensors]), tensors)]


# --- feed-forward networks -------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """
    The plain shared FFN, W_o (act(a) * b) with (a, b) = W_i x: the activated half comes first, as in ModernBERT.

    The modulations below subclass it. Their common interface is
    `forward(x (..., d), depth, expert_weights, return_router_logits) -> (output (..., d), router logits or None)`,
    where `depth` is the layer's place in its group (0-based); the plain FFN ignores all but x.
    """

    def __init__(self, config, group: int):
        super().__init__()
        self.width = config.ffn_width(group)
        self.Wi = nn.Linear(config.hidden_size, 2 * self.width, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_activation]
        self.glu_activation = config.hidden_activation
        self.drop = nn.Dropout(config.mlp_dropout)
        self.Wo = nn.Linear(self.width, config.hidden_size, bias=config.mlp_bias)
        self.Wo.init_std = config.residual_initializer_range

    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        """Map (..., 2 f) -> (..., f)."""
        activated, gate = projected.chunk(2, dim=-1)
        activated = self.act(activated)
        # A tensor of this size less, where nothing keeps it.
        return activated * gate if torch.is_grad_enabled() else activated.mul_(gate)

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the shared FFN without its modulation, (..., d) -> (..., d)."""
        return self.Wo(self.drop(self.activate(self.Wi(x))))

    def forward(
        self,
        x: torch.Tensor,
        depth: int = 0,
        expert_weights: torch.Tensor | None = None,
        return_router_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.plain_forward(x), None

    def get_expert_weights(self) -> torch.Tensor | None:
        """Return the (E,) weights of the merged expert, to be passed to `forward`; None where tokens are routed."""
        return None

    def multiply_adds(self, depth: int = 0) -> int:
        """
        Count the multiply-adds of one token's forward pass at one depth, as the mathematics needs them, for any
        backend.
        """
        return self.Wi.weight.numel() + self.Wo.weight.numel()

    def init_modulation(self) -> None:
        """Give initial values to what a subclass adds (called under no_grad)."""


def lora_parameters(num: int, rank: int, hidden_size: int, width: int) -> tuple[nn.Parameter, ...]:
    """Return (A_in, B_in, A_out, B_out) of `num` LoRAs on a GeGLU FFN, without values."""
    shapes = ((num, rank, hidden_size), (num, 2 * width, rank), (num, rank, width), (num, hidden_size, rank))
    return tuple(nn.Parameter(torch.empty(shape)) for shape in shapes)


def init_lora(A: torch.Tensor, B: torch.Tensor) -> None:
    """Initialise LoRAs: A uniform in +-1/sqrt(inputs), B zero, so that step 0 is the shared model."""
    bound = 1 / math.sqrt(A.shape[-1])
    init.uniform_(A, -bound, bound)
    init.zeros_(B)


class LoRADropout(nn.Module):
    """Draws the dropout masks of one call of a LoRA-modulated FFN."""

    def __init__(self, ffn_dropout: float, lora_dropout: float):
        super().__init__()
        self.ffn_dropout = ffn_dropout
        self.lora_dropout = lora_dropout

    def forward(self, x: torch.Tensor, width: int) -> DropoutMasks:
        """Draw masks for x (T, d) and FFN width f; all None outside training."""

        def draw(probability: float, features: int) -> torch.Tensor | None:
            if not self.training or probability == 0:
                return None
            return nn.functional.dropout(x.new_ones(x.shape[0], features), probability)

        return DropoutMasks(
            ffn=draw(self.ffn_dropout, width),
            lora_in=draw(self.lora_dropout, x.shape[-1]),
            lora_out=draw(self.lora_dropout, width),
        )


class DepthLoRAFeedForward(FeedForward):
    """
    Baseline "depth_lora": one static LoRA per modulated layer position, no router (Relaxed Recursive Transformers,
    Bae et al. 2024). With `lora_rank` = E r / G it has as many parameters as MoL.
    """

    def __init__(self, config, group: int):
        super().__init__(config, group)
        # Depth in the group -> row of the factors; None where the FFN is plain.
        modulated = [depth for depth in range(config.group_depth) if config.is_modulated_position(depth)]
        self.rows = [modulated.index(depth) if depth in modulated else None for depth in range(config.group_depth)]
        self.depth_A_in, self.depth_B_in, self.depth_A_out, self.depth_B_out = lora_parameters(
            len(modulated), config.lora_rank, config.hidden_size, self.width
        )
        self.lora_drop = LoRADropout(config.mlp_dropout, config.lora_dropout)
        self.scaling = config.lora_scaling

    def init_modulation(self) -> None:
        init_lora(self.depth_A_in, self.depth_B_in)
        init_lora(self.depth_A_out, self.depth_B_out)

    def lora_factors(self) -> tuple[nn.Parameter, ...]:
        """Return (A_in, B_in, A_out, B_out), one row for each modulated layer."""
        return self.depth_A_in, self.depth_B_in, self.depth_A_out, self.depth_B_out

    def multiply_adds(self, depth: int = 0) -> int:
        lora = 0 if self.rows[depth] is None else sum(factor[0].numel() for factor in self.lora_factors())
        return super().multiply_adds(depth) + lora

    def forward(self, x, depth=0, expert_weights=None, return_router_logits=False):
        row = self.rows[depth]
        if row is None:
            return self.plain_forward(x), None
        tokens = x.reshape(-1, x.shape[-1])
        factors = self.lora_factors()
        expert = Experts(*(factor[row : row + 1] for factor in factors), scaling=self.scaling)
        ffn = FFN(self.Wi, self.activate, self.Wo)
        output = single_expert_forward(tokens, ffn, expert, self.lora_drop(tokens, self.width))
        return output.view_as(x), None


class RoutedFeedForward(FeedForward):
    """
    Base of the mixtures: router, statistics, and the choice between routing tokens and one merged expert.

    A subclass gives its experts' parameters by `expert_parameters()`, and
    `mix_tokens(x (T, d), top_k_weights (T, k), top_k_index (T, k)) -> (T, d)` and
    `mix_experts(x (T, d), expert_weights (E,)) -> (T, d)`.
    """

    def __init__(self, config, group: int):
        super().__init__(config, group)
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.is_modulated = [config.is_modulated_position(depth) for depth in range(config.group_depth)]
        self.ema_decay = config.router_ema_decay
        # One expert needs no router and has nothing to count.
        self.expert_mixing = config.expert_mixing if self.num_experts > 1 else "uniform"
        if self.num_experts > 1:
            positions = config.group_depth if config.router_per_depth else None
            self.mol_router = MoLRouter(
                config.hidden_size, self.num_experts, positions, jitter_noise=config.router_jitter_noise
            )
            self.freeze_idle_router()
            shape = (self.num_experts,) if positions is None else (positions, self.num_experts)
            self.mol_usage = nn.Buffer(torch.full(shape, 1 / self.num_experts, dtype=torch.float32))
        else:
            self.mol_router = None

    def freeze_idle_router(self) -> None:
        """
        Freeze a router that mixes nothing: it gets no task gradient, and data-parallel training would wait for one.
        """
        if self.mol_router is not None and self.expert_mixing != "token":
            self.mol_router.weight.requires_grad_(False)

    def _apply(self, fn, recurse=True):
        # The statistics stay float32 when the model is cast: a moving average of decay 0.99 stalls in bfloat16.
        usage = self._buffers.get("mol_usage")
        super()._apply(fn, recurse)
        if usage is not None and self.mol_usage.dtype != torch.float32:
            self.mol_usage = usage.to(self.mol_usage.device)
        return self

    def init_modulation(self) -> None:
        if self.mol_router is not None:
            init.constant_(self.mol_usage, 1 / self.num_experts)

    def get_expert_weights(self) -> torch.Tensor | None:
        if self.expert_mixing == "token":
            return None
        if self.expert_mixing == "uniform":
            return torch.full((self.num_experts,), 1 / self.num_experts, device=self.Wi.weight.device)
        # A copy: the average moves on at the end of a training forward, and a checkpoint recompute must see this one.
        return self.mol_usage.clone() if self.mol_usage.dim() == 1 else self.mol_usage.mean(dim=0)

    def expert_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters of all experts, (E, ...) each."""
        raise NotImplementedError

    def multiply_adds(self, depth: int = 0) -> int:
        plain = super().multiply_adds(depth)
        if not self.is_modulated[depth]:
            return plain
        one_expert = sum(parameter[0].numel() for parameter in self.expert_parameters())
        if self.expert_mixing != "token":  # one merged expert, of the rank of all together
            return plain + self.num_experts * one_expert
        return plain + self.num_experts_per_tok * one_expert + self.num_experts * self.Wi.in_features

    @torch.no_grad()
    def update_usage(self, usage: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """
        Move the average towards one training forward's routing.

        Args:
            usage: (C, E) float32, mean routing weight of each of the C router calls of this forward, in layer order.
            num_tokens: Scalar, tokens behind it; with none nothing moves.
        """
        target = usage if self.mol_usage.dim() == 2 else usage.mean(dim=0)
        moved = torch.lerp(target.to(self.mol_usage), self.mol_usage, self.ema_decay)
        self.mol_usage.copy_(torch.where(num_tokens > 0, moved, self.mol_usage))

    def forward(self, x, depth=0, expert_weights=None, return_router_logits=False):
        if not self.is_modulated[depth]:
            return self.plain_forward(x), None
        tokens, router_logits = x.reshape(-1, x.shape[-1]), None
        if self.expert_mixing == "token":
            router_logits = self.mol_router(x, depth)
            _, top_k_weights, top_k_index = route(router_logits.reshape(-1, self.num_experts), self.num_experts_per_tok)
            output = self.mix_tokens(tokens, top_k_weights, top_k_index)
        else:
            output = self.mix_experts(tokens, self.get_expert_weights() if expert_weights is None else expert_weights)
            if return_router_logits and self.mol_router is not None:
                with torch.no_grad():
                    router_logits = self.mol_router(x, depth)
        return output.view_as(x), router_logits


class MoLFeedForward(RoutedFeedForward):
    """The Mixture of LoRAs: E LoRA experts on both projections of the shared FFN."""

    def __init__(self, config, group: int):
        super().__init__(config, group)
        self.mol_A_in, self.mol_B_in, self.mol_A_out, self.mol_B_out = lora_parameters(
            self.num_experts, config.lora_rank, config.hidden_size, self.width
        )
        self.lora_drop = LoRADropout(config.mlp_dropout, config.lora_dropout)
        self.scaling = config.lora_scaling
        check_mol_backend(config.mol_backend)
        self.mol_backend = config.mol_backend

    def init_modulation(self) -> None:
        super().init_modulation()
        init_lora(self.mol_A_in, self.mol_B_in)
        init_lora(self.mol_A_out, self.mol_B_out)

    def expert_parameters(self) -> tuple[nn.Parameter, ...]:
        return self.mol_A_in, self.mol_B_in, self.mol_A_out, self.mol_B_out

    @property
    def experts(self) -> Experts:
        """The experts as the backends take them."""
        return Experts(*self.expert_parameters(), self.scaling)

    def mix_tokens(self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        learns = any(parameter.requires_grad for parameter in self.act.parameters())
        ffn = FFN(self.Wi, self.activate, self.Wo, self.glu_activation, learns)
        masks = self.lora_drop(x, self.width)
        backend = select_mol_backend(self.mol_backend, x, ffn, self.experts, masks)
        return backend(x, top_k_weights, top_k_index, ffn, self.experts, masks)

    def mix_experts(self, x: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        ffn = FFN(self.Wi, self.activate, self.Wo)
        merged = concatenate_experts(self.experts, expert_weights)
        return single_expert_forward(x, ffn, merged, self.lora_drop(x, self.width))


class MoAFeedForward(RoutedFeedForward):
    """
    Baseline "moa": a mixture of bottleneck adapters after the FFN, h + sum_e q_e U_e act(D_e h) with h = FFN(x).

    The paper's exact form is not public; routing on x, the FFN's input, as MoL does, is our decision.
    """

    def __init__(self, config, group: int):
        super().__init__(config, group)
        self.bottleneck = config.resolved_moa_bottleneck(group)
        self.moa_down = nn.Parameter(torch.empty(self.num_experts, self.bottleneck, config.hidden_size))
        self.moa_up = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, self.bottleneck))
        self.adapter_drop = nn.Dropout(config.lora_dropout)

    def init_modulation(self) -> None:
        super().init_modulation()
        init_lora(self.moa_down, self.moa_up)

    def expert_parameters(self) -> tuple[nn.Parameter, ...]:
        return self.moa_down, self.moa_up

    def adapt(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Adapt x (T, d) by expert weights (T, E) or (E,), 0 for an expert that is not used -> (T, d)."""
        hidden = self.plain_forward(x)
        inner = self.act(nn.functional.linear(self.adapter_drop(hidden), self.moa_down.flatten(0, 1)))
        weights = weights.to(inner.dtype).unsqueeze(-1)
        inner = inner * weights.expand(*weights.shape[:-1], self.bottleneck).flatten(-2)
        return hidden + nn.functional.linear(inner, self.moa_up.transpose(0, 1).flatten(1))

    def mix_tokens(self, x: torch.Tensor, top_k_weights: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        chosen = expert_mask(top_k_index, self.num_experts).to(top_k_weights.dtype)
        return self.adapt(x, (chosen * top_k_weights.unsqueeze(-1)).sum(dim=-2))

    def mix_experts(self, x: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        return self.adapt(x, expert_weights)


FEED_FORWARDS = {
    "mol": MoLFeedForward,
    "moa": MoAFeedForward,
    "depth_lora": DepthLoRAFeedForward,
    "none": FeedForward,
}


def build_feed_forward(config, group: int) -> FeedForward:
    """Build the FFN of a group: `config.ffn_modulation` in the groups of `mol_groups`, plain elsewhere."""
    return (FEED_FORWARDS[config.ffn_modulation] if group in config.modulated_groups else FeedForward)(config, group)
