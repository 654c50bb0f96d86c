"""Modules whose weights stay packed: the kernels multiply them as stored, they never become tensors of the model."""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from headrace.kernels.expert_mlp import ExpertShapes
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.model.matrix import Matrix
from headrace.model.transformers_compat import has_usual_gate
from headrace.torch_compat import own_parameters

# Matmul of activations (..., inputs) with the packed matrix of a linear: (..., outputs), fp32.
LinearFunction: TypeAlias = Callable[["PackedLinear", torch.Tensor], torch.Tensor]


class WeightAskedError(Exception):
    """A module accessed the weight of a linear instead of calling it, so the linear must have one."""

    def __init__(self, linear: "PackedLinear"):
        super().__init__("the weight of a packed linear was accessed")
        self.linear = linear


class AbsentWeight:
    """Placeholder for the weight of a packed linear. It answers `dtype` and `device`; any other access raises."""

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
    """A linear layer whose weight stays in the checkpoint. `linear_function` is the engine's."""

    def __init__(self, matrix: Matrix, linear_function: LinearFunction, bias: nn.Parameter | None):
        super().__init__()
        self.matrix = matrix
        self.linear_function = linear_function
        self.bias = bias
        self.in_features, self.out_features = matrix.inputs, matrix.outputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs). Called two hundred times a token, so it bypasses nn.Module's call with its hooks."""
        if self.matrix.input_order is not None:
            x = x.index_select(-1, self.matrix.input_order)
        out = self.linear_function(self, x)
        return out if self.bias is None else out + self.bias

    forward = __call__

    @property
    def weight(self) -> AbsentWeight:
        """Placeholder: access to more than dtype and device raises `WeightAskedError`."""
        return AbsentWeight(self)

    def extra_repr(self) -> str:
        """Shape and quantisation, for printing the model."""
        types = ", ".join(sorted({tensor.type for tensor in self.matrix.tensors}))
        return f"{self.matrix.inputs}, {self.matrix.outputs}, type={types}"


class Router:
    """The router of a layer, in the form that expert prefetch needs to predict its scores."""

    def __init__(self, module: nn.Module, owner: nn.Module):
        """`module` holds the weight (experts, hidden), `owner` contains it and the experts."""
        self.module, self._owner = module, owner

    @property
    def weight(self) -> torch.Tensor:
        """(experts, hidden)."""
        weight: torch.Tensor = own_parameters(self.module)["weight"]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """(experts,), added to the scores."""
        return own_parameters(self.module).get("bias")

    @property
    def correction(self) -> torch.Tensor | None:
        """(experts,), added to the sigmoid of the scores before top-k."""
        for module in (self.module, self._owner):
            found = getattr(module, "e_score_correction_bias", None)
            if isinstance(found, torch.Tensor):
                return found.reshape(-1)
        return None


class PackedExperts:
    """The routed experts of one layer: gate_up_proj and down_proj of each."""

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

        `identities` is the number of zero-computation experts, which return their input.
        """
        self.index = index
        self.module = module
        self.router = router
        self.up = up
        self.down = down
        self.identities = identities

    @property
    def count(self) -> int:
        """Number of experts with weights."""
        return len(self.up)

    @property
    def plain_shapes(self) -> ExpertShapes | None:
        """The shapes that all experts share; None if they differ, or compute other than down(silu(gate) * up).

        Biases, reordered rows and K-splits also make it None.
        """
        module = self.module
        if module.has_bias or not module.has_gate or not has_usual_gate(module):
            return None
        matrices = (*self.up, *self.down)
        plain = all(one.order is None and not any(part.tensor.k_splits for part in one.slices) for one in matrices)
        shapes = {
            ExpertShapes(_slice_types(up), _slice_types(down)) for up, down in zip(self.up, self.down, strict=True)
        }
        return shapes.pop() if plain and len(shapes) == 1 and isinstance(module.act_fn, Silu) else None

    def matrices(self, expert: int) -> tuple[Matrix, Matrix]:
        """Up and down of one expert."""
        return self.up[expert], self.down[expert]


def _slice_types(matrix: Matrix) -> tuple[tuple[str, int], ...]:
    return tuple([(part.tensor.type, part.rows) for part in matrix.slices])


class GatheredEmbedding:
    """A forward pre-hook of an embedding table that reads only the rows of the tokens in this call.

    The module's own forward still runs (some scale their rows), on a table of the rows read and renumbered token ids.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor]):
        """`gather` maps unique token ids (n,) to fp32 rows (n, hidden)."""
        self._gather = gather

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replace the table and the ids of this call."""
        ids = arguments[0]
        if ids.numel() <= DECODE_MAX_ROWS:  # not worth a search for duplicates
            unique, numbered = ids.reshape(-1), torch.arange(ids.numel()).view(ids.shape)
        else:
            unique, numbered = torch.unique(ids, return_inverse=True)
        own_parameters(module)["weight"] = nn.Parameter(self._gather(unique), requires_grad=False)
        return (numbered, *arguments[1:])


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in one call instead of the six operations in models' code."""

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
        """The same norm as `module`, or None if it is no RMSNorm. Decided by computing it, not by its name."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = own_parameters(module).get("weight")
        if not isinstance(eps, float) or weight is None or len(own_parameters(module)) > 1 or weight.dim() != 1:
            return None
        if len(signature(module.forward).parameters) > 1:
            return None  # its forward may take a gate as well
        x = torch.randn((3, weight.shape[0]), generator=torch.Generator().manual_seed(0))
        try:
            expected = module(x)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            return None  # its forward takes more than activations
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
        """Any shape to the same shape."""
        return self._function(x)

    forward = __call__


Norm: TypeAlias = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # (activations, weight, eps)
Gate: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
