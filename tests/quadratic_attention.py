"""Quadratic forms that the engine is compared with: written from the definitions, without chunks, states or stabilisers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def features(x: Tensor, W: Tensor, kind: str, scale: float = 1.0) -> Tensor:
    """Features of ``(B, H, L, d)`` under ``(H, M, d)``; x still to be multiplied by the root of the scale."""
    x = x * scale**0.5
    p = x @ W.mT
    half = (x * x).sum(-1, keepdim=True) / 2
    M = W.shape[-2]
    match kind:
        case "positive":
            return torch.exp(p - half)
        case "hyperbolic":
            return torch.cat([torch.exp(p - half), torch.exp(-p - half)], -1)
        case "trig":
            return torch.cat([p.sin(), p.cos()], -1) * torch.exp(half)
        case "gaussian":
            return torch.cat([p.sin(), p.cos()], -1) / M**0.5
        case "arccos":
            return p.relu() / M**0.5
        case "relu":
            return p.relu() + 1e-3
        case _:
            return F.elu(x) + 1


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    kind: str,
    *,
    causal: bool = False,
    scale: float = 1.0,
    log_gate: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Attention from the full matrix of weights; all heads given, ``keep`` of shape (B, L)."""
    A = features(q, W, kind, scale) @ features(k, W, kind, scale).mT
    if log_gate is not None:
        b = log_gate.cumsum(-1)
        A = A * torch.exp((b[..., :, None] - b[..., None, :]).tril()) * (1 - log_gate.exp())[..., None, :]
    if keep is not None:
        A = A * keep[:, None, None]
    if causal:
        A = A.tril()
    return (A @ v) / A.sum(-1, keepdim=True)


def recurrent(fq: Tensor, fk: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The gated recurrence, one step after another; features (B, H, L, R), gate (B, H, L)."""
    S, z = torch.zeros(*v.shape[:2], fk.shape[-1], v.shape[-1], dtype=v.dtype), torch.zeros(*fk.shape[:2], fk.shape[-1], dtype=v.dtype)
    out = []
    for t in range(v.shape[2]):
        g = gate[:, :, t, None]
        S = g[..., None] * S + (1 - g)[..., None] * fk[:, :, t, :, None] * v[:, :, t, None]
        z = g * z + (1 - g) * fk[:, :, t]
        q = fq[:, :, t]
        out.append((q[:, :, None] @ S)[:, :, 0] / (q * z).sum(-1, keepdim=True))
    return torch.stack(out, 2)
