"""Attention made of layers computes what torch's does, however it is called."""

import pytest
import torch
from torch import nn

from companion import attention, parity


def equal(module, *given, **options):
    open_one = attention.opened(module)
    assert type(open_one) is attention.Attention
    with torch.no_grad():
        theirs, ours = module(*given, **options), open_one(*given, **options)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)
    if theirs[1] is None:
        assert ours[1] is None
    else:
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_attention_with_all_masks(batch_first, need_weights, bias):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first).eval()
    q, k = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    late = torch.ones(3, 7, dtype=torch.bool).triu(5)
    options = {"need_weights": need_weights}
    equal(module, q, k, k, **options)
    equal(module, q, q, q, **options)
    equal(module, q, k, k, key_padding_mask=late, **options)
    equal(module, q, k, k, attn_mask=torch.randn(5, 7), **options)
    equal(module, q, k, k, attn_mask=torch.ones(5, 7, dtype=torch.bool).triu(4), **options)
    equal(module, q, k, k, attn_mask=torch.randn(12, 5, 7), key_padding_mask=late.float(), **options)
    equal(module, q, k, k, average_attn_weights=False, **options)
    equal(module, torch.randn(5, 16), torch.randn(7, 16), torch.randn(7, 16), **options)


def test_keys_and_values_of_other_widths():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True).eval()
    equal(module, torch.randn(2, 5, 16), torch.randn(2, 7, 6), torch.randn(2, 7, 10))


def test_what_it_cannot_stand_for_stays():
    module = nn.MultiheadAttention(16, 4, add_zero_attn=True)
    assert type(attention.opened(module)) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="add_zero_attn"):
        attention.Attention(module)


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_transformers_run_with_it(causal):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    before = parity.fingerprint(encoder)
    made = attention.opened(encoder)
    with torch.no_grad():
        torch.testing.assert_close(made(x, mask), encoder(x, mask), atol=1e-5, rtol=1e-4)
    assert parity.fingerprint(encoder) == before
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True), 1).eval()
    with torch.no_grad():
        found, right = attention.opened(decoder)(x, x + 1, mask), decoder(x, x + 1, mask)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert not any(type(module) is nn.MultiheadAttention for module in attention.opened(decoder).modules())


def test_it_trains_as_torchs_does():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    made, x = attention.opened(module), torch.randn(2, 5, 16)
    for one in (module, made):
        one(x, x, x, need_weights=False)[0].square().sum().backward()
    theirs = module.in_proj_weight.grad.chunk(3)
    for ours, right in zip((made.query, made.key, made.value), theirs, strict=True):
        torch.testing.assert_close(ours.weight.grad, right, atol=1e-4, rtol=1e-3)
