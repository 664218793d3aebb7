# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every form of attention mask gives what the sequences get alone, or is refused with a sentence."""

import pytest
import torch
from small_models import tiny_config, tiny_model

from modernalbert import ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.modeling_modernalbert import TokenSpans, prepare_given_mask, sequence_indices


LAYER_TYPES = ["full_attention"] * 4 + ["sliding_attention"] * 2
IDS = torch.arange(3, 99).view(4, 24)
# Right padding, left padding, padding inside (more than a window wide), padding on both sides.
MASK = torch.ones(4, 24, dtype=torch.long)
MASK[0, 15:] = MASK[1, :5] = MASK[2, 4:17] = MASK[2, 20] = MASK[3, :2] = MASK[3, 22:] = 0


def near(window: int) -> torch.Tensor:
    columns = torch.arange(24)
    return (columns[:, None] - columns).abs() <= window


def prepared(form: str, window: int) -> dict[str, torch.Tensor]:
    """MASK as masks (batch, 1, sequence, sequence) of each layer type."""
    seen = MASK.bool()[:, None, None, :].expand(-1, 1, 24, -1)
    masks = {"full_attention": seen, "sliding_attention": seen & near(window)}
    if form == "numbers":
        return {name: torch.zeros(mask.shape).masked_fill(~mask, -1e9) for name, mask in masks.items()}
    return masks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32, torch.float16])
def test_masks_of_two_dimensions_by_any_dtype(attention, dtype):
    model = tiny_model(ModernALBERTModel, torch.float64, layer_types=LAYER_TYPES, attn_implementation=attention)
    expected, actual = model(IDS, MASK)[0], model(IDS, MASK.to(dtype))[0]
    assert torch.equal(actual, expected)
    pooled = tiny_model(ModernALBERTForSequenceClassification, torch.float64, classifier_pooling="mean")
    assert torch.equal(pooled(IDS, MASK.to(dtype)).logits, pooled(IDS, MASK).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["booleans", "numbers"])
def test_prepared_masks_give_the_same(attention, form):
    real = MASK.bool()
    changes = {"attn_implementation": attention, "local_attention": 8}
    model = tiny_model(ModernALBERTModel, layer_types=LAYER_TYPES, **changes)
    expected = model(IDS, MASK)[0][real]
    masks = prepared(form, window=4)
    if attention == "eager" and form == "booleans":
        # A dict goes to the implementation as it is, and eager adds.
        additive = {name: prepare_given_mask(model.config, mask, torch.float32) for name, mask in masks.items()}
        masks = {name: both[name] for name, both in additive.items()}
    torch.testing.assert_close(model(IDS, masks)[0][real], expected, atol=1e-5, rtol=1e-5)
    # A tensor serves every layer.
    full = tiny_model(ModernALBERTModel, **changes)
    mask = prepared(form, window=4)["full_attention"]
    torch.testing.assert_close(full(IDS, mask)[0][real], full(IDS, MASK)[0][real], atol=1e-5, rtol=1e-5)
    by_head = mask.expand(-1, 4, -1, -1)
    torch.testing.assert_close(full(IDS, by_head)[0][real], full(IDS, MASK)[0][real], atol=1e-5, rtol=1e-5)
    by_key = mask[:, :, :1]
    torch.testing.assert_close(full(IDS, by_key)[0][real], full(IDS, MASK)[0][real], atol=1e-5, rtol=1e-5)
    half = tiny_model(ModernALBERTModel, torch.bfloat16, **changes)
    assert half(IDS, mask)[0].isfinite().all()


def test_booleans_become_numbers_where_they_would_be_added():
    config = tiny_config()
    mask = prepared("booleans", window=4)["full_attention"]
    for attention, wanted in (("eager", torch.float32), ("flex_attention", torch.float32), ("sdpa", torch.bool)):
        config._attn_implementation = attention
        (given,) = prepare_given_mask(config, mask, torch.float32).values()
        assert given.dtype == wanted and torch.equal(given == 0 if wanted != torch.bool else given, mask)


@pytest.mark.parametrize(
    "mask, message",
    [
        (MASK * 2, "values other than 0 and 1"),
        ((1.0 - MASK) * -1e9, "values other than 0 and 1"),
        (MASK[:, :20], r"the shape \(4, 20\); it must be that of the inputs, \(4, 24\)"),
        (MASK[:2], r"the shape \(2, 24\)"),
        (MASK[:, None, :], "3 dimensions"),
        (MASK[:, None, None, :].expand(-1, 1, 24, -1), "dtype torch.int64; it must be boolean"),
        (torch.ones(4, 1, 24, 20, dtype=torch.bool), r"the shape \(4, 1, 24, 20\)"),
        (torch.ones(4, 3, 24, 24, dtype=torch.bool), r"the shape \(4, 3, 24, 24\)"),
        ({"full_attention": None}, r"lacks the layer types \['sliding_attention'\]"),
    ],
)
def test_masks_of_no_known_form_are_refused(mask, message):
    model = tiny_model(ModernALBERTModel, layer_types=LAYER_TYPES)
    with pytest.raises(ValueError, match=message):
        model(IDS, mask)


def test_flash_attention_refuses_what_it_would_get_wrong():
    config = tiny_config(layer_types=LAYER_TYPES)
    config._attn_implementation = "flash_attention_2"
    model = ModernALBERTModel(tiny_config(layer_types=LAYER_TYPES))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="padding between the tokens of a sequence.*'flash_attention_2'"):
        model(IDS, MASK)
    with pytest.raises(ValueError, match="4 dimensions is not allowed with attn_implementation='flash_attention_2'"):
        model(IDS, MASK.bool()[:, None, None, :])
    spans = TokenSpans.find(MASK[:2].shape, MASK.device, MASK[:2].bool(), None)
    spans.refuse_holes(config, is_packed=False)  # padding at the ends alone
    assert spans.lengths.tolist() == spans.counts.tolist() == [15, 19]
    with pytest.raises(ValueError, match="use 'sdpa'"):
        everywhere = tiny_config(layer_types=None)
        TokenSpans.find(MASK.shape, MASK.device, MASK.bool(), None).refuse_holes(everywhere, is_packed=True)


def test_sequences_of_packed_rows_are_counted_without_padding():
    positions = torch.tensor([[0, 1, 9, 2, 0, 9, 1, 2], [9, 9, 0, 1, 2, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    assert sequence_indices(positions, mask).tolist() == [[0, 0, -1, 0, 1, -1, 1, 1], [-1, -1, 0, 0, 0, 1, 1, 1]]
