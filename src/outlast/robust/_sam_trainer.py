"""SAM for transformers' Trainer, whose loop gives ``optimizer.step`` no closure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from outlast.robust._sam import SAM

if TYPE_CHECKING:
    from torch.optim import Optimizer


class SAMTrainerMixin:
    """Makes ``transformers.Trainer`` train with SAM.

    Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021; see ``SAM``.

    ```python
    class SAMTrainer(SAMTrainerMixin, transformers.Trainer): ...


    SAMTrainer(model, arguments, train_dataset=..., sam={"rho": 0.05}).train()
    ```

    Each ``training_step`` makes both passes over its micro-batch and adds the SAM gradient to ``.grad``. So gradient
    accumulation works (each micro-batch has its own perturbation: m-sharpness), clipping sees the SAM gradient, and the
    optimizer, its schedule and its checkpoints are the Trainer's own. The loss that is logged is that of the first pass.

    Args:
        sam: keyword arguments of ``SAM``; ``every`` and ``reuse`` are for optimizers that see whole steps, so
            they are refused here.

    Raises:
        ValueError: ``every`` or ``reuse``; in training, what ``SAM`` refuses.
    """

    optimizer: Any
    _sam: SAM | None = None

    def __init__(self, *args: Any, sam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._sam_settings = dict(sam or {})
        refused = sorted({"every", "reuse", "inner_steps"} & set(self._sam_settings))
        if refused:
            raise ValueError(f"SAMTrainerMixin works on micro-batches and does not take {', '.join(refused)}")
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Both passes over one micro-batch; arguments and result as the Trainer's own."""
        sam = self._sam_of(model)
        before = [(parameter, parameter.grad) for group in sam.param_groups for parameter in group["params"]]
        for parameter, _ in before:
            parameter.grad = None
        step: Any = super().training_step  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        with sam.first_pass():
            loss = step(model, inputs, *args, **kwargs)
        with sam.perturbed():
            for parameter, grad in before:  # not afterwards: DistributedDataParallel reduces sums of micro-batches with the last one
                parameter.grad = grad
            step(model, inputs, *args, **kwargs)
        return loss

    def _sam_of(self, model: nn.Module) -> SAM:
        base: Optimizer = self.optimizer
        while hasattr(base, "optimizer"):  # accelerate wraps the optimizer that it prepares
            base = base.optimizer  # pyright: ignore[reportAttributeAccessIssue]
        if self._sam is None or self._sam.base is not base:
            self._sam = SAM(base, model, **self._sam_settings)
        return self._sam
