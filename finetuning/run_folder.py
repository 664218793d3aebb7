# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Output folders of runs: which may be used, where to continue, and the settings kept in them."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from modernalbert.cli.errors import UserError
from modernalbert.cli.output_folders import check_writable


logger = logging.getLogger(__name__)

# Files of a run beside the model's, which a later run may delete.
EARLIER_RUN = ("checkpoint-[0-9]*", "*_results.json", "trainer_state.json")


def is_named(resume: str | None) -> bool:
    """Return whether --resume_from_checkpoint names a checkpoint."""
    return resume is not None and resume.lower() not in ("true", "false")


def is_inside(path: str | Path, folder: Path) -> bool:
    return folder.resolve() in Path(path).resolve().parents


def check_output_dir(folder: Path, overwrite: bool, resume: str | None) -> None:
    """Refuse an output folder or a checkpoint that cannot be used. Changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file.")
    check_writable(folder)
    if is_named(resume):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {resume} is not a checkpoint (it holds no trainer_state.json).")
        if overwrite and is_inside(resume, folder):
            raise UserError(f"--overwrite_output_dir would delete the checkpoint to resume, {resume}.")
    continues = is_named(resume) and is_inside(resume, folder)
    if (folder / "all_results.json").is_file() and not overwrite and not continues:
        raise UserError(f"--output_dir {folder} holds a finished run; choose another, or add --overwrite_output_dir.")


def remove_earlier_run(folder: Path, patterns: Sequence[str] = EARLIER_RUN) -> None:
    """Delete an earlier run's checkpoints and results, and nothing else that may lie in the folder."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def checkpoint_to_resume(folder: Path, resume: str | None) -> str | None:
    """
    Find where to continue: the newest whole checkpoint in the folder, if there is one, else the checkpoint named.

    A named checkpoint inside the folder is used even if a newer one exists. One from elsewhere is the start of a
    branch, which continues from its own checkpoints.
    """
    if is_named(resume) and is_inside(resume, folder):
        return resume
    if (resume or "true").lower() == "false":
        return None
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    steps = {path: int(step) for path, step in steps.items() if step.isdecimal()}  # "checkpoint-best" is the user's
    for checkpoint in sorted(steps, key=steps.get, reverse=True):
        # Trainer writes its state last.
        if (checkpoint / "trainer_state.json").is_file():
            logger.warning(f"Continuing from {checkpoint}.")
            return str(checkpoint)
        logger.warning(f"{checkpoint} was cut off while it was written: passed over.")
    return resume if is_named else None


SETTINGS_FILE = "run_settings.json"
# Options that may change from one start of a run to the next.
IGNORED_ARGUMENTS = (
    "overwrite_output_dir",
    "seeds",
    "trust_remote_code",
    "attn_implementation",
    "encode_processes",
    "mini_batch_size",
)


def run_inputs(model_arguments, data_arguments) -> dict:
    """Return the options that say what is trained and on what, as JSON gives them back."""
    values = vars(model_arguments) | vars(data_arguments)
    return json.loads(json.dumps({name: value for name, value in values.items() if name not in IGNORED_ARGUMENTS}))


def diff_settings(folder: Path, settings: dict) -> str:
    """Say how the settings kept in a folder differ from these; "" if they do not, or none are kept."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return ""
    earlier = json.loads(file.read_text("utf-8"))
    other = [name for name, value in settings.items() if earlier.get(name, value) != value]
    return ", ".join(f"{name} {earlier[name]} instead of {settings[name]}" for name in other)


def check_settings(folder: Path, settings: dict) -> None:
    """Refuse to go on in a folder that keeps other settings."""
    if message := diff_settings(folder, settings):
        raise UserError(f"{folder} was run with {message}: choose another folder, or add --overwrite_output_dir.")


def save_settings(folder: Path, settings: dict) -> None:
    """Write the settings of a run into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
