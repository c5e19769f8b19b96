"""Tent and its baseline Norm.

Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021
(arXiv 2006.10726).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from outlast._core import _checks
from outlast.adapt._adapter import TestTimeAdapter
from outlast.adapt._guards import CollapseAlarm, EntropyFilter, Guard, Recovery


class Tent(TestTimeAdapter):
    """Test-time entropy minimisation: batch statistics, and a step on scales and shifts for each batch predicted.

    Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021.

    ```python
    adapted = Tent(model)
    for images in stream:
        logits = adapted(images)  # predicts, then adapts; the next batch gains
    adapted.reset()
    ```

    Most of the gain usually comes from the statistics alone: compare with ``Norm``. Give batches of 50 rows or more
    of mixed classes; a class-ordered stream makes it worse than the source. ``recommended`` has guards.

    Args:
        model: see ``TestTimeAdapter``, whose arguments all are taken; ``steps`` must be at least 1.
    """

    def __init__(self, model: nn.Module, *, steps: int = 1, **settings: Any) -> None:
        super().__init__(model, steps=_checks.integer("steps", steps, low=1), **settings)

    @classmethod
    def recommended(cls, model: nn.Module, guards: Literal["safe"] | Sequence[Guard] = "safe", **settings: Any) -> Tent:
        """Tent with guards: ``EntropyFilter(0.4)``, ``Recovery()`` and ``CollapseAlarm(action="freeze")``.

        Args:
            model: the source model.
            guards: ``"safe"`` for those three; further ones are added to them, such as ``[Diversity(1.0)]`` where the
                stream is known to be balanced.
            **settings: of ``TestTimeAdapter``.
        """
        if isinstance(guards, str):
            _checks.choice("guards", guards, ("safe",))
            further: Sequence[Guard] = ()
        else:
            further = guards
        return cls(model, guards=[EntropyFilter(0.4), Recovery(), CollapseAlarm(action="freeze"), *further], **settings)


class Norm(TestTimeAdapter):
    """The baseline of Tent: statistics of the test data, no gradient.

    Schneider et al., NeurIPS 2020; Nado et al., 2020.

    Args:
        model: with BatchNorm layers; see ``TestTimeAdapter``, whose arguments are taken but those of the steps.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        refused = sorted({"steps", "optimizer", "lr", "loss", "params", "accumulate", "predict"} & set(settings))
        if refused:
            raise ValueError(f"Norm takes no steps, so it does not take {', '.join(refused)}; that is Tent")
        super().__init__(model, steps=0, **settings)
