# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Several threads run one adapted model, and nothing of a forward stays on it."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers as t
from peft.utils import ModulesToSaveWrapper
from small_models import tiny_model
from tuner_models import adapt, family, inputs_for, main_output, speak_up

from modernalbert import ModernALBERTForSequenceClassification, MoLConfig
from modernalbert.tuner.observer import mol_layers, recording


def in_threads(*jobs, repeat: int = 8) -> None:
    """Run the jobs at the same time, each several times; an error of any of them is raised."""
    errors, together = [], threading.Barrier(len(jobs))

    def work(job) -> None:
        try:
            together.wait()
            for _ in range(repeat):
                job()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


BASES = {
    "bert": lambda: t.BertForSequenceClassification(family("bert").config),
    "llama": lambda: family("llama"),
    "modernalbert": lambda: tiny_model(ModernALBERTForSequenceClassification, ffn_modulation="none"),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mixing", ["token", "ema"])
def test_threads_with_batches_of_different_sizes_get_their_own_answers(name, mixing):
    model = adapt(BASES[name](), expert_mixing=mixing).eval()
    batches = [torch.randint(3, 99, shape) for shape in ((1, 50), (3, 12), (9, 60))]  # the last is cut into blocks

    def answer(ids: torch.Tensor):
        return model(input_ids=ids, output_router_logits=True)

    with torch.no_grad():
        expected = [answer(ids) for ids in batches]

    @torch.no_grad()
    def serve(number: int) -> None:
        output = answer(batches[number])
        torch.testing.assert_close(output.logits, expected[number].logits, atol=1e-5, rtol=1e-5)
        assert len(output.router_logits) == len(expected[number].router_logits)
        for logits, right in zip(output.router_logits, expected[number].router_logits):
            assert logits.shape == (*batches[number].shape, 4)
            torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)

    in_threads(*(lambda number=number: serve(number) for number in (0, 1, 2)))


def test_threads_can_give_rows_adapters_of_their_own():
    torch.manual_seed(0)
    model = adapt(BASES["modernalbert"](), "one", task_type="SEQ_CLS")
    model.add_adapter("two", MoLConfig(num_experts=3, num_experts_per_tok=1, r=2, task_type="SEQ_CLS"))
    speak_up(model, "two", seed=1).eval()
    with torch.no_grad():
        for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
            for parameter in wrapper.modules_to_save.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    ids = torch.randint(3, 99, (3, 7))
    rows = [["two", "__base__", "one"], ["one", "one", "__base__"], ["two", "two", "two"]]
    with torch.no_grad():
        alone = {}
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            alone[adapter] = model(ids).logits
        with model.disable_adapter():
            alone["__base__"] = model(ids).logits

    @torch.no_grad()
    def serve(names: list[str] | None) -> None:
        logits = model(ids, adapter_names=names).logits
        for row, adapter in enumerate(names or ["two"] * 3):
            torch.testing.assert_close(logits[row], alone[adapter][row], atol=1e-5, rtol=1e-5)

    assert (alone["one"] - alone["two"]).abs().min() > 1e-3
    model.set_adapter("two")
    in_threads(*(lambda names=names: serve(names) for names in (*rows, None)))


def test_gradients_in_threads_are_those_of_one_thread():
    model = adapt(BASES["bert"]()).eval()
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    batches = [torch.randint(3, 99, shape) for shape in ((1, 30), (4, 9))]

    def gradients(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(ids).logits.square().sum(), parameters, allow_unused=True)

    expected = [gradients(ids) for ids in batches]

    def work(number: int) -> None:
        for gradient, right in zip(gradients(batches[number]), expected[number]):
            torch.testing.assert_close(gradient, right, atol=1e-5, rtol=1e-4)

    in_threads(lambda: work(0), lambda: work(1))


def test_a_recording_hears_its_own_thread_and_its_own_model_alone():
    model, other = adapt(family("bert")), adapt(family("bert"))
    inputs = inputs_for(model.base_model.model)
    heard = {}

    def listen(name: str) -> None:
        with torch.no_grad(), recording(model) as router_logits:
            model(**inputs)
            other(**inputs)
        heard[name] = router_logits

    in_threads(lambda: listen("a"), lambda: listen("b"), repeat=1)
    names = [name for name, _ in mol_layers(model)]
    for router_logits in heard.values():
        assert list(router_logits) == names
        assert [[use.shape for use in uses] for uses in router_logits.values()] == [[(3, 9, 4)]] * 2
    with torch.no_grad(), recording(model.base_model.model) as inner, recording(model) as outer:
        model(**inputs, output_router_logits=True)
    assert len(inner) == len(outer) == 2


def test_a_failed_forward_leaves_nothing_behind():
    model = adapt(family("bert")).train()
    inputs = inputs_for(model.base_model.model)
    projection = next(layer for _, layer in mol_layers(model)).output_projection

    def fail(*_):
        raise RuntimeError("on the way")

    handle = projection.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        model(**inputs, output_router_logits=True)
    handle.remove()
    # outside of a use of its FFN a projection is the base's
    x = torch.randn(2, projection.in_features)
    torch.testing.assert_close(projection(x), torch.nn.functional.linear(x, projection.weight, projection.bias))
    assert len(model(**inputs, output_router_logits=True).router_logits) == 2
    reference = weakref.ref(model.base_model.model)
    del model, projection
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_a_model_that_has_run_are_the_same_function(copied):
    model = adapt(family("bert"), expert_mixing="ema").train()
    inputs = inputs_for(model.base_model.model)
    main_output(model(**inputs)).sum().backward()
    twin = copied(model).eval()
    model.eval()
    torch.testing.assert_close(main_output(twin(**inputs)), main_output(model(**inputs)))
    with torch.no_grad():
        for _, layer in mol_layers(model):
            layer.mol_B_in["default"].weight.zero_()
    assert not torch.allclose(main_output(twin(**inputs)), main_output(model(**inputs)))
    assert twin(**inputs, output_router_logits=True).router_logits[0].shape == (3, 9, 4)
