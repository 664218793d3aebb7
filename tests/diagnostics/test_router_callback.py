# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A Trainer's log says what routers do, and failing routers are reported, on models where they fail on purpose."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from small_models import tiny_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from modernalbert import ModernALBERTForSequenceClassification, MoLConfig
from modernalbert.cli.errors import UserError
from modernalbert.diagnostics import RouterCallback
from modernalbert.diagnostics.router_callback import find_routed_models
from modernalbert.finetuning.arguments import TaskTrainingArguments
from modernalbert.modeling_mol import route, summarise_routing
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer


MEASURES = {
    "expert_usage_min",
    "expert_usage_max",
    "router_entropy",
    "router_usage_entropy",
    "router_token_dependence",
    "router_balance_loss",
    "router_grad_norm",
    "ffn_grad_norm",
}


def rows(num_rows: int = 8) -> Dataset:
    """Rows of 12 tokens, the last three of every second one padding."""
    ids = torch.randint(3, 120, (num_rows, 12))
    mask = torch.ones_like(ids)
    ids[::2, -3:] = mask[::2, -3:] = 0
    labels = torch.arange(num_rows) % 2
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


class Reporter(TrainerCallback):
    """What a reporter such as TensorBoard's gets, which `report_to` puts before callbacks of the user."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def make_trainer(model, folder, callbacks=(), trainer_class=Trainer, arguments_class=TrainingArguments, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return trainer_class(
        model=model,
        args=arguments_class(**(settings | changes)),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=list(callbacks),
    )


def classifier(**changes):
    return tiny_model(ModernALBERTForSequenceClassification, **changes)


def adapted(**changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=2
    )
    settings = {"r": 4, "num_experts": 4, "num_experts_per_tok": 2, "target_modules": r".*layer\.\d+$"}
    return get_peft_model(BertForSequenceClassification(config), MoLConfig(task_type="SEQ_CLS", **(settings | changes)))


@torch.no_grad()
def send_all_to_two_experts(model) -> None:
    """Every token's states gain a large constant part, which the routers read as experts 0 and 1."""
    for group in model.model.groups:
        if getattr(group.mlp, "mol_router", None) is not None:
            group.mlp_norm.bias = torch.nn.Parameter(torch.ones_like(group.mlp_norm.weight))
            group.mlp_norm.weight.mul_(0.01)
            group.mlp.mol_router.weight.zero_()
            group.mlp.mol_router.weight[:2] = 1.0
            group.mlp.mol_usage.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make_model", [classifier, adapted])
def test_every_log_line_has_the_measures_and_reporters_get_them(make_model, tmp_path):
    reporter = Reporter()
    trainer = make_trainer(make_model(), tmp_path, [reporter], gradient_accumulation_steps=2)
    callback = RouterCallback.add_to(trainer)
    assert RouterCallback.add_to(trainer) is callback
    trainer.train()
    assert len(logged(trainer)) == 4
    for entry in [*logged(trainer), *(entry for entry in reporter.seen if "loss" in entry)]:
        assert MEASURES <= set(entry)
        assert 0 <= entry["router_token_dependence"] <= entry["router_usage_entropy"] <= 1
        assert entry["router_balance_loss"] > 0.9 and entry["ffn_grad_norm"] > 0
        assert 0 < entry["router_grad_norm"] < entry["grad_norm"]
    for module in trainer.model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any("RouterCallback" in getattr(hook, "__qualname__", "") for hook in hooks)


@pytest.mark.parametrize("make_model", [classifier, adapted])
def test_measures_are_those_of_the_real_tokens(make_model, tmp_path):
    model = make_model(**({"router_jitter_noise": 0.0} if make_model is classifier else {}))
    model.eval()  # no dropout: what is measured in training is what evaluation gives
    data = rows(4)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    real = batch["attention_mask"].bool()
    tokens = [each[real] for each in logits]
    entropies = [-(p * p.log()).sum(-1).mean() / torch.tensor(4.0).log() for p in (t.softmax(-1) for t in tokens)]
    balance = summarise_routing(tuple(logits), 2, real).balance_loss

    if make_model is adapted:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train_dataset = data
    RouterCallback.add_to(trainer)
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["router_entropy"] == pytest.approx(torch.stack(entropies).mean().item(), abs=1e-5)
    assert entry["router_balance_loss"] == pytest.approx(balance.item(), abs=1e-5)
    q = [torch.zeros(len(t), 4).scatter_(1, *reversed(route(t, 2)[1:])) for t in tokens]
    usage = [torch.special.entr(each.mean(0)).sum() / torch.tensor(4.0).log() for each in q]
    own = [torch.special.entr(each).sum(-1).mean() / torch.tensor(4.0).log() for each in q]
    dependence = (torch.stack(usage) - torch.stack(own)).mean().item()
    assert entry["router_token_dependence"] == pytest.approx(dependence, abs=1e-5)


def test_only_steps_that_are_logged_are_measured(tmp_path):
    model = classifier()
    asked = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(bool(kwargs.get("output_router_logits"))), with_kwargs=True
    )
    trainer = make_trainer(model, tmp_path, logging_steps=2)
    RouterCallback.add_to(trainer)
    trainer.train()
    assert asked == [False, True, False, True]
    assert all(MEASURES <= set(entry) for entry in logged(trainer))


def test_training_is_the_same_with_it(tmp_path):
    losses = []
    for has_callback in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(classifier(), tmp_path)
        trainer.train_dataset = rows()
        if has_callback:
            RouterCallback.add_to(trainer)
        trainer.train()
        losses.append([entry["loss"] for entry in logged(trainer)])
    assert losses[0] == losses[1]


def test_a_router_built_to_collapse_is_reported_once(tmp_path, caplog):
    model = classifier(norm_bias=False)
    send_all_to_two_experts(model)
    trainer = make_trainer(model, tmp_path)
    RouterCallback.add_to(trainer)
    trainer.train()
    (collapse,) = [message for message in caplog.messages if "collapsed" in message]
    assert "layer 2 and 3 more" in collapse and "experts 0, 1" in collapse and "router_aux_loss_coef" in collapse
    (dead,) = [message for message in caplog.messages if "dead" in message]
    assert "model.groups.1.mlp and 1 more" in dead and "experts 2, 3" in dead
    assert not any("merge" in message.lower() for message in caplog.messages)  # all tokens are mixed alike


def test_router_gradients_that_dominate_are_reported(tmp_path, caplog):
    # The balance loss of an adapter moves its routers alone, where the base is frozen.
    trainer = make_trainer(adapted(router_aux_loss_coef=1e3), tmp_path)
    RouterCallback.add_to(trainer)
    trainer.train()
    (message,) = [message for message in caplog.messages if "gradients" in message]
    assert "gradients of the routers dominate" in message and "--router_learning_rate" in message


def test_a_merge_that_is_not_exact_is_announced_at_the_end_of_training(tmp_path, caplog):
    trainer = make_trainer(classifier(std=2.0), tmp_path)  # large router weights: each token picks its own experts
    RouterCallback.add_to(trainer)
    trainer.train()
    assert logged(trainer)[-1]["router_token_dependence"] > 0.5
    (message,) = [message for message in caplog.messages if "merge" in message.lower()]
    assert "calibrated" in message and "expert_mixing='ema'" in message


def test_healthy_routers_are_not_reported(tmp_path, caplog):
    trainer = make_trainer(classifier(num_experts_per_tok=4), tmp_path)  # no choice: tokens differ a little
    RouterCallback.add_to(trainer)
    trainer.train()
    assert caplog.messages == []


@pytest.mark.parametrize("changes", [{"ffn_modulation": "none"}, {"expert_mixing": "ema"}, {"num_experts": 1}])
def test_a_model_that_routes_no_tokens_gets_one_sentence(changes, tmp_path, caplog):
    if "num_experts" in changes:
        changes["num_experts_per_tok"] = 1
    model = classifier(**changes)
    trainer = make_trainer(model, tmp_path, [RouterCallback()])
    trainer.train()
    assert caplog.messages == [
        "RouterCallback has nothing to log: the model has no router that is trained to route tokens."
    ]
    assert not MEASURES & set(logged(trainer)[0])
    assert RouterCallback.add_to(make_trainer(model, tmp_path)) is None


def test_reporters_that_come_first_are_named(tmp_path, caplog):
    trainer = make_trainer(classifier(), tmp_path, [RouterCallback()], report_to="tensorboard", max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert any("RouterCallback.add_to(trainer)" in message for message in caplog.messages)
    assert MEASURES <= set(logged(trainer)[0])


def test_both_kinds_of_router_are_found():
    (native,) = find_routed_models(classifier(router_per_depth=True))
    assert native.names == ["layer 2", "layer 3", "layer 4", "layer 5"] and not native.is_adapter
    (adapter,) = find_routed_models(adapted(num_experts_per_tok=3))
    assert len(adapter.names) == 2 and adapter.num_experts_per_tok == 3
    assert find_routed_models(adapted(expert_mixing="uniform")) == []


# --- routers' own learning rate


def rates(trainer) -> dict[bool, list[float]]:
    """Learning rates seen at each step, of routers (True) and the rest."""
    seen = {True: [], False: []}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            for is_router in seen:
                values = {g["lr"] for g in optimizer.param_groups if bool(g.get("is_router")) is is_router}
                seen[is_router] += values

    trainer.add_callback(Recorder())
    trainer.train()
    return seen


@pytest.mark.parametrize("make_model", [classifier, adapted])
def test_routers_learn_at_their_own_rate(make_model, tmp_path):
    trainer = make_trainer(
        make_model(),
        tmp_path,
        trainer_class=LengthGroupedTrainer,
        arguments_class=TaskTrainingArguments,
        router_learning_rate=1e-5,
        router_warmup_steps=2,
        warmup_steps=0,
        lr_scheduler_type="constant",
    )
    seen = rates(trainer)
    assert seen[False] == pytest.approx([1e-4] * 4)
    assert seen[True] == pytest.approx([0, 0.5e-5, 1e-5, 1e-5])
    routers = {id(p) for name, p in trainer.model.named_parameters() if "mol_router" in name and p.requires_grad}
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups if group.get("is_router") for p in group["params"]} == routers
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, trained))


def test_without_these_arguments_the_optimizer_is_as_it_was(tmp_path):
    trainer = make_trainer(
        classifier(), tmp_path, trainer_class=LengthGroupedTrainer, arguments_class=TaskTrainingArguments
    )
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "changes, schedule, said",
    [
        ({"ffn_modulation": "none"}, "linear", "no router"),
        ({"expert_mixing": "uniform"}, "linear", "no router"),
        ({}, "reduce_lr_on_plateau", "ReduceLROnPlateau"),
    ],
)
def test_router_arguments_that_cannot_be_heeded_are_refused(changes, schedule, said, tmp_path):
    trainer = make_trainer(
        classifier(**changes),
        tmp_path,
        trainer_class=LengthGroupedTrainer,
        arguments_class=TaskTrainingArguments,
        router_warmup_steps=2,
        lr_scheduler_type=schedule,
        eval_strategy="steps",
        load_best_model_at_end=False,
    )
    with pytest.raises(UserError, match=said):
        trainer.create_optimizer()
        trainer.create_scheduler(4)


def test_bad_router_arguments(tmp_path):
    with pytest.raises(ValueError, match="--router_learning_rate 0 is not allowed: it must be above 0"):
        TaskTrainingArguments(output_dir=str(tmp_path), router_learning_rate=0)
    with pytest.raises(ValueError, match="--router_warmup_steps -1 is not allowed: it must be at least 0"):
        TaskTrainingArguments(output_dir=str(tmp_path), router_warmup_steps=-1)
