"""Features of a model's layers over a loader, with the model in eval mode and its flags restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from outlast._core._batches import call_with
from outlast._core._norm import eval_mode

Pool = Literal["flatten", "mean"]


def layer_features(
    model: nn.Module, batches: Iterable[object], layers: Sequence[str], *, pool: Pool = "flatten", max_rows: int | None = None
) -> dict[str, Tensor]:
    """What the named layers put out, as one row a sample.

    Args:
        model: run in eval mode without gradient.
        batches: tensors, tuples or lists whose first entry is the input, or mappings of keyword arguments.
        layers: names of submodules as in ``model.named_modules()``; ``""`` is the whole model.
        pool: ``"flatten"``, or ``"mean"`` over all dimensions after the second (channels).
        max_rows: stop after so many rows.

    Returns:
        For each name a float tensor ``(n, d)`` on the CPU.

    Raises:
        ValueError: a layer that the model does not have, no batches, a layer that did not run.
        TypeError: a layer that puts out no tensor.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}; some of its layers: {', '.join(list(modules)[1:9])}")
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen: set[str] = set()

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r} puts out {type(output).__name__}, not a tensor; name a layer inside it")
            if name in seen:
                raise ValueError(
                    f"layer {name!r} runs more than once in a forward pass, so its rows would mix; name a layer that runs once"
                )
            seen.add(name)
            values = output.detach()[:, None] if output.ndim == 1 else output.detach()
            flat = values.flatten(2).mean(2) if pool == "mean" and values.ndim > 2 else values.flatten(1)
            rows[name].append(flat.float().cpu())

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
    count = 0
    try:
        with eval_mode(model), torch.no_grad():
            for batch in batches:
                seen.clear()
                call_with(model, batch)
                count = min((sum(map(len, found)) for found in rows.values()), default=0)
                if max_rows is not None and count >= max_rows:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    for name, found in rows.items():
        if not found:
            raise ValueError(f"layer {name!r} did not run" if count or any(rows.values()) else "batches is empty: there are no features")
    return {name: torch.cat(found)[:max_rows] for name, found in rows.items()}
