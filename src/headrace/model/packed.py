"""Modules whose weights never become tensors of the model: they are multiplied where they lie."""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import _default_apply_gate

from headrace.kernels.expert_mlp import ExpertShapes
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.model.matrix import Matrix

# Multiplies activations (..., inputs) with the packed matrix of a linear: (..., outputs), fp32.
LinearFunction: TypeAlias = Callable[["PackedLinear", torch.Tensor], torch.Tensor]


class WeightAskedError(Exception):
    """A module looked at the weight of a linear instead of calling it, so it must have one."""

    def __init__(self, linear: "PackedLinear"):
        super().__init__("the weight of a packed linear was asked for")
        self.linear = linear


class AbsentWeight:
    """Stands where a packed linear would have its weight. It says what it would be; asked for numbers, it raises."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, linear: "PackedLinear"):
        self._linear = linear

    def __getattr__(self, name: str) -> Any:
        raise WeightAskedError(self._linear)

    @classmethod
    def __torch_function__(cls, _function: Any, _types: Any, given: Any = (), named: Any = None) -> Any:
        raise WeightAskedError(next(one._linear for one in tree_leaves((given, named)) if isinstance(one, cls)))


class PackedLinear(nn.Module):
    """A linear layer whose weight stays in the checkpoint. `linear_function` is set by whoever delivers the weights."""

    def __init__(self, matrix: Matrix, linear_function: LinearFunction, bias: nn.Parameter | None):
        super().__init__()
        self.matrix = matrix
        self.linear_function = linear_function
        self.bias = bias
        self.in_features, self.out_features = matrix.inputs, matrix.outputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs). Called two hundred times a token, so past nn.Module's own call with its hooks."""
        if self.matrix.input_order is not None:
            x = x.index_select(-1, self.matrix.input_order)
        out = self.linear_function(self, x)
        return out if self.bias is None else out + self.bias

    forward = __call__

    @property
    def weight(self) -> AbsentWeight:
        """There is none: whoever wants more than its type meets `WeightAskedError`."""
        return AbsentWeight(self)

    def extra_repr(self) -> str:
        """Shape and quantisation, for printing the model."""
        types = ", ".join(sorted({tensor.type for tensor in self.matrix.tensors}))
        return f"{self.matrix.inputs}, {self.matrix.outputs}, type={types}"


class Router:
    """What chooses the experts of a layer, as far as it can be asked for scores beforehand."""

    def __init__(self, module: nn.Module, owner: nn.Module):
        """`module` holds the weight (experts, hidden), `owner` lies around it and the experts."""
        self.module, self._owner = module, owner

    @property
    def weight(self) -> torch.Tensor:
        """(experts, hidden)."""
        return self.module._parameters["weight"]  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """(experts,), added to the scores."""
        return self.module._parameters.get("bias")

    @property
    def correction(self) -> torch.Tensor | None:
        """(experts,), added to the sigmoid of the scores before the best are chosen."""
        for module in (self.module, self._owner):
            found = getattr(module, "e_score_correction_bias", None)
            if isinstance(found, torch.Tensor):
                return found.reshape(-1)
        return None


class PackedExperts:
    """The routed experts of one layer: for each the matrices that lead up to the gate, and down from it."""

    def __init__(
        self,
        index: int,
        module: Any,
        up: tuple[Matrix, ...],
        down: tuple[Matrix, ...],
        router: Router | None,
        identities: int = 0,
    ):
        """`index` counts layers with experts; `module` is transformers' own, which has the gate and the biases.

        A router may choose so many `identities` besides: further experts that give back what they are given.
        """
        self.index = index
        self.module = module
        self.router = router
        self.up = up
        self.down = down
        self.identities = identities

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.up)

    @property
    def plain_shapes(self) -> ExpertShapes | None:
        """That of every expert, where all are alike and no more than down(silu(gate) * up), without biases, rows and columns in
        order."""
        module = self.module
        if (
            module.has_bias
            or not module.has_gate
            or getattr(type(module), "_apply_gate", None) is not _default_apply_gate
        ):
            return None
        matrices = (*self.up, *self.down)
        plain = all(one.order is None and not any(part.tensor.k_splits for part in one.slices) for one in matrices)
        forms = {ExpertShapes(_pieces_of(up), _pieces_of(down)) for up, down in zip(self.up, self.down, strict=True)}
        return forms.pop() if plain and len(forms) == 1 and isinstance(module.act_fn, Silu) else None

    def matrices(self, expert: int) -> tuple[Matrix, Matrix]:
        """Up and down of one expert."""
        return self.up[expert], self.down[expert]


def _pieces_of(matrix: Matrix) -> tuple[tuple[str, int], ...]:
    return tuple([(part.tensor.type, part.rows) for part in matrix.slices])


class GatheredEmbedding:
    """A forward hook for a table of embeddings: fetches just the rows of the tokens at hand.

    The module's own forward still runs (some scale their rows), on a table of the fetched rows and the token ids
    numbered anew.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor]):
        """`gather` maps unique token ids (n,) to fp32 rows (n, hidden)."""
        self._gather = gather

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replace the table and the ids of this call."""
        ids = arguments[0]
        if ids.numel() <= DECODE_MAX_ROWS:  # not worth looking for equal ones
            unique, numbered = ids.reshape(-1), torch.arange(ids.numel()).view(ids.shape)
        else:
            unique, numbered = torch.unique(ids, return_inverse=True)
        module._parameters["weight"] = nn.Parameter(self._gather(unique), requires_grad=False)
        return (numbered, *arguments[1:])


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in one call where models spell it out in six."""

    def __init__(self, weight: torch.Tensor, eps: float, function: "Norm"):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self._function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) normalised over the last dimension."""
        return self._function(x, self.weight, self.eps)

    forward = __call__

    @classmethod
    def equal_to(cls, module: nn.Module, function: "Norm") -> "RmsNorm | None":
        """The same norm as `module`, or None if it is none. Decided by what it computes, not by its name."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = module._parameters.get("weight")
        if not isinstance(eps, float) or weight is None or len(module._parameters) > 1 or weight.dim() != 1:
            return None
        if len(signature(module.forward).parameters) > 1:
            return None  # it may be given a gate besides
        x = torch.randn((3, weight.shape[0]), generator=torch.Generator().manual_seed(0))
        try:
            expected = module(x)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            return None  # it takes more than activations
        for scale in (weight.data, weight.data + 1):
            if torch.allclose(torch.rms_norm(x, scale.shape, scale, eps), expected, rtol=1e-5, atol=1e-5):
                return cls(scale, eps, function)
        return None


class Silu(nn.Module):
    """x / (1 + exp(-x))."""

    def __init__(self, function: "Gate"):
        super().__init__()
        self._function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return self._function(x)

    forward = __call__


Norm: TypeAlias = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of activations, by weight and eps
Gate: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
