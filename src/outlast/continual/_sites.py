"""The places where a model multiplies rows by a weight, and what it takes to keep them as they were on protected rows.

A layer that computes ``y = W x`` keeps its outputs on all x in the span of M (d x k, orthonormal columns) if and only if
``W M`` stays equal to its value A at the end of the last task, the anchor. So after any optimizer's step

    W <- W - (W M - A) M^T

restores it, and this equals projecting the step. Every layer kind below is brought to that one form by a view of its
weight: ``(groups, outputs, d)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outlast._core._distributed import gathered, part_of
from outlast._core._foreach import is_sharded, local, whole
from outlast.continual._basis import Selection, complement, joined, orthonormal
from outlast.errors import UnsupportedError

Kind = Literal["linear", "conv", "conv_transpose", "addmm", "attention", "embedding"]


class LinearSite:
    """One weight (with the bias that it carries along) that multiplies rows.

    Args:
        name: as reports print it.
        kind: which functional call it stands for.
        weight: the parameter.
        bias: its bias if the bias belongs to the map (a constant 1 is appended to each row), else None.
        groups: groups of a convolution; 3 for the stacked projections of an attention layer.
        part: which of three equal parts of ``bias`` is this weight's (attention with separate weights).
    """

    def __init__(
        self, name: str, kind: Kind, weight: nn.Parameter, bias: nn.Parameter | None, groups: int = 1, part: int | None = None
    ) -> None:
        self.name = name
        self.kind = kind
        self.weight = weight
        self.bias = bias
        self.groups = groups
        self._part = part
        self.shared = kind == "attention" and groups == 3  # one basis for query, key and value until they differ
        if self.shared:
            self.groups = 1
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        device = local(weight).device
        self.ranks = [0] * self.groups
        self.basis = torch.zeros(self.groups, self.dim, 0, dtype=self.dtype, device=device)
        self.scale: Tensor | None = None  # (groups, k): importance of each column, for scaled projection
        self.anchor: Tensor | None = None  # (groups, outputs, k), this process's rows
        self.reference: Tensor | None = None  # (groups, outputs, d): the whole map at the anchor
        self.free: Tensor | None = None  # complement of the basis, where that is the smaller one
        self._alone: tuple[Tensor, Tensor] | None = None  # basis and anchor without the constant, for a bias that is frozen later
        self.bias_anchor: Tensor | None = None  # for a weight that is frozen while its bias trains

    # ---- shapes --------------------------------------------------------------------------------------------------------

    @property
    def transposed(self) -> bool:
        """Whether the weight has its inputs in front, so that it is projected from the left."""
        return self.kind in ("conv_transpose", "addmm")

    @property
    def inputs(self) -> int:
        """Width of a row without the constant."""
        shape = self.weight.shape
        if self.kind == "conv_transpose":
            return shape[0] // self.groups
        if self.kind == "addmm":
            return shape[0]
        return self.weight.numel() // shape[0]

    @property
    def dim(self) -> int:
        """Width of a row, the constant included."""
        return self.inputs + (self.bias is not None)

    @property
    def outputs(self) -> int:
        """Rows of the weight in each group."""
        return self.weight.numel() // (self.groups * self.inputs)

    @property
    def rank(self) -> int:
        """The largest number of directions that a group holds."""
        return max(self.ranks)

    @property
    def constrained(self) -> int:
        """Degrees of freedom that are taken."""
        return self.outputs * sum(self.ranks)

    @property
    def freedom(self) -> int:
        """Degrees of freedom in all."""
        return self.groups * self.outputs * self.dim

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model."""
        held = (self.basis, self.scale, self.anchor, self.reference, self.free, self.bias_anchor)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def follow(self) -> None:
        """Go where the weight went since: its device, and its precision."""
        device = local(self.weight).device
        self.dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        for name in ("basis", "scale", "anchor", "reference", "free", "bias_anchor"):
            value: Tensor | None = getattr(self, name)
            if value is not None and (value.device != device or value.dtype != self.dtype):
                setattr(self, name, value.to(device, self.dtype))

    def leave_bias(self) -> None:
        """Take the bias out of the map; only while nothing is held."""
        assert self.rank == 0
        self.bias = self._part = None
        self.basis = self.basis.new_zeros(self.groups, self.dim, 0)

    def take_bias(self, bias: nn.Parameter) -> None:
        """Put the bias into the map; only while nothing is held."""
        assert self.rank == 0
        self.bias = bias
        self.basis = self.basis.new_zeros(self.groups, self.dim, 0)

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Go on with another parameter in the place of one."""
        if self.weight is old:
            self.weight = new
            if self.rank == 0:
                self.basis = self.basis.new_zeros(self.groups, self.dim, 0)
        if self.bias is old:
            self.bias = new

    def split(self) -> None:
        """Give query, key and value a basis each, once they are seen to differ."""
        self.shared = False
        self.groups = 3
        self.ranks = self.ranks * 3
        self.basis = self.basis.expand(3, -1, -1).contiguous()
        if self.scale is not None:
            self.scale = self.scale.expand(3, -1).contiguous()
        for name in ("anchor", "reference"):
            value: Tensor | None = getattr(self, name)
            if value is not None:
                setattr(self, name, value.view(3, self.outputs, -1).contiguous())
        self.free = None if self.free is None else self.free.expand(3, -1, -1).contiguous()

    def _matrix(self, values: Tensor) -> Tensor:
        """``(groups, outputs, inputs)`` of a tensor shaped as the weight; a view wherever strides allow."""
        if self.kind == "addmm":
            return values.T[None]
        if self.kind == "conv_transpose":
            return values.reshape(self.groups, self.inputs, -1).mT
        return values.reshape(self.groups, -1, self.inputs)

    def _vector(self, values: Tensor) -> Tensor:
        """``(groups, outputs)`` of a tensor shaped as the bias."""
        values = values if self._part is None else values.chunk(3)[self._part]
        return values.reshape(self.groups, -1)

    @property
    def _by_rows(self) -> bool:
        """Whether a shard of the weight can be restored on its own: rows of one group, inputs behind."""
        if self.groups > 1 or self.transposed or self._part is not None:
            return False
        placements: tuple[Any, ...] = getattr(self.weight, "placements", ())
        return all(placement.is_shard(0) or placement.is_replicate() for placement in placements)

    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias: this process's rows where those suffice, else the whole."""
        bring = local if self._by_rows else whole
        return bring(self.weight.detach()), None if self.bias is None else bring(self.bias.detach())

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``(groups, outputs, d)`` in the dtype of the memory."""
        matrix = self._matrix(weight).to(self.dtype)
        return matrix if bias is None else torch.cat([matrix, self._vector(bias).to(self.dtype)[..., None]], 2)

    # ---- memory --------------------------------------------------------------------------------------------------------

    def wide_basis(self) -> Tensor:
        """The basis in float64."""
        return orthonormal(self.basis, self.ranks)

    def store(self, selection: Selection, scales: tuple[Tensor, Tensor] | None) -> None:
        """Take new columns; ``scales`` are the importances of old and new ones."""
        added: list[int] = selection.added.tolist()
        new = selection.vectors.to(self.dtype)
        if scales is not None:
            both = joined(scales[0][:, None], scales[1][:, None], self.ranks, added)
            self.scale = both[:, 0].to(self.dtype)
        self.basis = joined(self.basis, new, self.ranks, added)
        self.ranks = [rank + more for rank, more in zip(self.ranks, added, strict=True)]

    @torch.no_grad()
    def drop_anchor(self, *, keep_reference: bool) -> None:
        """Make the present weight the one that protected rows see from now on."""
        self.free = self.reference = self.anchor = self._alone = None
        weight, bias = self._tensors()
        full = self._joined(weight, bias)
        if self.scale is None and min(self.ranks) > self.dim / 2:
            self.free = complement(self.basis, self.ranks).to(self.dtype)
        else:
            self.anchor = torch.bmm(full, self.basis)
        if keep_reference or self.free is not None:
            self.reference = full.clone()
        self.bias_anchor = None if self.bias is None else local(self.bias.detach()).to(self.dtype, copy=True)

    def clear(self) -> None:
        """Protect nothing."""
        self.ranks = [0] * self.groups
        self.basis = self.basis[:, :, :0]
        self.scale = self.free = self.anchor = self.reference = self.bias_anchor = None

    # ---- training ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def project_(self) -> None:
        """Restore the anchor in the weight, with the least change."""
        if self.rank == 0:
            return
        if local(self.weight).device != self.basis.device:
            self.follow()
        if not self.weight.requires_grad:  # with the weight fixed, outputs stay only where the bias does
            if self.bias is not None and self.bias.requires_grad and self.bias_anchor is not None:
                local(self.bias.detach()).copy_(self.bias_anchor)
            return
        weight, bias = self._tensors()
        if self.bias is not None and not self.bias.requires_grad:
            self._restore_weight_alone(weight)
            return
        if not self._restore_in_place(weight, bias):
            self._write(self._restored(self._joined(weight, bias)), self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _restore_weight_alone(self, weight: Tensor) -> None:
        """With the bias fixed, the weight must do without the constant: hold it on the inputs of the basis."""
        if self._alone is None:
            left, values, right = torch.linalg.svd(self.basis[:, : self.inputs].double(), full_matrices=False)
            real = values > 1e-6
            basis = torch.where(real[:, None, :], left, 0.0)
            if self.reference is not None:
                anchor = self.reference[..., : self.inputs].double() @ basis
            else:
                assert self.anchor is not None
                assert self.bias_anchor is not None
                kept = self._vector(self.bias_anchor)[..., None] * self.basis[:, self.inputs :]
                back = right.mT * torch.where(real, 1.0 / values.clamp(min=1e-6), 0.0)[:, None, :]
                anchor = (self.anchor - kept).double() @ back
            self._alone = basis.to(self.dtype), anchor.to(self.dtype)
        basis, anchor = self._alone
        matrix = self._matrix(weight).to(self.dtype)
        moved = torch.baddbmm(anchor, matrix, basis, beta=-1)
        kept_matrix = torch.baddbmm(matrix, moved, basis.mT, alpha=-1)
        values = kept_matrix[0].T if self.kind == "addmm" else (kept_matrix.mT if self.kind == "conv_transpose" else kept_matrix)
        self._write_tensor(self.weight.detach(), values)

    def _restore_in_place(self, weight: Tensor, bias: Tensor | None) -> bool:
        """The usual case without temporaries of the weight's size."""
        matrix = self._matrix(weight)
        copied = matrix.data_ptr() != weight.data_ptr() or (is_sharded(self.weight) and not self._by_rows)
        if copied or self.free is not None or weight.dtype != self.dtype or (bias is not None and bias.dtype != self.dtype):
            return False
        assert self.anchor is not None
        basis = self.basis[:, : self.inputs]
        moved = (
            torch.baddbmm(self.anchor, matrix, basis, beta=-1)
            if self.groups > 1
            else torch.addmm(self.anchor[0], matrix[0], basis[0], beta=-1)[None]
        )
        last = self.basis[:, self.inputs :]
        if bias is not None:
            moved = moved.addcmul_(self._vector(bias)[..., None], last)
        if self.scale is not None:
            self.anchor += moved * (1.0 - self.scale[:, None])
            moved = moved * self.scale[:, None]
        if self.groups > 1:
            matrix.baddbmm_(moved, basis.mT, alpha=-1)
        else:
            matrix[0].addmm_(moved[0], basis[0].T, alpha=-1)
        if bias is not None:
            self._vector(bias).sub_((moved @ last.mT)[..., 0])
        return True

    def _restored(self, full: Tensor) -> Tensor:
        if self.free is not None:
            assert self.reference is not None
            return torch.baddbmm(self.reference, (full - self.reference) @ self.free, self.free.mT)
        assert self.anchor is not None
        moved = torch.baddbmm(self.anchor, full, self.basis, beta=-1)
        if self.scale is not None:
            self.anchor += moved * (1.0 - self.scale[:, None])
            moved = moved * self.scale[:, None]
        return torch.baddbmm(full, moved, self.basis.mT, alpha=-1)

    def _write(self, full: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Put ``(groups, outputs, d)`` into a weight and a bias, or into their gradients."""
        matrix = full[..., : self.inputs]
        values = matrix[0].T if self.kind == "addmm" else (matrix.mT if self.kind == "conv_transpose" else matrix)
        self._write_tensor(weight, values)
        if bias is not None:
            vector = full[..., -1].reshape(-1)
            if self._part is not None:
                parts = list(whole(bias).chunk(3))
                parts[self._part] = vector.to(bias.dtype)
                vector = torch.cat(parts)
            self._write_tensor(bias, vector)

    def _write_tensor(self, target: Tensor, values: Tensor) -> None:
        if is_sharded(target) and not self._by_rows:
            values = part_of(values.reshape(target.shape).to(target.dtype), target)
        mine = local(target)
        mine.copy_(values.reshape(mine.shape))

    @torch.no_grad()
    def project_grad_(self) -> None:
        """Take the part of the gradient that would change protected outputs out of ``.grad``."""
        grad = self.weight.grad
        if self.rank == 0 or grad is None:
            return
        if self.bias is not None and self.bias.grad is None:
            self.bias.grad = torch.zeros_like(self.bias)
        bias_grad = None if self.bias is None else self.bias.grad
        bring = local if self._by_rows else whole
        full = self._joined(bring(grad), None if bias_grad is None else bring(bias_grad))
        if self.free is not None:
            kept = (full @ self.free) @ self.free.mT
        else:
            along = full @ self.basis
            if self.scale is not None:
                along = along * self.scale[:, None]
            kept = torch.baddbmm(full, along, self.basis.mT, alpha=-1)
        self._write(kept, grad, bias_grad)

    # ---- measuring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def interference(self, rows: Tensor, groups: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Squared norms of what has changed and of the whole output on rows ``(b, n, d)``."""
        if is_sharded(self.weight):
            raise UnsupportedError(
                "interference needs whole weights; gather them into an unsharded model and load the memory's state there"
            )
        weight, bias = self._tensors()
        full = self._joined(weight, bias)[groups]
        assert self.reference is not None
        rows = rows.to(self.dtype)
        return (rows @ (full - self.reference[groups]).mT).square().sum(), (rows @ full.mT).square().sum()

    # ---- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors whole, whatever shards hold them."""
        return {
            "kind": self.kind,
            "shape": list(self.weight.shape),
            "groups": self.groups,
            "dim": self.dim,
            "ranks": list(self.ranks),
            "basis": self.basis.clone(),
            "scale": None if self.scale is None else self.scale.clone(),
            "free": None if self.free is None else self.free.clone(),
            "anchor": self._gathered(self.anchor),
            "reference": self._gathered(self.reference),
            "bias_anchor": None if self.bias_anchor is None or self.bias is None else gathered(self.bias_anchor, self.bias),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state whose kind and shape were compared before."""
        self._alone = None
        self.groups = int(state["groups"])
        self.shared = self.kind == "attention" and self.groups == 1
        device = local(self.weight).device

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, self.dtype, copy=True)

        basis = here(state["basis"])
        assert basis is not None
        self.ranks, self.basis = list(state["ranks"]), basis
        self.scale, self.free = here(state["scale"]), here(state["free"])
        self.anchor, self.reference = self._spread(here(state["anchor"])), self._spread(here(state["reference"]))
        kept = here(state["bias_anchor"])
        self.bias_anchor = None if kept is None or self.bias is None else part_of(kept, self.bias).clone()

    def _gathered(self, value: Tensor | None) -> Tensor | None:
        if value is None or not (is_sharded(self.weight) and self._by_rows):
            return None if value is None else value.clone()
        return gathered(value[0], self.weight, torch.Size((self.outputs, value.shape[2])))[None]

    def _spread(self, value: Tensor | None) -> Tensor | None:
        if value is None or not (is_sharded(self.weight) and self._by_rows):
            return value
        return part_of(value[0], self.weight)[None]


class EmbeddingSite:
    """A table of token vectors. Its rows are one-hot, so that a direction is a token: the most frequent ones are held."""

    kind: Kind = "embedding"
    groups = 1

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        self.name = name
        self.weight = weight
        self.protected = torch.zeros(0, dtype=torch.int64, device=local(weight).device)
        self.anchor: Tensor | None = None
        self.reference: Tensor | None = None

    @property
    def dim(self) -> int:
        """Number of tokens."""
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        """Number of protected tokens."""
        return len(self.protected)

    @property
    def constrained(self) -> int:
        """Degrees of freedom that are taken."""
        return self.rank * self.weight.shape[1]

    @property
    def freedom(self) -> int:
        """Degrees of freedom in all."""
        return self.weight.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model."""
        return sum(t.numel() * t.element_size() for t in (self.protected, self.anchor, self.reference) if t is not None)

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Go on with another parameter in the place of one."""
        if self.weight is old:
            self.weight = new

    def follow(self) -> None:
        """Go where the weight went since."""
        device = local(self.weight).device
        self.protected = self.protected.to(device)
        self.anchor = None if self.anchor is None else self.anchor.to(device, self.weight.dtype)
        self.reference = None if self.reference is None else self.reference.to(device, self.weight.dtype)

    def select(self, counts: Tensor, threshold: float, limit: int) -> tuple[Tensor, float, float]:
        """Tokens to add, with the energy inside the old ones and with the new ones."""
        total = float(counts.sum())
        before = float(counts[self.protected].sum())
        open_counts = counts.clone()
        open_counts[self.protected] = 0.0
        values, tokens = open_counts.sort(descending=True, stable=True)
        reached = before + values.cumsum(0)
        number = 0
        if before < threshold * total:
            number = min(int((reached < threshold * total).sum()) + 1, int((values > 0).sum()), max(0, limit - self.rank))
        return tokens[:number], before, before + float(values[:number].sum())

    def clear(self) -> None:
        """Protect nothing."""
        self.protected = self.protected[:0]
        self.anchor = self.reference = None

    def store(self, tokens: Tensor) -> None:
        """Protect more tokens."""
        self.protected = torch.cat([self.protected, tokens.to(self.protected.device)])

    @torch.no_grad()
    def drop_anchor(self, *, keep_reference: bool) -> None:
        """Keep the present vectors of the protected tokens."""
        weight = whole(self.weight.detach())
        self.anchor = weight[self.protected].clone()
        self.reference = weight.clone() if keep_reference else None

    @torch.no_grad()
    def project_(self) -> None:
        """Put the kept vectors back."""
        if self.anchor is None or not self.rank or not self.weight.requires_grad:
            return
        if local(self.weight).device != self.protected.device:
            self.follow()
        tokens, anchor = self._here()
        local(self.weight.detach()).index_copy_(0, tokens, anchor)

    @torch.no_grad()
    def project_grad_(self) -> None:
        """Clear the gradient of protected tokens."""
        grad = self.weight.grad
        if grad is None or not self.rank:
            return
        if grad.is_sparse:
            grad = grad.coalesce()
            keep = ~torch.isin(grad.indices()[0], self.protected)
            with torch.sparse.check_sparse_tensor_invariants(False):
                self.weight.grad = torch.sparse_coo_tensor(grad.indices()[:, keep], grad.values()[keep], grad.shape, is_coalesced=True)
            return
        local(grad).index_fill_(0, self._here()[0], 0.0)

    def _here(self) -> tuple[Tensor, Tensor]:
        """Protected tokens among this process's rows, numbered within them, and their vectors."""
        assert self.anchor is not None
        if not is_sharded(self.weight):
            return self.protected, self.anchor
        mine = part_of(torch.arange(self.dim, device=self.protected.device), self.weight)
        if not len(mine):
            return self.protected[:0], self.anchor[:0]
        inside = (self.protected >= mine[0]) & (self.protected <= mine[-1])
        return self.protected[inside] - mine[0], self.anchor[inside]

    @torch.no_grad()
    def interference(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms of what has changed and of the whole output on tokens."""
        assert self.reference is not None
        weight = whole(self.weight.detach())
        now = weight[tokens.reshape(-1)].double()
        return (now - self.reference[tokens.reshape(-1)]).square().sum(), now.square().sum()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, whole."""
        return {
            "kind": self.kind,
            "shape": list(self.weight.shape),
            "protected": self.protected.clone(),
            "anchor": None if self.anchor is None else self.anchor.clone(),
            "reference": None if self.reference is None else self.reference.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state whose kind and shape were compared before."""
        device = self.protected.device
        self.protected = state["protected"].to(device, copy=True)
        self.anchor = None if state["anchor"] is None else state["anchor"].to(device, self.weight.dtype, copy=True)
        self.reference = None if state["reference"] is None else state["reference"].to(device, self.weight.dtype, copy=True)


Site = LinearSite | EmbeddingSite


class Adapter:
    """A low-rank adapter ``W + B A``: rows of A are kept orthogonal to what the layer below protects.

    ``B A x = 0`` for every protected x and every B, so that B stays free.
    """

    def __init__(self, site: LinearSite, parameter: nn.Parameter) -> None:
        self.site = site
        self.parameter = parameter
        weight = site.basis[0, : site.inputs].double()  # without the constant, which an adapter does not see
        left, values, _ = torch.linalg.svd(weight, full_matrices=False)
        real = values > 1e-6
        self.basis = left[:, real].to(site.dtype)

    @torch.no_grad()
    def project_(self) -> None:
        """``A <- A (I - M M^T)``."""
        values = local(self.parameter.detach())
        wide = values.to(self.basis.dtype)
        values.copy_(wide - (wide @ self.basis) @ self.basis.T)


def total_of(sites: Sequence[Site], what: Literal["constrained", "freedom"]) -> int:
    """A sum over sites."""
    return sum(int(getattr(site, what)) for site in sites)
