# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The contract that every task script keeps: fine-tune, resume, merge, overwrite, refuse, explain itself."""

import importlib
import json
import stat
from dataclasses import dataclass

import datasets
import pytest
from safetensors.torch import load_file, save_file
from small_models import tiny_model
from small_squad import write_squad
from transformers import BertConfig, BertModel

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.finetuning.run_folder import checkpoint_to_resume, remove_earlier_run


TEXTS = ["A delight from start to end .", "Dull and far too long .", "Funny , warm and wise .", "A mess ."]


@dataclass(frozen=True)
class Script:
    """
    A task script.

    Attributes:
        name: Of its module.
        arguments: What it needs to train and evaluate; "{place}" stands for the folder of the fixture `place`.
    """

    name: str
    arguments: tuple[str, ...]

    @property
    def entry_point(self):
        return importlib.import_module(f"modernalbert.{self.name}").command

    def options(self, place, out, *more) -> list[str]:
        """The arguments of a quick run; those in `more` take the place of the same ones here."""
        quick = {
            "--model_name_or_path": place / "model",
            "--output_dir": out,
            "--per_device_train_batch_size": 4,
            "--max_steps": 8,
            "--logging_steps": 1,
            "--disable_tqdm": "true",
            "--max_seq_length": 32,
        }
        words = [word for flag, value in quick.items() if flag not in more for word in (flag, value)]
        own = [word.replace("{place}", str(place)) for word in self.arguments]
        own = [w for flag, value in zip(own[::2], own[1::2]) if flag not in more for w in (flag, value)]
        return [str(word) for word in (*own, *words, *more)]


SCRIPTS = [
    Script("run_glue", ("--train_file", "{place}/train.jsonl", "--validation_file", "{place}/validation.jsonl")),
    Script("run_ner", ("--train_file", "{place}/train.conll", "--validation_file", "{place}/validation.conll")),
    Script(
        "run_squad",
        ("--train_file", "{place}/squad.json", "--validation_file", "{place}/squad.json", "--doc_stride", "8"),
    ),
    Script("run_retrieval", ("--train_file", "{place}/pairs.jsonl", "--evaluation_folders", "{place}/set")),
]


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.name)
def script(request) -> Script:
    if request.param.name == "run_retrieval":
        pytest.importorskip("pytrec_eval")
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory, nano_tokenizer):
    """A small model with nano's vocabulary, and files for every script."""
    place = tmp_path_factory.mktemp("scripts")
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(place / "model")
    nano_tokenizer.save_pretrained(place / "model")
    rows = [{"sentence": text, "label": (i + 1) % 2} for i, text in enumerate(TEXTS * 4)]
    for name, content in {"train": rows, "validation": rows[:4]}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        lines = ("Anna B-PER\nmet O\nLee B-PER\n\nRome B-LOC\nis O\nold O\n\n") * (len(content) // 2)
        (place / f"{name}.conll").write_text(lines)
    write_squad(place / "squad.json")
    (place / "set/qrels").mkdir(parents=True)
    documents = [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(TEXTS)]
    (place / "set/corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (place / "set/queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (place / "set/qrels/test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(4)))
    pairs = [{"anchor": f"{number} {text}", "positive": text} for number in "abcd" for text in TEXTS]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def log_of(out) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def test_fine_tune_merge_refuse_to_repeat_and_overwrite(command, script, place, tmp_path):
    out = tmp_path / "out"
    code, _, error = command(script.entry_point, *script.options(place, out, "--merge_after", "ema"))
    assert code == 0, error
    results = json.loads((out / "all_results.json").read_text())
    assert any(name.startswith("merged_") for name in results) and "train_loss" in results
    for part in ("modeling_modernalbert.py", "tokenizer.json", "merged/folded/model.safetensors", "merged/adapter"):
        assert (out / part).exists(), part
    report = json.loads((out / "merged/merge_report.json").read_text())
    assert set(report["metrics"]) == {"routed", "merged"}
    mode = stat.S_IMODE((out / "config.json").stat().st_mode)
    for file in ("model.safetensors", "merged/folded/model.safetensors", "merged/adapter/adapter_model.safetensors"):
        assert stat.S_IMODE((out / file).stat().st_mode) == mode, file

    code, _, error = command(script.entry_point, *script.options(place, out))
    assert code == 2 and "holds a finished run" in error
    (out / "thesis.tex").write_text("years of work")
    (out / "checkpoint-99").mkdir()
    wrong = ["--model_name_or_path", place / "nothing", "--overwrite_output_dir"]
    code, _, error = command(script.entry_point, *script.options(place, out, *wrong))
    assert code == 2 and (out / "checkpoint-99").exists()  # a mistyped model costs nothing
    code, _, error = command(script.entry_point, *script.options(place, out, "--overwrite_output_dir"))
    assert code == 0, error
    assert (out / "thesis.tex").exists() and not (out / "checkpoint-99").exists() and not (out / "merged").exists()


def test_an_interrupted_run_continues_from_its_last_whole_checkpoint(command, script, place, tmp_path, caplog):
    out = tmp_path / "out"
    options = script.options(place, out, "--save_steps", 3, "--save_total_limit", 5, "--no_load_best_model_at_end")
    code, _, error = command(script.entry_point, *options)
    assert code == 0, error
    whole = json.loads((out / "all_results.json").read_text())
    losses = [entry["loss"] for entry in log_of(out) if "loss" in entry]
    # as if cut off while checkpoint-8 was written
    (out / "all_results.json").unlink()
    (out / "checkpoint-8/trainer_state.json").unlink()
    caplog.clear()
    code, _, error = command(script.entry_point, *options)
    assert code == 0, error
    assert "checkpoint-8 was cut off" in caplog.text and f"Continuing from {out / 'checkpoint-6'}" in caplog.text
    again = json.loads((out / "all_results.json").read_text())
    for name, value in whole.items():
        if not any(word in name for word in ("runtime", "second", "flos", "train_loss")):
            assert again[name] == pytest.approx(value, abs=1e-4), name
    assert [entry["loss"] for entry in log_of(out) if "loss" in entry] == pytest.approx(losses, abs=1e-4)
    # other rows do not go on from there
    (out / "all_results.json").unlink()
    code, _, error = command(script.entry_point, *options, "--max_train_samples", 7)
    assert code == 2 and "was run with max_train_samples None instead of 7: choose another folder" in error


@pytest.mark.parametrize(
    "given, evaluations, checkpoints",
    [
        (["--save_strategy", "no"], 0, 0),
        (["--save_strategy", "steps", "--save_steps", "4", "--load_best_model_at_end"], 2, 2),
        (["--eval_strategy", "steps", "--eval_steps", "2"], 4, 4),
        (["--eval_steps", "4", "--save_strategy", "no"], 2, 0),
    ],
)
def test_what_is_said_of_evaluation_and_saving_wins(command, script, place, tmp_path, given, evaluations, checkpoints):
    out = tmp_path / "out"
    code, _, error = command(script.entry_point, *script.options(place, out, "--save_total_limit", 9, *given))
    assert code == 0, error
    steps = {entry["step"] for entry in log_of(out)[:-1] if any(name.startswith("eval_") for name in entry)}
    if given[:2] == ["--save_strategy", "no"] and script.name != "run_retrieval":
        evaluations = len(steps)  # every epoch, however many those are
        assert steps
    assert len(steps) == evaluations and len(list(out.glob("checkpoint-*"))) == checkpoints
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert (best is not None) == bool(checkpoints)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--save_strategy", "no", "--load_best_model_at_end"], "no checkpoints are saved (--save_strategy no)."),
        (["--no_do_eval", "--eval_strategy", "steps"], "--no_do_eval and --eval_strategy steps contradict each other"),
        (["--model_name_or_path", "{tmp}/nothing"], "--model_name_or_path {tmp}/nothing cannot be loaded"),
        (["--expert_mixing", "mean"], "--expert_mixing mean is not allowed"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 is not allowed"),
        (["--report_to", "elsewhere"], "--report_to elsewhere is not allowed"),
        (["--merge_after", "mean"], "--merge_after mean is not allowed"),
        (["--merge_after", "0.5,0.5"], "must be 4 numbers"),
        (["--train_file", "{tmp}/nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--metric_for_best_model", "bleu"], "--metric_for_best_model bleu is not allowed"),
        (["--max_train_samples", "0"], "--max_train_samples 0 is not allowed"),
        (["--resume_from_checkpoint", "{place}/model"], "is not a checkpoint"),
        (["--output_dir", "{place}/train.jsonl"], "is a file"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
        (["--max_steps", "many"], "invalid int value"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(command, script, place, tmp_path, arguments, message):
    def fill(word: str) -> str:
        return word.replace("{tmp}", str(tmp_path)).replace("{place}", str(place))

    before = sorted(place.iterdir())
    code, _, error = command(script.entry_point, *script.options(place, tmp_path / "out", *map(fill, arguments)))
    assert code == 2 and fill(message) in error, error
    assert not (tmp_path / "out").exists() and sorted(place.iterdir()) == before


def test_weights_that_are_missing_in_a_checkpoint_are_named(command, script, place, tmp_path, nano_tokenizer):
    """A file that lacks an encoder's matrix, or has one of another shape, would be trained from random weights."""
    folder = tmp_path / "broken"
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522).save_pretrained(folder)
    nano_tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.groups.1.attn.Wqkv.weight"
    for changed in ({k: v for k, v in weights.items() if k != name}, weights | {name: weights[name][:6].clone()}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        options = script.options(place, tmp_path / "out", "--model_name_or_path", folder)
        code, _, error = command(script.entry_point, *options)
        assert code == 2 and "lacks weights" in error and "groups.1.attn.Wqkv.weight" in error, error


def test_outputs_of_nan_are_not_evaluated(command, script, place, tmp_path):
    """They would count as predictions: of the first label, of no entity, of no answer."""
    diverge = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", 4, "--save_strategy", "no"]
    code, _, error = command(script.entry_point, *script.options(place, tmp_path / "out", *diverge))
    assert code == 2 and "hold NaN" in error, error
    assert not (tmp_path / "out/all_results.json").exists()


def test_a_checkpoint_that_the_user_renamed_is_left_alone(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert checkpoint_to_resume(tmp_path, None) == str(tmp_path / "checkpoint-10")
    remove_earlier_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


def test_a_folder_without_a_tokenizer_is_named(command, script, place, tmp_path):
    """transformers makes a BERT tokenizer that knows no words of it, to which every text is the same."""
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    options = script.options(place, tmp_path / "out", "--model_name_or_path", tmp_path / "bert")
    code, _, error = command(script.entry_point, *options)
    assert code == 2 and "bert holds no tokenizer" in error, error


def test_the_script_explains_itself_and_reads_arguments_from_a_file(command, script, place, tmp_path):
    code, output, _ = command(script.entry_point, "--help")
    assert code == 0 and "--model_name_or_path" in output and "--no_load_best_model_at_end" in output
    words = script.options(place, tmp_path / "out", "--save_strategy", "no", "--max_steps", 1)
    values = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2])}
    (tmp_path / "arguments.json").write_text(json.dumps(values | {"load_best_model_at_end": None, "bf16": False}))
    code, _, error = command(script.entry_point, tmp_path / "arguments.json")
    assert code == 0, error
    assert not list((tmp_path / "out").glob("checkpoint-*"))
