# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a run was started with, kept in its folder: nothing goes on there, or counts as done, with other settings."""

import json
from pathlib import Path

from modernalbert.command_line import UserError


SETTINGS_FILE = "run_settings.json"
# What may change from one start to the next.
FREE = (
    "overwrite_output_dir",
    "seeds",
    "trust_remote_code",
    "attn_implementation",
    "encode_processes",
    "mini_batch_size",
)


def inputs_of(model_arguments, data_arguments) -> dict:
    """The values of two dataclasses of options that say what is trained and on what, as JSON gives them back."""
    values = vars(model_arguments) | vars(data_arguments)
    return json.loads(json.dumps({name: value for name, value in values.items() if name not in FREE}))


def other_settings(folder: Path, settings: dict) -> str:
    """How the settings kept in a folder differ from these, in words; "" if they do not, or none are kept."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return ""
    earlier = json.loads(file.read_text("utf-8"))
    other = [name for name, value in settings.items() if earlier.get(name, value) != value]
    return ", ".join(f"{name} {earlier[name]} instead of {settings[name]}" for name in other)


def refuse_other_settings(folder: Path, settings: dict) -> None:
    """Refuse to go on in a folder that keeps other settings."""
    if said := other_settings(folder, settings):
        raise UserError(f"{folder} was run with {said}: choose another folder, or add --overwrite_output_dir.")


def keep_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
