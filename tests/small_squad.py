# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A few real questions in SQuAD's format, with and without answers."""

import json
from pathlib import Path


# Context, and its questions with their answer; None: the context has none.
PARAGRAPHS = [
    (
        "The lighthouse of Falk was built in 1871 by the engineer Ida Brandt. It stands on a rock of red granite, "
        "thirty metres above the sea, and was lit with whale oil until 1902.",
        [
            ("When was the lighthouse built?", "1871"),
            ("Who built the lighthouse of Falk?", "Ida Brandt"),
            ("What does the lighthouse stand on?", "a rock of red granite"),
            ("Who painted the lighthouse?", None),
        ],
    ),
    (
        "Marmots sleep through the winter for about seven months. While they sleep, their hearts beat only four times "
        "a minute, and they live on the fat that they have eaten in summer.",
        [
            ("How long do marmots sleep?", "about seven months"),
            ("How often do their hearts beat?", "four times a minute"),
            ("What do marmots eat in spring?", None),
        ],
    ),
    (
        "In the café “Zum Löwen” in Zürich, the composer Jean Müller wrote his second symphony, which he called "
        "“Höhenluft”. The naïve melody of the first movement comes from a shepherd's song.",
        [
            ("Where did Müller write his symphony?", "the café “Zum Löwen”"),
            ("What is the name of the symphony?", "Höhenluft"),
            ("Where does the melody come from?", "a shepherd's song"),
            ("Who conducted the symphony?", None),
        ],
    ),
    (
        "Bread rises because yeast eats sugar and gives off gas. Salt slows the yeast down, so bakers add it late. "
        "Sourdough needs no yeast from a shop: its own comes from the flour.",
        [
            ("Why does bread rise?", "yeast eats sugar and gives off gas"),
            ("What slows the yeast down?", "Salt"),
            ("Which temperature does the oven need?", None),
        ],
    ),
]


def squad_content(repeat: int = 1, with_answers: bool = True, version_2: bool = True) -> dict:
    """
    The official form: one article per paragraph.

    Args:
        repeat: How often each question is there, with ids of its own.
        with_answers: False leaves the field "answers" out, as in a file to predict.
        version_2: False leaves out the questions that have no answer, and the field "is_impossible".
    """
    articles = []
    for i, (context, questions) in enumerate(PARAGRAPHS):
        entries = []
        for j, (question, answer) in enumerate(questions * repeat):
            if answer is None and not version_2:
                continue
            entry = {"id": f"{i}-{j}", "question": question}
            if with_answers:
                entry["answers"] = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
                if version_2:
                    entry["is_impossible"] = answer is None
            entries.append(entry)
        articles.append({"title": f"Article {i}", "paragraphs": [{"context": context, "qas": entries}]})
    return {"version": "v2.0" if version_2 else "1.1", "data": articles}


def write_squad(file: Path, content: dict | None = None, **how) -> Path:
    """Write the content, or what `squad_content` makes of `how`."""
    file.write_text(json.dumps(squad_content(**how) if content is None else content), encoding="utf-8")
    return file
