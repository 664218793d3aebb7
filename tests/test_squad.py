# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Question answering without training: files, the official metrics, spans from logits, the helper."""

import json
import string

import numpy as np
import pytest
import torch
from small_models import tiny_model
from small_squad import PARAGRAPHS, squad_content, write_squad
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from modernalbert import ModernALBERTForQuestionAnswering
from modernalbert.cli.errors import UserError
from modernalbert.data.squad import Question, read_squad, rows_to_questions
from modernalbert.evaluation.squad import best_thresholds, normalize_answer, question_scores, squad_metrics
from modernalbert.question_answering import (
    Answer,
    Windows,
    best_token_spans,
    cut_questions,
    encode_windows,
    find_answers,
    longest_question,
    question_answering,
    span_to_tokens,
)


def question(name: str, *answers: str) -> Question:
    return Question(name, "?", " ".join(answers), answers, tuple(None for _ in answers))


# --- metrics ---------------------------------------------------------------------------------------------------------

# Questions with their right answers, a prediction and its null odds: articles only, Unicode, punctuation, repeated
# words, several answers, no answer, an empty prediction.
GIVEN = [
    (question("plain", "Ida Brandt", "the engineer Ida Brandt"), "engineer Ida Brandt", -3.5),
    (question("article", "the"), "", -1.0),
    (question("article-said", "The", "a"), "an", 0.125),
    (question("article-among", "the", "the Alps"), "Alps.", -2.25),
    (question("dash", "a–b"), "b", 1.75),
    (question("quotes", "“Höhenluft”"), "Höhenluft", -0.5),
    (question("case", "ZÜRICH"), "zürich!", -4.0),
    (question("composed", "cafe\u0301"), "café", 2.5),
    (question("repeated", "yes yes no"), "no no yes", 0.75),
    (question("white", "four  times\ta minute"), "Four times a minute", -1.5),
    (question("part", "four times a minute"), "only four times", 0.375),
    (question("more", "red granite", "granite"), "a rock of red granite", 0.5),
    (question("wrong", "granite"), "whale oil", 3.0),
    (question("silent", "1871"), "", 4.5),
    (question("null-right"), "", 5.0),
    (question("null-said"), "1902", 0.25),
    (question("null-article"), "the", 1.0),
    (question("null-wrong"), "Ida Brandt", -2.0),
]
# What evaluate-v2.0.py said of the predictions and the odds (--na-prob-file, --na-prob-thresh 100), and of the
# predictions after those of odds above 0.5 were emptied.
OFFICIAL = {
    "exact": 44.44444444444444,
    "f1": 55.55555555555556,
    "total": 18,
    "HasAns_exact": 42.857142857142854,
    "HasAns_f1": 57.142857142857146,
    "HasAns_total": 14,
    "NoAns_exact": 50.0,
    "NoAns_f1": 50.0,
    "NoAns_total": 4,
    "best_exact": 50.0,
    "best_exact_thresh": 0.125,
    "best_f1": 55.55555555555554,
    "best_f1_thresh": 0.75,
}
OFFICIAL_AT_HALF = {
    "exact": 44.44444444444444,
    "f1": 51.851851851851855,
    "total": 18,
    "HasAns_exact": 42.857142857142854,
    "HasAns_f1": 52.38095238095239,
    "HasAns_total": 14,
    "NoAns_exact": 50.0,
    "NoAns_f1": 50.0,
    "NoAns_total": 4,
}


def given() -> tuple[list[Question], dict[str, str], dict[str, float]]:
    questions, predictions, odds = zip(*GIVEN)
    names = [q.id for q in questions]
    return list(questions), dict(zip(names, predictions)), dict(zip(names, odds))


def test_metrics_are_those_of_the_official_script():
    questions, predictions, odds = given()
    best = best_thresholds(questions, predictions, odds)
    for name in ("best_exact_thresh", "best_f1_thresh"):  # ours is halfway to the next question's
        above = min(value for value in odds.values() if value > OFFICIAL[name])
        best[name] = 2 * best[name] - above
    assert squad_metrics(questions, predictions) | best == pytest.approx(OFFICIAL)
    decided = {name: "" if odds[name] > 0.5 else text for name, text in predictions.items()}
    assert squad_metrics(questions, decided) == pytest.approx(OFFICIAL_AT_HALF)


def official_words(text: str) -> list[str]:
    """The official normalisation in other words; the same where a word is not glued to an article by a dash."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def official_scores(right: list[str], prediction: str) -> tuple[float, float]:
    said = official_words(prediction)
    exact, f1 = 0.0, 0.0
    for words in [words for words in map(official_words, right) if words] or [[]]:
        exact = max(exact, float(words == said))
        left, same = list(words), 0
        for word in said:
            if word in left:
                left.remove(word)
                same += 1
        f1 = max(f1, 2 * same / (len(words) + len(said)) if words or said else 1.0)
    return exact, f1


def test_metrics_against_an_independent_implementation():
    generator = np.random.default_rng(0)
    vocabulary = ["the", "a", "An", "Löwe", "löwe,", "1871", "U.S.", "中文", "red", "Red!", "", " "]

    def text() -> str:
        return " ".join(generator.choice(vocabulary, size=generator.integers(0, 5)))

    for _ in range(30):
        questions, predictions, odds = [], {}, {}
        for i in range(25):
            answers = [text() or "red" for _ in range(generator.integers(0, 4))]
            questions.append(question(str(i), *answers))
            predictions[str(i)] = text()
            odds[str(i)] = round(float(generator.normal()), 1)  # some are equal
        scores = [official_scores(list(q.answers), predictions[q.id]) for q in questions]
        ours = squad_metrics(questions, predictions)
        for k, name in enumerate(("exact", "f1")):
            for prefix, wanted in (("", None), ("HasAns_", True), ("NoAns_", False)):
                of = [s[k] for s, q in zip(scores, questions) if wanted in (None, bool(q.answers))]
                assert ours[prefix + name] == pytest.approx(100 * np.mean(of))
                assert ours[prefix + "total"] == len(of)
        best = best_thresholds(questions, predictions, odds)
        for k, name in enumerate(("exact", "f1")):
            reached = {}
            for threshold in {min(odds.values()) - 1, *odds.values(), best[f"best_{name}_thresh"]}:
                total = 0.0
                for q, score in zip(questions, scores):
                    silent = odds[q.id] > threshold or not predictions[q.id]
                    if q.answers:
                        total += 0.0 if odds[q.id] > threshold else score[k]
                    else:
                        total += silent
                reached[threshold] = 100 * total / len(questions)
            assert best[f"best_{name}"] == pytest.approx(max(reached.values()))
            assert reached[best[f"best_{name}_thresh"]] == pytest.approx(max(reached.values()))


def test_all_null_none_null_and_one_question():
    null, has = question("n"), question("h", "red")
    assert squad_metrics([null, has], {"n": "", "h": ""})["f1"] == 50.0
    only = squad_metrics([has], {"h": "RED."})
    assert only == {
        "exact": 100.0,
        "f1": 100.0,
        "total": 1,
        "HasAns_exact": 100.0,
        "HasAns_f1": 100.0,
        "HasAns_total": 1,
    }
    assert not any(name.startswith("HasAns") for name in squad_metrics([null], {"n": "x"}))
    # Silence everywhere is best: the threshold is below all odds.
    best = best_thresholds([null, has], {"n": "x", "h": "x"}, {"n": -5.0, "h": -4.0})
    assert best["best_f1"] == 50.0 and best["best_f1_thresh"] == -6.0
    # The null question's own answer is none; then answers everywhere are best, and the threshold is above all odds.
    best = best_thresholds([has, null], {"h": "red", "n": ""}, {"h": 7.0, "n": 8.0})
    assert best["best_f1"] == 100.0 and best["best_f1_thresh"] == 7.5
    best = best_thresholds([has, null], {"h": "red", "n": ""}, {"h": 8.0, "n": 7.0})
    assert best["best_f1"] == 100.0 and best["best_f1_thresh"] == 9.0
    # Between neighbouring doubles there is nothing: the lower, of which the upper is above.
    for low in (np.nextafter(1.0, 0.0), 1.0):
        odds = {"h": float(low), "n": float(np.nextafter(low, 2.0))}
        assert best_thresholds([has, null], {"h": "red", "n": "x"}, odds)["best_f1_thresh"] == low
    # No threshold parts equal odds.
    assert best_thresholds([has, null], {"h": "red", "n": "x"}, {"h": 1.0, "n": 1.0})["best_f1"] == 50.0


def test_normalisation_removes_ascii_punctuation_and_whole_articles_only():
    assert normalize_answer("The  U.S.A.'s theory, an “Anna”") == "usas theory “anna”"
    assert question_scores(question("q", "a red rock"), "the red, red rock") == {
        "exact": 0.0,
        "f1": pytest.approx(2 * (2 / 3) * 1.0 / (2 / 3 + 1.0)),
    }


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_and_hub_rows_give_the_same_questions(tmp_path):
    questions = read_squad(str(write_squad(tmp_path / "q.json")))
    assert len(questions) == sum(len(entries) for _, entries in PARAGRAPHS)
    for q, (context, (text, answer)) in zip(questions, [(c, entry) for c, entries in PARAGRAPHS for entry in entries]):
        assert (q.context, q.question, q.answers) == (context, text, (answer,) if answer else ())
        assert q.span is None if answer is None else context[slice(*q.span)] == answer
    rows = [
        {
            "id": q.id,
            "context": q.context,
            "question": q.question,
            "answers": {"text": list(q.answers), "answer_start": list(q.starts)},
        }
        for q in questions
    ]
    assert rows_to_questions(rows, "hub", True, True) == questions


def test_the_span_is_the_answer_given_most_often():
    context = "red or blue or red"
    assert Question("q", "?", context, ("red", "blue", "red", "blue"), (0, 7, 15, 7)).span == (7, 11)
    assert Question("q", "?", context, ("red", "blue"), (0, 7)).span == (0, 3)
    assert Question("q", "?", context, ("red", "green"), (None, None)).span is None


def test_a_file_to_predict_needs_no_answers(tmp_path):
    file = write_squad(tmp_path / "q.json", with_answers=False)
    assert {q.answers for q in read_squad(str(file), needs_answers=False)} == {None}
    with pytest.raises(
        UserError, match=r"q.json, data\[0\].paragraphs\[0\].qas\[0\]: no field 'answers'; there are id"
    ):
        read_squad(str(file))


def test_answers_that_do_not_stand_where_they_should_are_counted_or_refused(tmp_path, caplog):
    content = squad_content()
    entries = content["data"][1]["paragraphs"][0]["qas"]
    entries[0]["answers"][0]["answer_start"] += 1
    entries[1]["answers"].append({"text": "four", "answer_start": -1})
    file = str(write_squad(tmp_path / "q.json", content))
    questions = read_squad(file)
    total = sum(answer is not None for _, entries in PARAGRAPHS for _, answer in entries) + 1
    assert f"2 of {total} answers do not stand where" in caplog.text and "and 1 questions have no other" in caplog.text
    place = "data[1].paragraphs[0].qas[0].answers[0]: 'about seven months' is not at 38, there is 'bout seven months.'"
    assert f"q.json, {place}" in caplog.text
    by_id = {q.id: q for q in questions}
    assert by_id["1-0"].span is None and by_id["1-0"].answers == ("about seven months",)
    assert by_id["1-1"].span is not None and by_id["1-1"].starts[1] is None
    with pytest.raises(UserError, match=r"data\[1\].*is not at 38.*2 of 11 answers.*--strict refuses"):
        read_squad(file, strict=True)


def changed(change) -> dict:
    content = squad_content()
    change(content)
    return content


def paragraph(content: dict) -> dict:
    return content["data"][0]["paragraphs"][0]


def entry(content: dict, i: int = 0) -> dict:
    return paragraph(content)["qas"][i]


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "q.json: no such file"),
        ('{"data": [\n  {"paragraphs" 3}]}', "q.json, line 2, column 17"),
        (b'{"data": "\xff"}', "not UTF-8 text (byte 10)"),
        ([], "q.json: must be an object with the field 'data', not []"),
        ({"version": "1", "rows": []}, "q.json: no field 'data'; there are version, rows"),
        ({"data": []}, "q.json: holds no questions"),
        ({"data": 5}, "q.json: field 'data' must be a list, not 5"),
        ({"data": [7]}, "q.json, data[0]: must be an object with the field 'paragraphs', not 7"),
        (changed(lambda c: paragraph(c).pop("context")), "data[0].paragraphs[0]: no field 'context'; there are qas"),
        (changed(lambda c: paragraph(c).pop("qas")), "data[0].paragraphs[0]: no field 'qas'"),
        (changed(lambda c: entry(c).pop("id")), "paragraphs[0].qas[0]: no field 'id'"),
        (changed(lambda c: entry(c).update(question=None)), "qas[0]: field 'question' must be text, not None"),
        (changed(lambda c: entry(c).update(is_impossible="no")), "field 'is_impossible' must be true or false"),
        (changed(lambda c: entry(c).update(answers={})), "field 'answers' must be a list, not {}"),
        (changed(lambda c: entry(c)["answers"][0].pop("text")), "qas[0].answers[0]: no field 'text'"),
        (changed(lambda c: entry(c)["answers"][0].update(text=" ")), "qas[0].answers[0]: field 'text' is empty"),
        (changed(lambda c: entry(c)["answers"][0].update(answer_start="3")), "'answer_start' must be an integer"),
        (changed(lambda c: entry(c)["answers"][0].update(answer_start=True)), "must be an integer, not True"),
        (changed(lambda c: entry(c).update(is_impossible=True)), "is_impossible is true, and there are answers"),
        (
            changed(lambda c: entry(c, 3).update(is_impossible=False)),
            "is_impossible is false, and there are no answers",
        ),
        (
            changed(lambda c: entry(c, 2).update(id="0-1")),
            "qas[2]: the id '0-1' is that of {file}, data[0].paragraphs[0].qas[1] too",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path, content, said):
    file = tmp_path / "q.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        write_squad(file, content)
    with pytest.raises(UserError) as caught:
        read_squad(str(file))
    assert said.replace("{file}", str(file)) in str(caught.value), str(caught.value)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE, as ModernBERT's: its tokens hold the space before a word, and a character may be several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([context for context, _ in PARAGRAPHS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


@pytest.fixture(params=["word pieces", "bytes"])
def tokenizer(request, nano_tokenizer, byte_tokenizer):
    return nano_tokenizer if request.param == "word pieces" else byte_tokenizer


CONTEXTS = [context for context, entries in PARAGRAPHS for _ in entries] + ["A 🦊🦊 fox,  and the 🦊 again."]
QUESTIONS = [text for _, entries in PARAGRAPHS for text, _ in entries] + ["What does it eat?"]
SPANS = [
    None if answer is None else (context.index(answer), context.index(answer) + len(answer))
    for context, entries in PARAGRAPHS
    for _, answer in entries
] + [(2, 8)]


def windows_of(tokenizer, max_length=40, stride=8) -> tuple[dict, Windows]:
    limit = longest_question(tokenizer, max_length, stride)
    columns = encode_windows(tokenizer, cut_questions(tokenizer, QUESTIONS, limit)[0], CONTEXTS, max_length, stride)
    return columns, Windows.from_columns(columns)


def test_windows_cover_the_context_and_overlap(tokenizer):
    columns, windows = windows_of(tokenizer)
    assert max(map(len, columns["input_ids"])) <= 40
    for i, context in enumerate(CONTEXTS):
        rows = np.flatnonzero(windows.question == i)
        whole = tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = [columns["input_ids"][row][windows.first_token[row] :][: len(windows.token_starts[row])] for row in rows]
        assert len(rows) > 1 or i == len(CONTEXTS) - 1
        rebuilt = list(ids[0])
        for part in ids[1:]:
            assert part[:8] == rebuilt[-8:]
            rebuilt += part[8:]
        assert rebuilt == whole


def test_answers_become_tokens_and_tokens_the_same_answers(tokenizer):
    _, windows = windows_of(tokenizer, 64, 24)
    firsts, lasts = span_to_tokens(windows, SPANS)
    found = set()
    for row, (first, last) in enumerate(zip(firsts, lasts)):
        i, offset = windows.question[row], windows.first_token[row]
        starts, ends = windows.token_starts[row], windows.token_ends[row]
        whole = SPANS[i] is not None and starts[0] <= SPANS[i][0] and SPANS[i][1] <= ends[-1]
        assert (first > 0) == (last > 0) == whole
        if whole:
            text = CONTEXTS[i][starts[first - offset] : ends[last - offset]]
            assert text.strip() == CONTEXTS[i][slice(*SPANS[i])]
            # No token of the answer is left out, and none beside it taken in.
            assert first == offset or ends[first - offset - 1] <= SPANS[i][0] < ends[first - offset]
            assert last - offset == len(ends) - 1 or starts[last - offset + 1] >= SPANS[i][1]
            found.add(int(i))
    assert found == {i for i, span in enumerate(SPANS) if span is not None}


def test_a_question_longer_than_the_window_is_cut(tokenizer):
    limit = longest_question(tokenizer, 40, 8)
    assert limit == (40 - 8 - 3) // 2
    long = "who " * 100
    cut, too_long = cut_questions(tokenizer, ["Where?", long, ""], limit)
    assert too_long == [1] and cut[0] == "Where?" and cut[2] == ""
    assert len(tokenizer(cut[1], add_special_tokens=False)["input_ids"]) == limit
    columns = encode_windows(tokenizer, cut, CONTEXTS[:3], 40, 8)
    assert max(map(len, columns["input_ids"])) <= 40
    for max_length, stride in ((40, 36), (40, -1), (12, 128)):
        with pytest.raises(UserError, match=f"windows of {max_length} tokens that overlap by {stride} are not allowed"):
            longest_question(tokenizer, max_length, stride)


# --- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_best, length", [(1, 1), (3, 4), (20, 30), (500, 50)])
def test_best_spans_against_trying_all(n_best, length):
    generator = np.random.default_rng(0)
    starts, ends = generator.normal(size=(2, 12, 17)).astype(np.float32)
    starts[6:], ends[6:] = starts[6:].round(), ends[6:].round()  # many ties
    starts[:, :5] = ends[:, :5] = -np.inf
    scores, firsts, lasts = best_token_spans(starts, ends, n_best, length)
    for row in range(12):
        every = [(-(starts[row, i] + ends[row, j]), i, j) for i in range(5, 17) for j in range(i, 17) if j - i < length]
        expected = sorted(every)[:n_best]
        real = np.isfinite(scores[row])
        assert real.sum() == len(expected)
        assert scores[row][real].tolist() == [-score for score, _, _ in expected]
        # Which of equals are kept at the end of the list is open; the first is not.
        assert (firsts[row][0], lasts[row][0]) == expected[0][1:]
        assert len(set(zip(firsts[row][real], lasts[row][real]))) == len(expected)


def test_answers_from_logits_against_trying_all(tokenizer):
    generator = np.random.default_rng(1)
    _, windows = windows_of(tokenizer)
    starts, ends = generator.normal(size=(2, len(windows.question), 40)).astype(np.float32)
    answers = find_answers(CONTEXTS, windows, starts, ends, n_best=5, max_answer_length=4)
    for i, (context, answer) in enumerate(zip(CONTEXTS, answers)):
        spans: dict[tuple[int, int], float] = {}
        null = np.inf
        for row in np.flatnonzero(windows.question == i):
            null = min(null, starts[row, 0] + ends[row, 0])
            offset = windows.first_token[row]
            for a, begin in enumerate(windows.token_starts[row]):
                for b, end in list(enumerate(windows.token_ends[row]))[a : a + 4]:
                    inside = [k for k in range(begin, end) if not context[k].isspace()]
                    score = starts[row, offset + a] + ends[row, offset + b]
                    if inside:
                        span = inside[0], inside[-1] + 1
                        spans[span] = max(score, spans.get(span, -np.inf))
        best = sorted(spans.items(), key=lambda item: -item[1])
        assert len({(c.start, c.end) for c in answer.candidates}) == len(answer.candidates) <= 5
        assert [(c.start, c.end) for c in answer.candidates[:3]] == [span for span, _ in best[:3]]
        assert all(c.text == context[c.start : c.end] == c.text.strip() for c in answer.candidates)
        assert answer.null_odds == pytest.approx(null - best[0][1], abs=1e-5)
        assert answer.null_odds == pytest.approx(np.log(answer.no_answer_score / answer.candidates[0].score), abs=1e-5)
        assert answer.no_answer_score + sum(c.score for c in answer.candidates) == pytest.approx(1)


def test_a_threshold_decides_between_the_best_span_and_none():
    candidates = find_answers(
        ["red rock"],
        Windows(np.array([0]), np.array([1]), [np.array([0, 4])], [np.array([3, 8])]),
        np.array([[1.0, 2.0, 0.0]]),
        np.array([[0.5, 0.0, 3.0]]),
        n_best=20,
        max_answer_length=30,
    )[0].candidates
    assert [c.text for c in candidates] == ["red rock", "rock", "red"]
    for threshold, text in ((None, "red rock"), (-3.5, "red rock"), (-3.6, "")):
        answer = Answer(candidates, 0.1, -3.5, threshold)
        assert answer.text == text and "red rock"[answer.start : answer.end] == text
    assert answer.score == 0.1


# --- helper ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    return tiny_model(ModernALBERTForQuestionAnswering, vocab_size=30522)


def test_one_question_is_answered_as_in_a_batch(reader, nano_tokenizer):
    sizes = {"max_length": 40, "stride": 8, "null_threshold": None}
    together = question_answering(reader, nano_tokenizer, QUESTIONS, CONTEXTS, batch_size=3, **sizes)
    assert len(together) == len(QUESTIONS)
    for text, context, answer in zip(QUESTIONS, CONTEXTS, together):
        alone = question_answering(reader, nano_tokenizer, text, context, **sizes)
        assert (alone.text, alone.start, alone.end) == (answer.text, answer.start, answer.end)
        assert alone.null_odds == pytest.approx(answer.null_odds, abs=1e-4)
        assert answer.text and context[answer.start : answer.end] == answer.text
    over = [question_answering(reader, nano_tokenizer, QUESTIONS[:2], CONTEXTS[0], **sizes)]
    over.append(question_answering(reader, nano_tokenizer, QUESTIONS[:2], CONTEXTS[:1] * 2, **sizes))
    assert over[0] == over[1]


def test_the_helper_leaves_the_model_in_its_mode(reader, nano_tokenizer):
    reader.train()
    question_answering(reader, nano_tokenizer, QUESTIONS[0], CONTEXTS[0])
    assert reader.training
    reader.eval()


def test_the_answer_is_that_of_the_windows_own_logits(reader, nano_tokenizer):
    answer = question_answering(reader, nano_tokenizer, QUESTIONS[0], CONTEXTS[0], max_answer_length=5)
    encoded = nano_tokenizer(QUESTIONS[0], CONTEXTS[0], return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        output = reader(**encoded)
    start, end = output.start_logits[0], output.end_logits[0]
    first = encoded.sequence_ids(0).index(1)
    last = len(offsets) - 1
    score, i, j = max((float(start[i] + end[j]), i, j) for i in range(first, last) for j in range(i, min(last, i + 5)))
    assert (answer.candidates[0].start, answer.candidates[0].end) == (offsets[i][0], offsets[j][1])
    assert answer.null_odds == pytest.approx(float(start[0] + end[0]) - score, abs=1e-4)


def test_other_encoders_left_padding_and_empty_things(nano_tokenizer, byte_tokenizer):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertForQuestionAnswering(config).eval()
    right = question_answering(bert, nano_tokenizer, QUESTIONS, CONTEXTS)
    nano_tokenizer.padding_side = "left"
    try:
        assert [a.text for a in question_answering(bert, nano_tokenizer, QUESTIONS, CONTEXTS)] == [
            a.text for a in right
        ]
    finally:
        nano_tokenizer.padding_side = "right"
    assert question_answering(bert, nano_tokenizer, [], []) == []
    for blank in ("", "  \n"):
        answer = question_answering(bert, byte_tokenizer, "Who?", blank, null_threshold=None)
        assert (answer.text, answer.start, answer.end, answer.candidates) == ("", 0, 0, ())
        assert json.dumps(answer.null_odds) != "Infinity"
    assert question_answering(bert, nano_tokenizer, "", CONTEXTS[0], null_threshold=None).text


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"question": ["a", "b", "c"], "context": ["x", "y"]}, "3 questions and 2 contexts"),
        ({"n_best": 0}, "n_best=0 is not allowed"),
        ({"max_answer_length": 0}, "max_answer_length=0 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"stride": 400}, "windows of 384 tokens that overlap by 400 are not allowed"),
    ],
)
def test_the_helper_refuses_what_cannot_be(reader, nano_tokenizer, arguments, said):
    given = {"question": "Who?", "context": "Ida."} | arguments
    with pytest.raises(UserError, match=said):
        question_answering(reader, nano_tokenizer, **given)
