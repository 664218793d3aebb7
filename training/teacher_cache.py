# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Cache of a teacher's outputs on disk: it answers once per sequence, not once per pass and per student."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from modernalbert.cli.errors import UserError
from modernalbert.data.corpus import TokenizedCorpus

from .distillation import Teacher, TeacherOutputs


CACHE_MANIFEST = "teacher.json"


class CachedTeacher:
    """
    A teacher on clean text, whose answers are stored in half precision the first time and read afterwards.

    The folder holds memory-mapped arrays: `known.npy` (sequences,), `pooled.npy` (sequences, d_t) and
    `hidden_STATE.npy` (tokens, d_t) for each state that is wanted, 2 bytes a number; on most file systems, what no
    sequence has filled takes no space. Processes of one machine may share it.

    Args:
        teacher: Answers for sequences that are not known yet; without logits, which depend on the masks.
        corpus: The prepared corpus that the rows come from.
        folder: Of the cache; made if it is not there.

    Raises:
        UserError: the folder is of another teacher, corpus or choice of states.
    """

    def __init__(self, teacher: Teacher, corpus: TokenizedCorpus, folder: str | Path):
        self.teacher, self.folder = teacher, Path(folder)
        config = teacher.config
        states = sorted({state for _, state in teacher.layer_map}) if config.hidden_weight else []
        width = teacher.model.config.hidden_size
        manifest = {
            "teacher": fingerprint(teacher.model),
            "width": width,
            "states": states,
            "pooled": bool(config.pooled_weight),
            "corpus": {key: corpus.manifest[key] for key in ("vocabulary", "max_seq_length", "inputs", "sources")},
        }
        # The corpus as JSON gives it back.
        manifest = json.loads(json.dumps(manifest))
        shapes = {"known": ((len(corpus),), np.uint8)}
        if config.pooled_weight:
            shapes["pooled"] = (len(corpus), width), np.float16
        shapes |= {f"hidden_{state}": ((corpus.num_tokens, width), np.float16) for state in states}
        path = self.folder / CACHE_MANIFEST
        if path.is_file():
            if json.loads(path.read_text("utf-8")) != manifest:
                raise UserError(f"{folder}: the cache is of another teacher, corpus or choice of layers.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            for array, (shape, dtype) in shapes.items():
                np.lib.format.open_memmap(self.folder / f"{array}.npy", mode="w+", shape=shape, dtype=dtype).flush()
            path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        self.arrays = {array: np.load(self.folder / f"{array}.npy", mmap_mode="r+") for array in shapes}
        self.starts = np.cumsum(corpus.lengths) - corpus.lengths
        self.lengths = corpus.lengths

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sequence_indices: torch.Tensor,
    ) -> TeacherOutputs:
        """
        Answer as `Teacher` does, for clean text.

        Args:
            sequence_indices: (rows, length), the corpus's number of the sequence of each token; -1 for padding.
        """
        firsts = attention_mask.bool() & (position_ids == 0)
        sequences = sequence_indices[firsts].cpu().numpy()
        tokens = np.concatenate([np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in sequences])
        if not self.arrays["known"][sequences].all():
            outputs = self.teacher(input_ids, position_ids, attention_mask)
            if outputs.pooled is not None:
                self.arrays["pooled"][sequences] = outputs.pooled.half().cpu().numpy()
            for (_, state), values in zip(self.teacher.layer_map, outputs.hidden_states):
                self.arrays[f"hidden_{state}"][tokens] = values.half().cpu().numpy()
            # Last: what is marked as known is there.
            self.arrays["known"][sequences] = 1
        device = input_ids.device

        def read(array: str, places: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(self.arrays[array][places]).to(device)

        hidden = self.teacher.layer_map if self.teacher.config.hidden_weight else ()
        return TeacherOutputs(
            hidden_states=tuple(read(f"hidden_{state}", tokens) for _, state in hidden),
            pooled=read("pooled", sequences) if "pooled" in self.arrays else None,
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of the weights as bfloat16, so that a teacher has the same in float32 and in half precision."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        values = values.to(torch.bfloat16) if values.is_floating_point() else values
        digest.update(name.encode())
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
