"""Taps for a stack of matrices ``(experts, d_out, d_in)`` inside a mixture of experts.

Such a module multiplies rows by slices of its parameters in its own forward: in a loop over
experts, or by one grouped product. The forward runs unchanged, and its products are watched. A
product with a factor in the memory of a stack gets the two taps of a linear layer, with leaves that
have one row per expert. The address and strides of the factor tell whether it is a slice, a
transposed view or a copy of another precision.

Rows of zeros are padding and not counted: some kernels need a multiple of 8 rows per expert.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from titan_shampoo.statistics.sums import RowsOfExperts
from titan_shampoo.statistics.tap import LEAVES, Leaves, check_device, is_measured, replace_forward

_PRODUCTS = frozenset(
    (
        torch.matmul, torch.mm, torch.bmm, torch._grouped_mm, functional.grouped_mm,
        Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
    )
)  # fmt: skip
"""Products ``f(rows, factor)`` with a factor ``(..., d_in, d_out)``."""

_COPIES = frozenset(
    (
        Tensor.to, Tensor.bfloat16, Tensor.half, Tensor.float, Tensor.double, Tensor.type_as,
        Tensor.contiguous, Tensor.clone,
    )
)  # fmt: skip
"""Operations that a module may apply to a stack, or a slice of it, before the product."""


def attach(module: nn.Module, name: str, leaves: Leaves) -> None:
    """Tap the products by parameter ``name`` of ``module`` from its next forward pass on.

    Raises:
        ValueError: If the forward was replaced before.
    """
    if not is_tapped(module):
        replace_forward(module, _forward(), leaves.name)
        setattr(module, LEAVES, {})
    getattr(module, LEAVES)[name] = leaves


def is_tapped(module: nn.Module) -> bool:
    """True if the products of ``module`` are tapped."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward()


@functools.cache
def _forward() -> Callable[..., Any]:
    """The forward of all tapped modules of experts; compilers leave it alone."""

    def forward(module: nn.Module, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - whatever the module returns
        if not is_measured():
            return type(module).forward(module, *args, **kwargs)
        # A compiled region inside would hide its products.
        with torch.compiler.set_stance("force_eager"), _Products(module):
            return type(module).forward(module, *args, **kwargs)

    return torch.compiler.disable(forward)


class _Place(NamedTuple):
    """Memory of some matrices of a stack."""

    leaves: Leaves
    matrices: Tensor
    """``(n, d_out, d_in)``."""
    first: int
    """Expert of the first of them."""


class _Found(NamedTuple):
    """The stack or expert that a factor belongs to."""

    leaves: Leaves
    expert: int | None
    """None for the whole stack."""


class _Products(TorchFunctionMode):
    """Taps the products with stacks of ``module`` while it is active."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        stacks: Mapping[str, Leaves] = getattr(module, LEAVES)
        self._places = [
            _Place(leaves, _local(param), 0)
            for name, leaves in stacks.items()
            if (param := module._parameters[name]) is None or param.requires_grad
        ]
        self._slices: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._rows: dict[tuple[object, ...], RowsOfExperts] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever ``func`` returns
        """Result of ``func``, tapped if it multiplies by a stack."""
        kwargs = kwargs or {}
        found = self._find(_factor(func, args))
        if found is not None:
            return self._tapped(func, found, args, kwargs)
        result = func(*args, **kwargs)
        if func in _COPIES:
            self._remember(args[0], result)
        return result

    def _tapped(
        self,
        func: Callable[..., Any],
        found: _Found,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The product ``func(rows, factor)``, tapped."""
        leaves, (input, *others) = found.leaves, args
        check_device(input, leaves)
        input_zeros, output_zeros = self._leaves_of(found)
        rows = self._rows_of(input, kwargs.get("offs"), found)
        count = _InputTap.apply(input, rows, input_zeros)  # type: ignore[no-untyped-call]
        output = func(input, *others, **kwargs)
        return _OutputTap.apply(output, count, rows, output_zeros)  # type: ignore[no-untyped-call]

    def _leaves_of(self, found: _Found) -> tuple[Tensor, Tensor]:
        """The leaves for the inputs and the outputs of one expert, or of all."""
        leaves = found.leaves
        assert leaves.output is not None, "stacks have both sums"
        if found.expert is None:
            return leaves.input, leaves.output
        if id(leaves) not in self._slices:  # one operation, and so one in the backward pass
            self._slices[id(leaves)] = leaves.input.unbind(), leaves.output.unbind()
        inputs, outputs = self._slices[id(leaves)]
        return inputs[found.expert], outputs[found.expert]

    def _rows_of(self, input: Tensor, ends: Tensor | None, found: _Found) -> RowsOfExperts:
        """Experts of the rows of ``input``; rows that are multiplied several times count once.

        Only the first product looks for padding: in later ones, a row of hidden values may be
        zero without being padding.
        """
        key = (found.expert, id(ends), input.shape[:-1])
        if key not in self._rows:
            num_experts = None if found.expert is not None else len(found.leaves.input)
            dtype = found.leaves.input.dtype
            self._rows[key] = RowsOfExperts(input.detach(), ends, num_experts, dtype)
        return self._rows[key]

    def _find(self, factor: Tensor | None) -> _Found | None:
        """The stack whose matrices ``factor`` consists of; None if there is none.

        Raises:
            ValueError: If the matrices are ``(d_in, d_out)``.
        """
        if factor is None:
            return None
        for place in self._places:
            position = _position(factor, place.matrices)
            if position is None:
                continue
            is_whole = factor.dim() == 3
            wanted = place.matrices if is_whole else place.matrices[0]
            expert = None if is_whole else place.first + position
            if _are_alike(factor, wanted.mT):
                return _Found(place.leaves, expert)
            if _are_alike(factor, wanted):
                raise ValueError(f"{place.leaves.name}: got a stack that multiplies rows without "
                                 "a transpose, wanted (experts, d_out, d_in); store it "
                                 "transposed, or set batch_dims = 0")  # fmt: skip
        return None

    def _remember(self, source: object, copy: object) -> None:
        """Treat ``copy`` as a stack, or as matrices of one, if ``source`` is."""
        if not isinstance(source, Tensor) or not isinstance(copy, Tensor) or source.dim() < 2:
            return
        for place in self._places:
            position = _position(source, place.matrices)
            if position is None or copy.data_ptr() == source.data_ptr():
                continue
            wanted = place.matrices if source.dim() == 3 else place.matrices[0]
            for like, matrices in ((wanted, copy), (wanted.mT, copy.mT)):
                if _are_alike(source, like):
                    whole = matrices if copy.dim() == 3 else matrices[None]
                    self._places.append(_Place(place.leaves, whole, place.first + position))
                    return


def _local(param: nn.Parameter | None) -> Tensor:
    """The part of ``param`` with which this rank computes."""
    assert param is not None, "a tapped parameter was removed"
    with torch.no_grad():
        return param.to_local() if isinstance(param, DTensor) else param.detach()


def _factor(func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
    """Factor of the rows, ``(..., d_in, d_out)``; None if ``func`` is not a product of rows."""
    factor = args[1] if len(args) > 1 else None
    if not isinstance(factor, Tensor) or factor.dim() not in (2, 3):
        return None
    if func is functional.linear:
        return factor.mT
    return factor if func in _PRODUCTS else None


def _position(tensor: Tensor, matrices: Tensor) -> int | None:
    """Index of the first of ``matrices`` in the memory of ``tensor``; None if outside of them."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != matrices.dtype:
        return None
    distance = (tensor.data_ptr() - matrices.data_ptr()) // matrices.element_size()
    position, rest = divmod(distance, max(1, matrices.stride(0)))
    return position if rest == 0 and 0 <= position < len(matrices) else None


def _are_alike(tensor: Tensor, like: Tensor) -> bool:
    """True if both have the same shape and, where it matters, the same order in memory."""
    if tensor.shape != like.shape:
        return False
    triples = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return all(mine == other for size, mine, other in triples if size > 1)


class _InputTap(torch.autograd.Function):
    """Keeps the input, like the tap of a linear layer; the product keeps it as well."""

    @staticmethod
    def forward(input: Tensor, rows: RowsOfExperts, zeros: Tensor) -> Tensor:
        return zeros.detach()[(0,) * zeros.dim()]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        input, ctx.rows, _ = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (input,) = ctx.saved_tensors
        rows: RowsOfExperts = ctx.rows
        return None, None, torch.cat([rows.sums(input), rows.count[..., None]], dim=-1)


class _OutputTap(torch.autograd.Function):
    """The identity on the output of a product."""

    @staticmethod
    def forward(output: Tensor, count: Tensor, rows: RowsOfExperts, zeros: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        # Do not save the input for backward: activation checkpointing would recompute up to here.
        ctx.rows = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        sums = ctx.rows.sums(grad)
        return grad, sums.new_zeros(()), None, sums
