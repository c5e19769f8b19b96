"""Models of the transformers library, built from configuration: masks, padding, caches, refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import rng

transformers = pytest.importorskip("transformers")

from outlast.attention import FavorAttention, attention_error, convert_attention, favor_attention, redraw_after_steps  # noqa: E402
from outlast.errors import OutlastWarning, UnsupportedError  # noqa: E402


def encoder(**change):
    settings = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(**(settings | dropout | change))).eval()


def gpt(**change):
    settings = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 49}
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | dropout | change))).eval()


def llama(**change):
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | change))).eval()


def tokens(rows=2, length=12, seed=0):
    return torch.randint(0, 50, (rows, length), generator=rng(seed))


@pytest.mark.parametrize("build", [encoder, gpt, llama])
def test_padding_does_not_change_what_is_not_padding(build):
    model = convert_attention(build(), 16)
    ids = tokens()
    keep = torch.ones_like(ids)
    keep[1, 7:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=keep)[0]
        alone = model(ids[1:, :7])[0]
        full = model(ids[:1])[0]
    assert torch.allclose(padded[1:, :7], alone, atol=1e-5)
    assert torch.allclose(padded[:1], full, atol=1e-5)


@pytest.mark.parametrize("build", [gpt, llama])
def test_decoders_stay_causal(build):
    model = convert_attention(build(), 16)
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = 3
    with torch.no_grad():
        one, two = model(ids)[0], model(other)[0]
    assert torch.allclose(one[:, :8], two[:, :8], atol=1e-5)
    assert not torch.allclose(one[:, 8:], two[:, 8:], atol=1e-3)


@pytest.mark.parametrize("build", [gpt, llama])
def test_decoding_with_a_cache_equals_the_whole(build):
    model = convert_attention(build(), 16)
    ids = tokens()
    keep = torch.ones_like(ids)
    keep[0, :3] = 0  # as generation pads
    positions = (keep.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids, attention_mask=keep, position_ids=positions)[0]
        out = model(ids[:, :5], attention_mask=keep[:, :5], position_ids=positions[:, :5], use_cache=True)
        part = model(ids[:, 5:9], attention_mask=keep[:, :9], position_ids=positions[:, 5:9], cache=out.past_key_values, use_cache=True)
        last = model(ids[:, 9:10], attention_mask=keep[:, :10], position_ids=positions[:, 9:10], cache=part.past_key_values)
    assert torch.allclose(part[0], whole[:, 5:9], atol=1e-5)
    assert torch.allclose(last[0], whole[:, 9:10], atol=1e-5)


def test_generation_runs_and_repeats():
    model = convert_attention(gpt(), 16)
    runs = [model.generate(tokens(1, 4), max_new_tokens=6, do_sample=False, pad_token_id=0) for _ in range(2)]
    assert runs[0].shape == (1, 10)
    assert torch.equal(*runs)


def test_many_features_come_near_the_exact_model():
    """Weights of a fresh model are small, so the estimate is good: its error falls as features grow."""
    exact = encoder()
    ids = tokens()
    with torch.no_grad():
        target = exact(ids)[0]
        errors = [float((convert_attention(encoder(), M)(ids)[0] - target).norm() / target.norm()) for M in (8, 512)]
    assert errors[1] < errors[0]
    assert errors[1] < 0.01


def test_layers_have_vectors_of_their_own_that_follow_training():
    model = convert_attention(llama(), 16, redraw_interval=2, seed=3)
    layers = [module for module in model.modules() if isinstance(module, FavorAttention)]
    assert [layer.projection.shape for layer in layers] == [(2, 16, 8)] * 2  # one matrix for each key head
    assert not torch.equal(layers[0].projection, layers[1].projection)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    redraw_after_steps(model, optimizer)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert int(layers[1].draws) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_exact_attention_can_be_brought_back():
    model = encoder()
    ids = tokens()
    with torch.no_grad():
        before = model(ids)[0]
        convert_attention(model, 16)
        assert not torch.equal(model(ids)[0], before)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(ids)[0], before)


def test_converting_again_changes_the_settings():
    model = convert_attention(llama(), 16, seed=1)
    again = convert_attention(model, 32, seed=1)
    fresh = convert_attention(llama(), 32, seed=1)
    with torch.no_grad():
        assert torch.equal(again(tokens())[0], fresh(tokens())[0])


@pytest.mark.parametrize("build", [encoder, gpt, llama])
def test_converted_models_run_under_autocast_and_in_half_precision(build):
    model = convert_attention(build(), 16)
    ids = tokens()
    with torch.no_grad():
        exact = model(ids)[0]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids)[0].float()
        model = build().to(torch.bfloat16)
        model.set_attn_implementation("eager")
        half = convert_attention(model, 16)(ids)[0].float()
    assert (mixed - exact).norm() / exact.norm() < 0.05
    assert (half - exact).norm() / exact.norm() < 0.05


def test_state_dict_brings_the_vectors_back():
    one, two = convert_attention(encoder(), 16, seed=1), convert_attention(encoder(), 16, seed=2)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(tokens())[0], two(tokens())[0])


def test_dropout_of_attention_is_said_to_be_left_out():
    with pytest.warns(OutlastWarning, match="attention_probs_dropout_prob"):
        model = convert_attention(encoder(attention_probs_dropout_prob=0.1), 16)
    model.train()
    model(tokens())[0].sum().backward()


def test_the_control_finds_what_the_hooks_do_not_see():
    """A layer that adds something of its own to the output of exact attention is not converted."""
    model = gpt()
    before = model.config._attn_implementation
    attention = type(model.transformer.h[0].attn)
    original = attention.forward

    def forward(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        return (found[0] * (1.0 + (self.config._attn_implementation == before)), *found[1:])

    attention.forward = forward
    try:
        with pytest.raises(UnsupportedError, match="differs from the model's own"):
            convert_attention(model, 16)
    finally:
        attention.forward = original
    assert model.config._attn_implementation == before
    assert not [module for module in model.modules() if isinstance(module, FavorAttention)]


def test_sliding_windows_and_packing_are_refused():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        head_dim=8,
    )
    with pytest.raises(UnsupportedError, match=r"sliding.window"):
        convert_attention(transformers.MistralForCausalLM(config), 16)
    model = convert_attention(llama(), 16)
    with pytest.raises(UnsupportedError, match="packed"):
        model(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(TypeError, match="transformers model"):
        convert_attention(torch.nn.Linear(2, 2))
    model = encoder()
    with pytest.raises(ValueError, match="feature_map must be one of"):
        convert_attention(model, 16, feature_map="gaussian")
    with pytest.raises(ValueError, match="num_features"):
        convert_attention(model, 0)
    assert model.config._attn_implementation == "sdpa"
    converted = convert_attention(encoder(), 16)
    fresh = encoder()
    fresh.config._attn_implementation = converted.config._attn_implementation
    with pytest.raises(UnsupportedError, match="convert_attention"):
        fresh(tokens())
    vision = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=16
        )
    )
    with pytest.raises(ValueError, match="example_inputs"):
        convert_attention(vision, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = torch.randn(1, 3, 32, 32, generator=rng())
        assert convert_attention(vision, 16, example_inputs={"pixel_values": pixels})(pixels)[0].isfinite().all()


def test_an_error_report_on_a_models_own_queries():
    """What the card tells users to do: catch the queries and keys of a layer and measure."""
    model = convert_attention(encoder(), 64)
    caught = []
    layer = next(module for module in model.modules() if isinstance(module, FavorAttention))
    layer.register_forward_pre_hook(lambda module, args: caught.append(args[:3]))
    with torch.no_grad():
        model(tokens())
    q, k, v = caught[0]
    report = attention_error(q, k, v, layer.projection, warn_above=math.inf)
    assert report.rel_error < 0.2
    assert torch.equal(favor_attention(q, k, v, projection=layer.projection), layer(q, k, v))
