"""The gradients of a window: of which parameters, none left over, in what dtype they add up, and how they end.

Low-precision parameters accumulate in float32: bf16 additions lose 4e-3 after 16 micro-batches and stall at 256.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from macrobatch.modules import name_of, trainable

HAS_GRAD_DTYPE = hasattr(Tensor, "grad_dtype")  # lets autograd itself accumulate in another dtype than the parameter's
LOW_PRECISION = (torch.bfloat16, torch.float16)


class WindowGradients:
    """Within the context `p.grad` takes up one window's gradients in the right dtype; after an error it is as before.

    On entry leftover gradients are an error, unless `add`: then they are set aside and added unchanged by `finish`.
    `grad_dtype=None` accumulates low-precision parameters in float32 and ends in the parameter's dtype; any other
    value accumulates and ends in that dtype. With `apart` each micro-batch's gradient stands alone in `p.grad` until
    `absorb`, to be measured: one more copy of the gradients.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        grad_dtype: torch.dtype | None = None,
        add: bool = False,
        apart: bool = False,
        parameters: list[nn.Parameter] | None = None,  # those of `modules` that are trainable, where they are known
    ) -> None:
        self.parameters = trainable(modules) if parameters is None else parameters
        self._modules = modules
        self._final_dtype = grad_dtype
        self._add = add
        candidates = self.parameters  # of which those in single precision, most of them, need no closer look:
        if grad_dtype is None:
            candidates = [p for p in candidates if p.dtype is not torch.float32]
        self._widened = [p for p in candidates if _accumulation_dtype(p, grad_dtype) != gradient_dtype(p)]
        self._apart = self.parameters if apart else [] if HAS_GRAD_DTYPE else self._widened
        self.adds_up_itself = bool(self._apart)  # not autograd alone: `absorb` is needed
        self._sums: dict[int, Tensor] = {}  # by id of the parameter, for those that autograd does not add up itself

    @property
    def match_parameters(self) -> bool:
        """Whether autograd adds up every gradient in the dtype of its parameter, as DDP's buckets need."""
        return not self._widened and not self._apart and all(gradient_dtype(p) == p.dtype for p in self.parameters)

    def __enter__(self) -> "WindowGradients":
        refuse_step_hooks(self.parameters, self._modules)
        if self._final_dtype is not None and self._widened and not HAS_GRAD_DTYPE:
            raise ValueError(f"grad_dtype={self._final_dtype} needs a torch with Tensor.grad_dtype (2.10 or later)")
        self._before = [p.grad for p in self.parameters]
        if self._add:  # DDP would write over what is set aside if it lay in DDP's own buckets
            self._before = [g.clone() if g is not None and shares_storage(g) else g for g in self._before]
        else:
            refuse_leftovers(self.parameters, self._modules)
        for p in self.parameters if self._add else self._widened:
            p.grad = None
        self._dtypes = [getattr(p, "grad_dtype", None) for p in self._widened]  # None: the user allows any
        if HAS_GRAD_DTYPE:
            for p in self._widened:
                p.grad_dtype = _accumulation_dtype(p, self._final_dtype)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return
        for p in self.parameters:
            p.grad = None
        self._restore_dtypes()
        for p, before in zip(self.parameters, self._before, strict=True):
            p.grad = before
            if before is not None and not self._add:
                before.zero_()  # it was zero on entry, and may have been added to

    def restart(self) -> None:
        """Nothing has been added up yet: as after entry."""
        self._sums.clear()
        for p, before in zip(self.parameters, self._before, strict=True):
            p.grad = None
            if before is not None and not self._add and before.dtype == gradient_dtype(p):
                p.grad = before.zero_()  # it was zero on entry

    def absorb(self) -> None:
        """After each micro-batch: its gradients are in the window's sum, where autograd has not added them itself."""
        arrived = [(p, p.grad) for p in self._apart if p.grad is not None]
        totals, gradients = [], []
        for p, gradient in arrived:
            p.grad = None
            total = self._sums.get(id(p))
            if total is None:
                wide = gradient.to(_accumulation_dtype(p, self._final_dtype))
                self._sums[id(p)] = wide.clone() if shares_storage(wide) else wide
            elif total.is_sparse or gradient.is_sparse:
                self._sums[id(p)] = total + gradient
            else:
                totals.append(total)
                gradients.append(gradient)
        if totals:
            torch._foreach_add_(totals, gradients)

    def sums(self) -> list[Tensor | None]:
        """What the window's backwards have added up, parameter by parameter; None where nothing arrived."""
        return [self._sums.get(id(p), p.grad) for p in self.parameters]

    def finish(self, gradients: list[Tensor | None]) -> None:
        """`p.grad` is the given gradient in its final dtype, plus what was set aside; every setting is put back.

        Empties `gradients` as it goes, so that the float32 sums and their casts never stand side by side. What was set
        aside stays as it is, for the case of an error on the way.
        """
        original = dict(zip(map(id, self._widened), self._dtypes, strict=True))
        for j, (p, before) in enumerate(zip(self.parameters, self._before, strict=True)):
            gradient, gradients[j] = gradients[j], None
            if gradient is not p.grad or id(p) in original or self._add:
                p.grad = None
                if id(p) in original and self._final_dtype is None:
                    _set_grad_dtype(p, original[id(p)])
                    gradient = None if gradient is None else gradient.to(p.dtype)
                p.grad = _plus(before, gradient) if self._add else gradient
        if self._add:  # nothing can fail from here on
            self._move_into_place()

    @torch.no_grad()
    def _move_into_place(self) -> None:
        """`p.grad` is the tensor that it was before, which somebody may hold, or which may be a view into a buffer."""
        for p, before in zip(self.parameters, self._before, strict=True):
            grad = p.grad
            if before is None or grad is None or grad is before or grad.is_sparse or before.is_sparse:
                continue
            if before.dtype == grad.dtype:
                p.grad = before.copy_(grad)

    def _restore_dtypes(self) -> None:
        for p, dtype in zip(self._widened, self._dtypes, strict=True):
            _set_grad_dtype(p, dtype)


def _plus(before: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if before is None or gradient is None:
        return gradient if before is None else before
    if before.is_sparse or gradient.is_sparse:
        return before.to_dense() + gradient.to_dense()
    return gradient.add_(before)


def shares_storage(gradient: Tensor | None) -> bool:
    """Whether a gradient is a view into a larger buffer, as DDP makes them: such views share one count of changes."""
    if gradient is None or gradient.layout != torch.strided:
        return False
    return gradient.untyped_storage().nbytes() > gradient.nbytes


def _accumulation_dtype(p: nn.Parameter, grad_dtype: torch.dtype | None) -> torch.dtype:
    """What is asked for, though complex numbers stay complex; else what the user set on `p`; else at least float32."""
    if grad_dtype is not None:
        return torch.promote_types(grad_dtype, p.dtype) if p.is_complex() else grad_dtype
    own = gradient_dtype(p)
    return torch.float32 if own == p.dtype and p.dtype in LOW_PRECISION else own


def gradient_dtype(p: nn.Parameter) -> torch.dtype:
    """The dtype in which autograd accumulates the gradient of `p`."""
    return getattr(p, "grad_dtype", None) or p.dtype


def _set_grad_dtype(p: nn.Parameter, dtype: torch.dtype | None) -> None:
    if HAS_GRAD_DTYPE:
        p.grad_dtype = dtype


def refuse_leftovers(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> None:
    """ValueError if some gradient is there and not zero everywhere; by content, so zeroed ones are fine."""
    held = [p for p in parameters if p.grad is not None and _values(p.grad).numel()]
    if not held:
        return
    largest = torch._foreach_norm([_values(p.grad) for p in held if p.grad is not None], float("inf"))
    left = [p for p, norm in zip(held, largest, strict=True) if bool(norm != 0)]
    if left:
        raise ValueError(
            f"{len(left)} of {len(parameters)} parameters hold a gradient from before, the first of them "
            f"{name_of(left[0], modules)!r}. It would be added to this window's. Zero gradients after each update "
            "(apply_update does, else optimizer.zero_grad()), or add on purpose with run(..., add=True)"
        )


def refuse_step_hooks(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> None:
    """ValueError for hooks that run after each backward on a parameter: an optimizer step there would run K times."""
    for p in parameters:
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name_of(p, modules)!r} has a hook from register_post_accumulate_grad_hook, which fires "
                "for each micro-batch, not once for the effective batch. Remove it (an optimizer step fused into "
                "backward cannot be combined with accumulation) and call apply_update after run"
            )


def multiply_(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Each gradient is multiplied in place by `factor` (a number, or of shape ()): one call per device."""
    if isinstance(factor, float) and factor == 1.0:
        return
    for g in gradients:
        if g.is_sparse:
            g.mul_(factor)
    dense = [g for g in gradients if not g.is_sparse]
    for device in {g.device for g in dense}:
        there = [g for g in dense if g.device == device]
        torch._foreach_mul_(there, factor.to(device) if isinstance(factor, Tensor) else factor)


def norm_of(gradients: Iterable[Tensor | None]) -> Tensor:
    """The 2-norm of all gradients as one vector, shape (), 0 without any, in float32 for those of low precision."""
    values = [_values(g) for g in gradients if g is not None]
    wide = [v for v in values if v.dtype not in LOW_PRECISION]
    low = [v for v in values if v.dtype in LOW_PRECISION]
    norms = list(torch._foreach_norm(wide, 2)) if wide else []
    norms += torch._foreach_norm(low, 2, dtype=torch.float32) if low else []
    if not norms:
        return torch.tensor(0.0)
    together: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return together


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
