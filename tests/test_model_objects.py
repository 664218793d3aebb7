# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A model is an ordinary module: pickled, copied, served by threads, differentiated by torch.func, loaded to train."""

import copy
import io
import json
import pickle
import threading

import pytest
import torch
from small_models import tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification, ModernALBERTModel


FORMS = [
    {"ffn_modulation": "mol"},
    {"ffn_modulation": "mol", "mol_positions": "last"},
    {"ffn_modulation": "mol", "expert_mixing": "ema"},
    {"ffn_modulation": "moa"},
    {"ffn_modulation": "depth_lora"},
    {"ffn_modulation": "none"},
]
IDS = torch.arange(3, 63).view(3, 20)
MASK = (torch.arange(20) < torch.tensor([[20], [3], [11]])).long()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved_whole])
@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(changes.values()))
def test_a_copy_computes_the_same_and_shares_nothing(changes, copied):
    model = tiny_model(ModernALBERTForMaskedLM, **changes)
    expected = model(IDS, MASK).logits
    other = copied(model)
    assert torch.equal(other(IDS, MASK).logits, expected)
    assert other.decoder.weight is other.get_input_embeddings().weight  # still tied
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS, MASK).logits, expected)
    # A copy trains by itself, its statistics too.
    usage = {name: buffer.clone() for name, buffer in model.named_buffers()}
    other.train()(IDS, MASK, labels=IDS).loss.backward()
    assert all(torch.equal(buffer, usage[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(changes.values()))
def test_threads_that_share_a_model_get_their_own_answers(changes):
    model = tiny_model(ModernALBERTForSequenceClassification, **changes)
    batches = [(IDS, MASK), (IDS[:1, :7], None), (IDS[:2], MASK[1:]), (IDS[:, :12], MASK[:, :12])]
    with torch.no_grad():
        expected = [model(*batch).logits for batch in batches]
    wrong = []

    def serve(i: int) -> None:
        for _ in range(8):
            try:
                with torch.no_grad():
                    torch.testing.assert_close(model(*batches[i]).logits, expected[i], atol=1e-5, rtol=1e-5)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=serve, args=(i % len(batches),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_train_add_up_gradients_and_keep_statistics_averages():
    model = tiny_model(ModernALBERTModel, torch.float64, router_jitter_noise=0.0, router_aux_loss_coef=0.0).train()

    def train(rows: slice) -> None:
        model(IDS[rows], MASK[rows])[0].square().sum().backward()

    train(slice(None))
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "mol_" not in name}
    model.zero_grad()
    threads = [threading.Thread(target=train, args=(slice(i, i + 1),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-9, rtol=1e-9, msg=name)
    usage = model.groups[-1].mlp.mol_usage
    assert usage.sum().item() == pytest.approx(1, abs=1e-5) and usage.min() >= 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", FORMS[:1] + FORMS[2:5:2], ids=lambda changes: "-".join(changes.values()))
def test_torch_func_gives_gradients_of_each_row(changes, attention):
    model = tiny_model(ModernALBERTForSequenceClassification, torch.float64, attn_implementation=attention, **changes)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    labels = torch.tensor([0, 1, 1])

    def loss(parameters, ids, mask, label):
        arguments = (ids[None], mask[None])
        return torch.func.functional_call(model, parameters, arguments, {"labels": label[None]}).loss

    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, IDS, MASK, labels)
    for row in range(3):
        model.zero_grad()
        model(IDS[row : row + 1], MASK[row : row + 1], labels=labels[row : row + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(by_row[name][row], parameter.grad, atol=1e-9, rtol=1e-9, msg=name)


def test_data_parallel_on_one_device_is_the_model():
    model = tiny_model(ModernALBERTForSequenceClassification)
    expected = model(IDS, MASK).logits
    assert torch.equal(torch.nn.DataParallel(model)(IDS, attention_mask=MASK).logits, expected)


def test_weights_stored_in_bfloat16_load_in_float32_where_the_configuration_says_so(tmp_path):
    model = tiny_model(ModernALBERTForSequenceClassification, torch.bfloat16)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert json.loads(file.read_text())["dtype"] == "bfloat16"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}))
    loaded, info = ModernALBERTForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.dtype == torch.float32 and loaded.config.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float()), name
    half = ModernALBERTForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.groups[-1].mlp.mol_usage.dtype == torch.float32
