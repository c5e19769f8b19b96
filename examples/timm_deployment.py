"""A timm model before and after deployment: padding audit, test-time adaptation (extra vision)."""

import timm
import torch

from outlast.adapt import Norm, Tent
from outlast.data import corruptions
from outlast.diagnose import padding

torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=10).eval()  # a tiny network; take one of yours with its weights

report = padding.audit(model, (3, 96, 96))
print(report)
print("sizes without a lean near 96:", padding.suggest_sizes(model, 96))

stream = torch.randint(0, 256, (3, 32, 3, 32, 32), dtype=torch.uint8)
noise = torch.Generator().manual_seed(1)
baseline, adapted = Norm(model), Tent(model)
for images in stream:
    shifted = corruptions.corrupt(images, "gaussian_noise", severity=5, generator=noise).float() / 255
    baseline(shifted)
    logits = adapted(shifted)
print(adapted.report)
plain = adapted.merge()  # a module without an adapter, for export
assert not any(isinstance(module, Tent) for module in plain.modules())
