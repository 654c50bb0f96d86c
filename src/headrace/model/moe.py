"""The routed experts of MoE models: where they are, and how their matrices are stored.

transformers calls one function for the routed experts of nearly all families. A few multiply theirs in code of their own;
their forward is patched here to call that function. Weights keep their names and places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from headrace.torch_compat import own_parameters


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One matrix of every expert of a layer, in one parameter for all or in one each."""

    parameter: str  # name below the experts module; with {} for the expert's number, where each has its own
    shape: tuple[int, ...]  # (experts, outputs, inputs)
    outputs_last: bool = False  # the shape is (experts, inputs, outputs)
    interleaved: bool = False  # rows of gate and up alternate

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        count = self.shape[0] if "{}" in self.parameter else 1
        return tuple(self.parameter.format(i) for i in range(count))


@dataclass(frozen=True, slots=True)
class MoeLayout:
    """The layout of a layer's routed experts."""

    up: tuple[ExpertWeights, ...]  # gate_up_proj, or gate_proj and up_proj, stacked
    down: ExpertWeights
    identities: int = 0  # number of zero-computation experts, after the others: they return their input

    @property
    def stacks(self) -> tuple[ExpertWeights, ...]:
        """Up and down."""
        return (*self.up, self.down)

    @property
    def choices(self) -> int:
        """Number of experts that a router chooses among."""
        return self.down.shape[0] + self.identities


def moe_layout_of(module: nn.Module) -> MoeLayout | None:
    """The layout of this module's routed experts; None: it has none that can stay packed."""
    found: Any = getattr(module, "moe_layout", None)
    if found is not None:
        return found if isinstance(found, MoeLayout) else None
    if not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")):
        return None  # transformers has not put its experts interface around the class
    stacks = {
        key: ExpertWeights(key, tuple(parameter.shape), bool(module.is_transposed), not module.is_concatenated)
        for key, parameter in own_parameters(module).items()
        if parameter is not None and parameter.dim() == 3
    }
    up, down = stacks.get("gate_up_proj") or stacks.get("up_proj"), stacks.get("down_proj")
    return MoeLayout((up,), down) if up is not None and down is not None and len(stacks) == 2 else None


def patch_moe_layers(model: PreTrainedModel, implementation: str) -> None:
    """Patch experts with a matmul of their own to use `implementation`, as registered with transformers."""
    for module in list(model.modules()):
        patch = _OWN.get(type(module).__name__)
        if patch is not None:
            patch(module, partial(_multiply, implementation))


# Computes the experts of a module on hidden (rows, hidden), with ids and weights (rows, top_k).
Multiply = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _multiply(
    implementation: str, experts: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = ALL_EXPERTS_FUNCTIONS[implementation](experts, hidden, ids, weights)
    return out


def _describe(
    module: Any, layout: MoeLayout, activation: Callable[[torch.Tensor], torch.Tensor], gated: bool = True
) -> None:
    """Set the attributes of transformers' experts interface on a module without biases."""

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    module.moe_layout = layout
    module.num_experts = layout.down.shape[0]
    module.has_gate, module.has_bias, module.has_post_expert_norm = gated, False, False
    module._apply_gate, module.act_fn = apply_gate, activation


def _llama4(block: Any, multiply: Multiply) -> None:
    """Llama 4 computes every expert for every row, most scaled by zero; its routing weights scale the experts' input."""
    experts = block.experts
    up, down = (
        ExpertWeights(name, tuple(getattr(experts, name).shape), True) for name in ("gate_up_proj", "down_proj")
    )
    _describe(experts, MoeLayout((up,), down), experts.act_fn)

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        weights, ids = scores.topk(block.top_k, dim=-1)
        pairs = (hidden.unsqueeze(1) * weights.unsqueeze(-1)).flatten(0, 1)
        routed = multiply(experts, pairs, ids.view(-1, 1), torch.ones_like(weights).view(-1, 1))
        return block.shared_expert(hidden) + routed.view(-1, block.top_k, block.hidden_dim).sum(1), logits

    block.forward = forward


def _dbrx(experts: Any, multiply: Multiply) -> None:
    """DBRX stacks all experts in one matrix, and stores down_proj transposed [in, out]."""
    shape = experts.num_experts, experts.ffn_hidden_size, experts.hidden_size
    layout = MoeLayout(
        (ExpertWeights("mlp.w1", shape), ExpertWeights("mlp.v1", shape)),
        ExpertWeights("mlp.w2", shape, outputs_last=True),
    )
    _describe(experts, layout, experts.mlp.activation_fn)

    def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return multiply(experts, hidden.reshape(-1, experts.hidden_size), ids, weights).view_as(hidden)

    experts.forward = forward


def _longcat_flash(experts: Any, multiply: Multiply) -> None:
    """LongCat-Flash has zero-computation experts. They have no weights, though a parameter has space for them."""
    if experts.gate_up_proj is None:
        return
    count, (_, *shape) = experts.num_routed_experts, experts.gate_up_proj.shape
    up, down = (
        ExpertWeights("gate_up_proj", (count, *shape)),
        ExpertWeights("down_proj", tuple(experts.down_proj.shape)),
    )
    _describe(experts, MoeLayout((up,), down, identities=experts.zero_expert_num), experts.act_fn)
    experts.forward = partial(multiply, experts)


def _jetmoe(block: Any, multiply: Multiply) -> None:
    """JetMoe sorts rows by expert and reads the counts."""
    up, down = (ExpertWeights(f"{one}.weight", tuple(getattr(block, one).weight.shape)) for one in _JETMOES)
    _describe(block, MoeLayout((up,), down), block.activation)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, block.input_size)
        scores, ids = block.router.layer(rows).topk(block.router.top_k, dim=-1)
        summed: torch.Tensor = block.bias + multiply(block, rows, ids, scores.softmax(-1)).view_as(hidden)
        return summed

    block.forward = forward


def _jetmoe_attention(block: Any, _: Multiply) -> None:
    """JetMoe also routes its query and output projections. Here one matmul computes all of them; the routed ones are gathered."""
    for name in _JETMOES:
        experts = getattr(block, name)
        with torch.device("meta"):
            one = nn.Linear(experts.input_size, block.num_experts * experts.output_size, bias=False)
        setattr(block, name, one.requires_grad_(False))

    def routed(linear: nn.Module, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(rows, inputs), (rows, top_k) to (rows, top_k, outputs)."""
        found: torch.Tensor = linear(rows).view(len(rows), block.num_experts, -1)
        return found.gather(1, ids.unsqueeze(-1).expand(-1, -1, found.shape[-1]))

    def queries(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        rows = hidden.reshape(-1, block.input_size)
        scores, ids = block.router.layer(rows).topk(block.top_k, dim=-1)
        found = routed(block.input_linear, rows, ids)
        return found.view(*hidden.shape[:-1], *found.shape[1:]), scores, (ids, scores.softmax(-1))

    def reduced(heads: torch.Tensor, routing: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, weights = routing
        found = routed(block.output_linear, heads.reshape(-1, heads.shape[-1]), ids.view(-1, 1))
        summed: torch.Tensor = block.bias + (found.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)
        return summed.view(*heads.shape[:-2], -1)

    block.map, block.reduce = queries, reduced


_JETMOES = "input_linear", "output_linear"


def _switch(block: Any, multiply: Multiply) -> None:
    """Switch Transformers have a module for each expert, and drop rows beyond an expert's capacity."""
    experts, router = block.experts, block.router
    first = experts["expert_0"]
    up, down = (
        ExpertWeights(f"expert_{{}}.{one}.weight", (experts.num_experts, *getattr(first, one).weight.shape))
        for one in ("wi", "wo")
    )
    _describe(experts, MoeLayout((up,), down), first.act, gated=False)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = router.classifier(hidden).softmax(-1).max(-1, keepdim=True)
        places = nn.functional.one_hot(ids.squeeze(-1), experts.num_experts).cumsum(-2).gather(-1, ids)
        weights = weights * (places <= router.expert_capacity)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return multiply(experts, rows, ids.view(-1, 1), weights.view(-1, 1)).view_as(hidden)

    block.forward = forward


_OWN: dict[str, Callable[[Any, Multiply], None]] = {
    "Llama4TextMoe": _llama4,
    "DbrxExperts": _dbrx,
    "LongcatFlashExperts": _longcat_flash,
    "JetMoeMoE": _jetmoe,
    "JetMoeMoA": _jetmoe_attention,
    "SwitchTransformersSparseMLP": _switch,
}
