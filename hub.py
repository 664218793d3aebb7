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
"""A complete Hub folder: weights, configuration, code, tokenizer and card, loadable with `trust_remote_code` alone."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.export.hub_folder import EXPORTED, export_to_hub_folder, load_model, load_tokenizer, push_folder


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ExportArguments:
    """Write a ModernALBERT as a complete Hub folder: weights, code, configuration, tokenizer, card."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a ModernALBERT."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears when it is complete."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    card: str | None = field(default=None, metadata={"help": "A file to be README.md; default: one from the config."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the folder to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to upload to, e.g. me/my-model."})


def main() -> None:
    (arguments,) = parse_arguments(ExportArguments, description=ExportArguments.__doc__)
    check_replaceable(arguments.output_dir, EXPORTED)
    if arguments.push_to_hub and not arguments.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id.")
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype} is not allowed: it must be {', '.join(DTYPES)}.")
    card = None
    if arguments.card is not None:
        if not Path(arguments.card).is_file():
            raise UserError(f"--card {arguments.card}: no such file.")
        card = Path(arguments.card).read_text("utf-8")
    model = load_model(arguments.model_name_or_path).to(getattr(torch, arguments.dtype))
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        logger.warning("No tokenizer found beside the model: the folder will have none.")
    folder = export_to_hub_folder(model, tokenizer, arguments.output_dir, card, arguments.hub_model_id)
    print(f"Written to {folder}")
    if arguments.push_to_hub:
        push_folder(folder, arguments.hub_model_id)
        print(f"Uploaded to {arguments.hub_model_id}")


def command() -> None:
    """Entry point of `modernalbert-export`."""
    run(main)


if __name__ == "__main__":
    command()
