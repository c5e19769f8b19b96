"""A transformers model with linear attention in place of softmax, checked, then fine-tuned (extra text)."""

import torch
from transformers import BertConfig, BertForMaskedLM

from outlast.attention import FavorAttention, convert_attention, redraw_after_steps

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=512,
    attention_probs_dropout_prob=0.0,
)
exact = BertForMaskedLM(config).eval()
tokens = torch.randint(0, 100, (2, 256))
mask = torch.ones_like(tokens)
mask[1, 200:] = 0  # padding stays out of linear attention, too
with torch.no_grad():
    before = exact(tokens, attention_mask=mask).logits
model = convert_attention(exact, 128)
with torch.no_grad():
    after = model(tokens, attention_mask=mask).logits
print(f"cosine to exact attention {torch.cosine_similarity(before[0], after[0], -1).mean():.3f}")

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
assert any(isinstance(module, FavorAttention) for module in model.modules())
redraw_after_steps(model, optimizer)
for _ in range(5):
    optimizer.zero_grad()
    loss = model(tokens, attention_mask=mask, labels=tokens).loss
    loss.backward()
    optimizer.step()
print(f"loss {float(loss):.2f}")
