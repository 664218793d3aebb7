# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The encoder is ModernBERT where it should be, and a sequence gets what it gets alone wherever it stands."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_models import tiny_config, tiny_model, tiny_modernbert

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForQuestionAnswering,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTModel,
    MoLConfig,
    modeling_modernalbert,
    upcycle_modernbert,
)
from modernalbert.modeling_modernalbert import (
    PutRows,
    TakeRows,
    TokenLayout,
    TokenSpans,
    compiles_each_shape,
    flash_sequence_arguments,
    round_up_rows,
    sequence_indices,
)
from modernalbert.upcycling.modernbert import config_from_modernbert


LOCAL_GLOBAL = ["full_attention", "sliding_attention", "sliding_attention"] * 2
IDS = torch.arange(3, 39).view(2, 18)
HEADS = (
    ModernALBERTForMaskedLM,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTForQuestionAnswering,
    ModernALBERTForMultipleChoice,
)


def padded(side: str, lengths=(13, 20, 7)) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Ids and mask of a padded batch, and its sequences."""
    sequences = [torch.randint(3, 120, (length,)) for length in lengths]
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, where], mask[row, where] = sequence, 1
    return ids, mask, sequences


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer_types", [None, LOCAL_GLOBAL, ["full_attention"] * 6])
def test_equals_modernbert(attention, side, layer_types):
    teacher = tiny_modernbert(layer_types=layer_types, attn_implementation=attention)
    student = upcycle_modernbert(teacher, config_from_modernbert(teacher.config))
    student.set_attn_implementation(attention)
    assert student.config.group_depth == 1 and student.config.skip_first_attn_norm
    assert not list(student.model.groups[0].attn_norm.parameters())
    ids, mask, _ = padded(side)
    expected, actual = teacher(ids, mask).logits, student(ids, mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_equals_modernbert_with_biases_and_hidden_states():
    teacher = tiny_modernbert(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True)
    student = upcycle_modernbert(teacher, config_from_modernbert(teacher.config))
    ids, mask, _ = padded("right")
    expected = teacher(ids, mask, output_hidden_states=True).hidden_states
    actual = student(ids, mask, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 7
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("modulation", ["mol", "moa", "depth_lora", "none"])
def test_padding_changes_nothing(dtype, tolerance, attention, side, modulation):
    model = tiny_model(
        ModernALBERTModel,
        dtype,
        layer_types=LOCAL_GLOBAL,
        ffn_modulation=modulation,
        attn_implementation=attention,
    )
    ids, mask, sequences = padded(side)
    output = model(ids, mask).last_hidden_state
    for row, sequence in enumerate(sequences):
        alone = model(sequence[None]).last_hidden_state[0]
        torch.testing.assert_close(output[row][mask[row].bool()], alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_tokens_alone_are_worked_on_and_it_changes_nothing(attention, side):
    ids, mask, sequences = padded(side)
    model = tiny_model(ModernALBERTModel, torch.float64, attn_implementation=attention, layer_types=LOCAL_GLOBAL)
    model.train()
    widths, embed = [], model.embeddings.forward

    def watched(*inputs):  # no hook: what is hooked gets the batch as it is
        output = embed(*inputs)
        widths.append(output.shape[:2])
        return output

    model.embeddings.forward = watched
    asked = {"output_hidden_states": True, "output_router_logits": True}
    results = []
    for hooks in (False, True):
        handle = model.groups[0].register_forward_hook(lambda *_: None) if hooks else None
        model.load_state_dict(tiny_model(ModernALBERTModel, torch.float64, layer_types=LOCAL_GLOBAL).state_dict())
        model.zero_grad()
        torch.manual_seed(0)
        model.groups[-1].mlp.mol_router.jitter_noise = model.groups[-2].mlp.mol_router.jitter_noise = 0.0
        output = model(ids, mask, **asked)
        (output.last_hidden_state[mask.bool()].square().sum() + output.aux_loss).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((output, gradients, model.groups[-1].mlp.mol_usage.clone()))
        if handle is not None:
            handle.remove()
    assert widths == [(1, sum(map(len, sequences))), tuple(ids.shape)]
    (actual, actual_gradients, actual_usage), (expected, expected_gradients, expected_usage) = results
    exact = {"atol": 1e-10, "rtol": 1e-10}
    real = mask.bool()
    for field in ("hidden_states", "router_logits"):
        for one, other in zip(actual[field], expected[field]):
            torch.testing.assert_close(one[real], other[real], **exact)
    assert not actual.last_hidden_state[~real].any()
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, **exact)
    torch.testing.assert_close(actual_usage, expected_usage)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def test_gradient_checkpointing_works_on_real_tokens_alone_too():
    ids, mask, sequences = padded("right")
    model = tiny_model(ModernALBERTModel, torch.float64).train()
    for group in model.groups:
        if group.mlp.__class__.__name__ == "MoLFeedForward":
            group.mlp.mol_router.jitter_noise = 0.0
    widths, embed = [], model.embeddings.forward

    def watched(*inputs):
        output = embed(*inputs)
        widths.append(output.shape[:2])
        return output

    model.embeddings.forward = watched
    gradients = []
    for _ in range(2):
        model(ids, mask).last_hidden_state[mask.bool()].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert widths == 2 * [(1, sum(map(len, sequences)))]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_changes_nothing(dtype, tolerance, attention):
    model = tiny_model(ModernALBERTModel, dtype, layer_types=LOCAL_GLOBAL, attn_implementation=attention)
    lengths = [[5, 9, 1, 6], [11, 10], [3, 12]]  # the last row ends in padding
    rows, width = [[torch.randint(3, 120, (n,)) for n in row] for row in lengths], 21
    ids, positions = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.long)
    for r, row in enumerate(rows):
        n = sum(map(len, row))
        ids[r, :n], mask[r, :n] = torch.cat(row), 1
        positions[r, :n] = torch.cat([torch.arange(len(sequence)) for sequence in row])
    output = model(ids, mask, position_ids=positions).last_hidden_state
    without_mask = model(ids[:2], position_ids=positions[:2]).last_hidden_state
    torch.testing.assert_close(output[:2], without_mask, atol=tolerance, rtol=tolerance)
    assert torch.isfinite(output).all()
    for r, row in enumerate(rows):
        start = 0
        for sequence in row:
            alone = model(sequence[None]).last_hidden_state[0]
            packed = output[r, start : start + len(sequence)]
            torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)
            start += len(sequence)


def mixed_lengths() -> dict[str, dict[str, torch.Tensor]]:
    """Batches whose sequences are of very different lengths: padded on both sides and inside, and packed."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (12, 40), generator=generator)
    mask = torch.zeros_like(ids)
    for row, (start, length) in enumerate([(0, 40), (2, 38), (30, 10), (0, 9), (0, 3), (39, 1), (0, 0), (5, 20)] * 2):
        if row < len(mask):
            mask[row, start : start + length] = 1
    holes = mask.clone()
    holes[1, 10:20] = holes[2, 33] = holes[3, 1:8] = holes[7, 6:24] = 0
    positions = torch.stack([torch.cat([torch.arange(n) for n in (3, 20, 1, 9, 7)])] * 11 + [torch.arange(40)])
    end = (torch.arange(40) < 35).long().expand(12, -1)
    return {
        "padded": {"input_ids": ids, "attention_mask": mask},
        "padded inside": {"input_ids": ids, "attention_mask": holes},
        "packed": {"input_ids": ids, "position_ids": positions},
        "packed and padded": {"input_ids": ids, "position_ids": positions, "attention_mask": end},
        "packed and padded inside": {"input_ids": ids, "position_ids": positions, "attention_mask": end * holes},
    }


def layout_of(model: ModernALBERTModel, batch: dict[str, torch.Tensor]) -> TokenLayout:
    arguments = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
    return TokenLayout.build(model.config, batch["input_ids"], **arguments, dtype=model.dtype)


@pytest.mark.parametrize("attention, rounds_up", [("eager", False), ("sdpa", False), ("eager", True)])
@pytest.mark.parametrize("name", mixed_lengths())
def test_buckets_of_like_length_change_nothing(attention, rounds_up, name, monkeypatch):
    monkeypatch.setattr(modeling_modernalbert, "compiles_each_shape", lambda *_: rounds_up)
    batch = mixed_lengths()[name]
    # Tokens that are repeated to round up their number would change the usage of experts in training.
    changes = {"layer_types": LOCAL_GLOBAL, "attn_implementation": attention, "router_jitter_noise": 0.0}
    model = tiny_model(ModernALBERTModel, torch.float64, **changes).train()
    layout = layout_of(model, batch)
    assert len(layout.buckets) >= 3
    assert len(layout.places) == (round_up_rows(layout.num_tokens) if rounds_up else layout.num_tokens)
    results, start = [], {name: value.clone() for name, value in model.state_dict().items()}
    for hooks in (False, True):  # what is hooked gets the batch as it is
        model.load_state_dict(start)
        handle = model.groups[0].register_forward_hook(lambda *_: None) if hooks else None
        model.zero_grad()
        states = model(**batch, output_hidden_states=True, output_router_logits=True)
        (states.last_hidden_state.square().sum() + states.hidden_states[3].sin().sum() + states.aux_loss).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        gradients |= dict(model.named_buffers())
        results.append((states, gradients))
        if handle is not None:
            handle.remove()
    (actual, actual_gradients), (expected, expected_gradients) = results
    for field in ("hidden_states", "router_logits"):
        for one, other in zip(actual[field], expected[field], strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def test_buckets_hold_every_token_once_and_little_padding():
    model = tiny_model(ModernALBERTModel)
    for batch in mixed_lengths().values():
        layout = layout_of(model, batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        assert layout.places.sort().values.tolist() == mask.flatten().nonzero().flatten().tolist()
        assert sum(bucket.num_tokens for bucket in layout.buckets) == len(layout.places)
        states = torch.randn(1, len(layout.places), 2, 4, dtype=torch.float64)
        parts = states.split([bucket.num_tokens for bucket in layout.buckets], dim=1)
        again = [bucket.unpad(bucket.pad(part)) for bucket, part in zip(layout.buckets, parts)]
        assert torch.equal(torch.cat(again, dim=1), states)
        assert torch.equal(layout.pack(layout.unpack(states)), states)
    padded_batch = layout_of(model, mixed_lengths()["padded"])
    cells = sum(bucket.shape[0] * bucket.shape[1] for bucket in padded_batch.buckets)
    assert len(padded_batch.places) >= 0.75 * cells


def test_a_batch_without_padding_stays_as_it_is():
    model = tiny_model(ModernALBERTModel)
    ids = torch.randint(3, 120, (3, 9))
    for batch in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(9)[None]}):
        layout = layout_of(model, {"input_ids": ids} | batch)
        assert layout.places is layout.buckets is layout.real is layout.masks["full_attention"] is None
    # Of like lengths: one bucket.
    mask = torch.ones_like(ids)
    mask[0, 8] = mask[1, 0] = 0
    assert [bucket.shape for bucket in layout_of(model, {"input_ids": ids, "attention_mask": mask}).buckets] == [(3, 9)]


def test_a_batch_that_is_nearly_full_stays_as_it_is_unless_attention_gains():
    model = tiny_model(ModernALBERTModel)
    ids = torch.randint(3, 120, (4, 40))
    mask = torch.ones_like(ids)
    mask[0, -3:] = mask[2, -2:] = 0
    layout = layout_of(model, {"input_ids": ids, "attention_mask": mask})
    assert layout.buckets is layout.places is None
    # Two sequences of half a row each: half the scores.
    halves = torch.arange(20).repeat(2).expand(4, -1)
    assert layout_of(model, {"input_ids": ids, "attention_mask": mask, "position_ids": halves}).buckets
    mask[1, 30:] = 0
    assert layout_of(model, {"input_ids": ids, "attention_mask": mask}).buckets


def test_numbers_of_rows_are_few_and_hardly_larger():
    for num_rows in (1, 8, 9, 70, 983, 4092, 4097, 100_000):
        assert 0 <= round_up_rows(num_rows) - num_rows <= max(7, num_rows / 16)
        assert round_up_rows(round_up_rows(num_rows)) == round_up_rows(num_rows)
    assert len({round_up_rows(n) for n in range(1024, 2048)}) == 17
    assert compiles_each_shape(torch.device("cpu"), torch.bfloat16)
    assert not compiles_each_shape(torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiles_each_shape(torch.device("cpu"), torch.float32)


def test_positions_are_by_place_where_padding_lies_inside_a_sequence():
    model = tiny_model(ModernALBERTModel, torch.float64)
    ids, mask = torch.randint(3, 120, (1, 9)), torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0]])
    places = mask[0].nonzero().flatten()
    output = model(ids, mask)[0]
    alone = model(ids[:, places], position_ids=places[None])[0]
    torch.testing.assert_close(output[:, places], alone, atol=1e-10, rtol=1e-10)
    # Positions counted without the padding, as generation code gives them, are positions of one sequence.
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert sequence_indices(counted, mask) is None
    actual = model(ids, mask, position_ids=counted)[0]
    torch.testing.assert_close(actual[:, places], model(ids[:, places])[0], atol=1e-10, rtol=1e-10)


def hooked(model):
    model.model.groups[1].register_forward_hook(lambda *_: None)
    return model


def adapted(model):
    config = MoLConfig(num_experts=2, r=2, target_modules=["groups.0.mlp"], init_weights=True)
    return get_peft_model(model, config)


def with_lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["Wqkv", "Wi"]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", [lambda model: model, hooked, adapted, with_lora])
def test_every_returned_state_is_zero_at_padding(attention, run):
    changes = {"layer_types": LOCAL_GLOBAL, "norm_bias": True, "attn_implementation": attention}
    plain = tiny_model(ModernALBERTForMaskedLM, torch.float64, **changes)
    model = run(tiny_model(ModernALBERTForMaskedLM, torch.float64, **changes)).eval()
    ids, mask, _ = padded("left")
    asked = {"output_hidden_states": True, "output_router_logits": True, "labels": ids}
    output, expected = model(ids, mask, **asked), plain(ids, mask, **asked)
    # Routers of an adapter, of two experts, report in their own way.
    for state in (*output.hidden_states, *(logits for logits in output.router_logits if logits.shape[-1] == 4)):
        assert not state[mask == 0].any()
    # A head is given zeros there, and labels there, if there are any, meet what it makes of them.
    nothing = plain.decode(torch.zeros(1, 32, dtype=torch.float64))
    torch.testing.assert_close(output.logits[mask == 0], nothing.expand(int((mask == 0).sum()), -1))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_returned_lies_on_the_way_to_the_output(attention, side):
    ids, mask, _ = padded(side)
    gradients = []
    for hooks in (False, True):
        model = tiny_model(ModernALBERTForSequenceClassification, torch.float64, attn_implementation=attention)
        if hooks:
            hooked(model)
        output = model(ids, mask, output_hidden_states=True, output_attentions=attention == "eager")
        returned = [*output.hidden_states, *(output.attentions or ())]
        for state in returned:
            state.retain_grad()
        output.logits[:, 0].sum().backward()
        assert all(state.grad is not None and state.grad.any() for state in returned)
        assert all(not state.grad[mask == 0].any() for state in output.hidden_states)
        gradients.append([state.grad for state in returned])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    # As layer-wise attribution uses it: a step against the gradient of a state is what that state's change does.
    model = tiny_model(ModernALBERTForSequenceClassification, torch.float64, attn_implementation=attention)
    step = torch.randn_like(gradients[0][2]) * 1e-6 * mask[..., None]
    before = model(ids, mask).logits[:, 0].sum()
    model.model.groups[1].register_forward_pre_hook(changed_once(step))
    predicted = (gradients[0][2] * step).sum()
    torch.testing.assert_close(model(ids, mask).logits[:, 0].sum() - before, predicted, atol=1e-10, rtol=1e-3)


def changed_once(step):
    """A hook that adds `step` to a module's input the first time."""
    steps = [step]
    return lambda _, inputs: (inputs[0] + steps.pop(), *inputs[1:]) if steps else None


def test_rows_are_taken_and_put_with_gradients_of_every_order():
    rows = torch.tensor([4, 0, 3])
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    put = PutRows.apply(x, rows, 5)
    assert torch.equal(put[rows], x) and not put[[1, 2]].any()
    assert torch.equal(TakeRows.apply(put, rows), x)
    assert torch.autograd.gradcheck(lambda x: PutRows.apply(x, rows, 5), x)
    assert torch.autograd.gradgradcheck(lambda x: PutRows.apply(x.sin(), rows, 5).square(), x)
    y = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: TakeRows.apply(y, rows), y)
    assert torch.autograd.gradgradcheck(lambda y: TakeRows.apply(y.sin(), rows).square(), y)


@pytest.mark.slow  # it generates machine code
def test_flex_attention_equals_sdpa_on_padded_and_packed_rows():
    sdpa = tiny_model(ModernALBERTModel, layer_types=LOCAL_GLOBAL, hidden_size=64, attn_implementation="sdpa")
    flex = tiny_model(ModernALBERTModel, layer_types=LOCAL_GLOBAL, hidden_size=64, attn_implementation="flex_attention")
    ids, mask, _ = padded("right")
    positions = torch.cat([torch.arange(8), torch.arange(12)]).repeat(3, 1)
    with torch.no_grad():
        for inputs in ({"attention_mask": mask}, {"position_ids": positions}):
            expected, actual = sdpa(ids, **inputs)[0], flex(ids, **inputs)[0]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            # Compiled code of its own, in float32 alone: what it rounds is up to the compiler.
            torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_of_padding_alone_stays_finite(attention):
    model = tiny_model(ModernALBERTForMaskedLM, attn_implementation=attention).train()
    ids = torch.randint(3, 120, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    output = model(ids, mask, labels=ids)
    output.loss.backward()
    assert torch.isfinite(output.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    usage = model.model.groups[-1].mlp.mol_usage.clone()
    model(ids, torch.zeros_like(mask))
    assert torch.equal(model.model.groups[-1].mlp.mol_usage, usage)


def test_local_layers_see_their_window_only():
    model = tiny_model(ModernALBERTModel, layer_types=["sliding_attention"] * 6, num_hidden_layers=6)
    ids = torch.randint(3, 120, (1, 60))
    changed = ids.clone()
    changed[0, 0] = 119 if ids[0, 0] != 119 else 118
    difference = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0]
    reach = 6 * model.config.local_attention // 2
    assert difference[: reach + 1].min() > 0 and difference[reach + 1 :].max() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooled_heads_ignore_padding(pooling, side):
    model = tiny_model(ModernALBERTForSequenceClassification, classifier_pooling=pooling)
    choice = tiny_model(ModernALBERTForMultipleChoice, classifier_pooling=pooling)
    ids, mask, sequences = padded(side)
    logits, scores = model(ids, mask).logits, choice(ids[None], mask[None]).logits
    assert scores.shape == (1, 3)
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(logits[row], model(sequence[None]).logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[0, row], choice(sequence[None, None]).logits[0, 0], atol=1e-5, rtol=1e-5)


def labels_for(model_class, ids):
    batch, length = ids.shape
    if model_class is ModernALBERTForQuestionAnswering:
        return {"start_positions": torch.zeros(batch, dtype=torch.long), "end_positions": torch.full((batch,), 3)}
    if model_class in (ModernALBERTForMaskedLM, ModernALBERTForTokenClassification):
        return {"labels": torch.randint(0, 2, (batch, length))}
    return {"labels": torch.zeros(batch, dtype=torch.long)}


@pytest.mark.parametrize("model_class", HEADS)
def test_every_head_trains_and_returns_what_is_asked(model_class):
    model = tiny_model(model_class, attn_implementation="eager", router_jitter_noise=0.0)
    flat_ids = torch.randint(3, 120, (4, 9))
    ids = flat_ids.view(2, 2, 9) if model_class is ModernALBERTForMultipleChoice else flat_ids
    labels = labels_for(model_class, flat_ids)
    if model_class is ModernALBERTForMultipleChoice:
        labels = {"labels": torch.tensor([0, 1])}
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    output = model(ids, **labels, **asked)
    assert len(output.hidden_states) == 7 and output.hidden_states[0].shape == (4, 9, 32)
    assert len(output.attentions) == 6 and output.attentions[0].shape == (4, 4, 9, 9)
    assert len(output.router_logits) == 4 and output.router_logits[0].shape == (4, 9, 4)
    assert output.aux_loss is None
    assert isinstance(model(ids, **labels, return_dict=False), tuple)
    silent = model(ids, **labels)
    assert silent.hidden_states is None and silent.attentions is None and silent.router_logits is None

    training = model.train()(ids, **labels)
    torch.testing.assert_close(training.loss - output.loss, training.aux_loss, atol=1e-5, rtol=0)
    training.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_classification_problem_types():
    ids = torch.randint(3, 120, (4, 9))
    cases = {
        "regression": (1, torch.rand(4)),
        "multi_label_classification": (3, torch.randint(0, 2, (4, 3)).float()),
        "single_label_classification": (3, torch.randint(0, 3, (4,))),
    }
    for problem_type, (num_labels, labels) in cases.items():
        model = tiny_model(ModernALBERTForSequenceClassification, num_labels=num_labels)
        logits = model(ids).logits
        loss = model(ids, labels=labels).loss
        assert model.config.problem_type == problem_type
        if problem_type == "regression":
            expected = (logits.squeeze() - labels).square().mean()
        elif problem_type == "multi_label_classification":
            expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        else:
            expected = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(loss, expected)
    named = tiny_config(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    assert ModernALBERTForSequenceClassification(named).classifier.out_features == 3


def test_sparse_prediction_gives_the_same_loss():
    dense, sparse = (tiny_model(ModernALBERTForMaskedLM, sparse_prediction=flag) for flag in (False, True))
    ids = torch.randint(3, 120, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.4, ids, -100)
    a, b = dense(ids, labels=labels), sparse(ids, labels=labels)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.logits[labels != -100], b.logits)


def test_inputs_embeds_have_the_width_of_the_factorised_embedding():
    model = tiny_model(ModernALBERTModel)
    ids = torch.randint(3, 120, (2, 9))
    embeddings = model.get_input_embeddings()(ids)
    assert embeddings.shape == (2, 9, 16)
    torch.testing.assert_close(model(inputs_embeds=embeddings)[0], model(ids)[0])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeddings)


def test_prompt_tuning_takes_prompts_of_the_width_of_the_embedding():
    model = tiny_model(ModernALBERTForSequenceClassification)
    ids, mask = torch.randint(3, 120, (2, 9)), torch.ones(2, 13, dtype=torch.long)
    embeddings = model.get_input_embeddings()(ids)
    width = model.config.embedding_size
    tuned = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4, token_dim=width)).eval()
    actual = tuned(ids, attention_mask=mask[:, 4:]).logits
    inputs = torch.cat([tuned.get_prompt(2), embeddings], dim=1)
    torch.testing.assert_close(actual, tuned.base_model(inputs_embeds=inputs, attention_mask=mask).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prepared_4d_mask_is_used(attention):
    model = tiny_model(ModernALBERTModel, attn_implementation=attention)
    ids, mask, _ = padded("right")
    prepared = mask.bool()[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    expected, actual = model(ids, mask)[0], model(ids, prepared)[0]
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_flash_attention_gets_the_boundaries_of_packed_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    sequences = sequence_indices(positions, None)
    assert sequences.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    arguments = flash_sequence_arguments(sequences)
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 10]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 4
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert sequence_indices(positions, mask).tolist() == [[0, 0, 0, 1, -1], [0, 1, 1, 1, 1]]
    assert sequence_indices(torch.arange(5).expand(2, 5), mask) is None  # positions that grow: not packed


@pytest.mark.parametrize("side", ["right", "left"])
def test_flash_attention_gets_the_boundaries_of_padded_rows(side):
    _, mask, _ = padded(side)
    arguments = TokenSpans.find(mask.shape, mask.device, mask.bool(), None).flash_arguments()
    assert arguments["cu_seq_lens_q"].tolist() == [0, 13, 33, 40]
    assert arguments["max_length_q"] == 20


@pytest.mark.parametrize("model_class", HEADS)
def test_a_configuration_that_asks_for_tuples(model_class):
    model = tiny_model(model_class)
    ids = torch.randint(3, 120, (2, 2, 9) if model_class is ModernALBERTForMultipleChoice else (2, 9))
    expected = model(ids)[0]
    model.config.return_dict = False
    output = model(ids)
    assert isinstance(output, tuple) and torch.equal(output[0], expected)


def test_gradients_of_the_uses_of_a_group_add_up():
    with_all_norms = {"skip_first_attn_norm": False}
    shared = tiny_model(ModernALBERTModel, torch.float64, **with_all_norms)
    unshared = tiny_model(ModernALBERTModel, torch.float64, group_depth=1, mol_groups=[2, 3, 4, 5], **with_all_norms)
    state = shared.state_dict()
    for name in unshared.state_dict():
        if name.startswith("groups."):
            _, layer, rest = name.split(".", 2)
            state[name] = shared.state_dict()[f"groups.{int(layer) // 2}.{rest}"]
    unshared.load_state_dict({name: state[name] for name in unshared.state_dict()})
    ids = torch.randint(3, 120, (2, 9))
    for model in (shared, unshared):
        model(ids)[0].square().sum().backward()
    torch.testing.assert_close(unshared(ids)[0], shared(ids)[0])
    for name, parameter in shared.named_parameters():
        if name.startswith("groups."):
            _, group, rest = name.split(".", 2)
            uses = [unshared.get_parameter(f"groups.{2 * int(group) + i}.{rest}").grad for i in range(2)]
            torch.testing.assert_close(parameter.grad, uses[0] + uses[1], msg=name)


def test_attentions_need_eager():
    with pytest.raises(ValueError, match="attn_implementation='sdpa'.*eager"):
        tiny_model(ModernALBERTModel, attn_implementation="sdpa")(
            torch.ones(1, 4, dtype=torch.long), output_attentions=True
        )


@pytest.mark.parametrize("embedding_size", [16, None])
def test_resize_token_embeddings_keeps_the_tie(embedding_size):
    model = tiny_model(ModernALBERTForMaskedLM, embedding_size=embedding_size)
    ids = torch.randint(3, 120, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(131)
    assert model.config.vocab_size == 131
    assert model.decoder.weight is model.get_input_embeddings().weight
    after = model(ids)
    assert after.logits.shape == (2, 9, 131)
    torch.testing.assert_close(after.logits[..., :120], before)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("rope_type, extra", [("linear", {"factor": 2.0}), ("dynamic", {"factor": 2.0})])
def test_other_rope_types(rope_type, extra):
    rope = {"full_attention": {"rope_type": rope_type, "rope_theta": 1e4, **extra}}
    model = tiny_model(ModernALBERTModel, rope_parameters=rope, max_position_embeddings=16)
    plain = tiny_model(ModernALBERTModel, rope_parameters={"full_attention": {"rope_theta": 1e4}})
    flat = tiny_model(ModernALBERTModel, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert torch.equal(flat(IDS)[0], plain(IDS)[0])
    ids = torch.randint(3, 120, (1, 40))
    output = model(ids)[0]
    assert torch.isfinite(output).all() and not torch.allclose(output, plain(ids)[0], atol=1e-3)
