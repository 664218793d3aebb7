# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""ONNX files beside a model, checked against PyTorch on text before they are written."""

import contextlib
import copy
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.output_folders import atomic_folder
from modernalbert.export.hub_folder import OUTPUT_FILES, write_model_folder
from modernalbert.export.plain_model import check_unwrapped


QUANTIZATIONS = ("int8",)
MODEL_FILE, QUANTIZED_FILE, REPORT_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/report.json"
# Largest difference from PyTorch in float32, relative to the largest output where that is above 1.
TOLERANCE = 1e-4
LONGEST_TEXT = 512
CHECK_TEXTS = (
    "The river was high after three days of rain, and the ferry did not run.",
    "No.",
    "She opened the letter at once: her brother had found work in Lisbon and would not be home before spring.",
    "Prices rose by 2.4 % in May, a little less than the bank had expected.",
    "What makes a good bread? Time, mostly; flour, water and salt do the rest.",
    "The committee heard four witnesses, none of whom agreed with the others about what had been said on the night "
    "when the contract was signed, who had been in the room, or why the second page was missing from the copy that was "
    "sent to the court the next morning.",
    "It is a slow film with a wonderful ending.",
    "Copper conducts heat better than iron does.",
)


@dataclass
class OnnxReport:
    """
    Comparison of the ONNX files with the model in PyTorch, in float32.

    Attributes:
        texts: Number of texts compared.
        largest_difference: Between the outputs of `model.onnx` and of PyTorch, at real tokens.
        quantized_measure: What `quantized_agreement` is: the share of equal predictions, or the mean cosine of
            mean-pooled token states.
        quantized_agreement: Of `model_quantized.onnx` with PyTorch; None without that file.
        megabytes, quantized_megabytes: Sizes of the files.
    """

    texts: int
    largest_difference: float
    megabytes: float
    quantized_measure: str | None = None
    quantized_agreement: float | None = None
    quantized_megabytes: float | None = None

    def to_markdown(self) -> str:
        """Format a section for a model card."""
        lines = [
            "## ONNX",
            "",
            f"`{MODEL_FILE}` ({self.megabytes:.1f} MB, float32, any batch size and length): its outputs differ from "
            f"PyTorch's by at most {self.largest_difference:.1e} on {self.texts} texts.",
        ]
        if self.quantized_agreement is not None:
            lines.append(
                f"`{QUANTIZED_FILE}` ({self.quantized_megabytes:.1f} MB, int8 weights): {self.quantized_measure} "
                f"{self.quantized_agreement:.4f} on these texts."
            )
        return "\n".join(lines) + "\n"


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    quantize: str | None = None,
    texts: Sequence[str] | None = None,
    **folder_options,
) -> OnnxReport:
    """
    Write a model folder with `onnx/model.onnx`, as optimum, sentence-transformers and transformers.js read it.

    The graph takes `input_ids` and `attention_mask`, int64 (batch, sequence), of any batch size and length (with a
    choices axis after the batch for multiple choice), and gives `last_hidden_state`, `logits`, or `start_logits` and
    `end_logits`, float32. Before anything is written, its outputs are compared with the model's on text.

    Args:
        model: A ModernALBERT, routed or not, or a ModernBERT, with or without a head. It is not changed.
        tokenizer: Its tokenizer; None compares on token ids drawn at random.
        folder: Where to write, as in `export_to_hub_folder`.
        quantize: "int8" writes `onnx/model_quantized.onnx` as well (weights int8 by output channel, activations int8 as
            they come; routers stay float32).
        texts: What to compare on; None takes eight texts of this module.
        folder_options: Other arguments of `export_to_hub_folder`.

    Returns:
        The comparison, also in `onnx/report.json` and the card.

    Raises:
        ValueError: `quantize` is not allowed, a package is missing, the model is quantised or wears an adapter, or the
            outputs differ.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize={quantize!r} is not allowed: it must be None or {', '.join(QUANTIZATIONS)}.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: run `pip install 'modernalbert[export]'`.")
    check_unwrapped(model)
    reference = copy.deepcopy(model).float().eval()
    batches = _make_batches(reference, tokenizer, list(texts or CHECK_TEXTS))
    with atomic_folder(folder, replaceable=OUTPUT_FILES) as temporary:
        (temporary / "onnx").mkdir()
        _write_graph(reference, batches[-1], temporary / MODEL_FILE)
        difference = _largest_difference(reference, temporary / MODEL_FILE, batches)
        report = OnnxReport(
            texts=sum(len(batch["input_ids"]) for batch in batches),
            largest_difference=difference,
            megabytes=(temporary / MODEL_FILE).stat().st_size / 1e6,
        )
        if quantize is not None:
            _quantize_graph(temporary / MODEL_FILE, temporary / QUANTIZED_FILE)
            report.quantized_measure, report.quantized_agreement = _measure_agreement(
                reference, tokenizer, temporary / QUANTIZED_FILE, batches
            )
            report.quantized_megabytes = (temporary / QUANTIZED_FILE).stat().st_size / 1e6
        (temporary / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        sections = [*folder_options.pop("sections", ()), report.to_markdown()]
        write_model_folder(model, tokenizer, temporary, Path(folder).name, sections=sections, **folder_options)
    return report


def output_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the graph's outputs."""
    if type(model).__name__.endswith("QuestionAnswering"):
        return ["start_logits", "end_logits"]
    return ["last_hidden_state" if model.base_model is model else "logits"]


class _OnnxModule(nn.Module):
    """The model with the inputs and outputs of the graph."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(outputs[name] for name in output_names(self.model))


def _write_graph(model: PreTrainedModel, batch: dict[str, torch.Tensor], file: Path) -> None:
    axes = ("batch", "choices", "length") if batch["input_ids"].dim() == 3 else ("batch", "length")
    sizes = {i: torch.export.Dim(name, min=1, max=model.config.max_position_embeddings) for i, name in enumerate(axes)}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _OnnxModule(model),
            (batch["input_ids"], batch["attention_mask"]),
            file,
            dynamo=True,
            dynamic_shapes=(sizes, sizes),
            input_names=["input_ids", "attention_mask"],
            output_names=output_names(model),
            external_data=False,
            verbose=False,
        )


def _quantize_graph(file: Path, quantized: Path) -> None:
    """
    Quantize to int8 by onnxruntime's dynamic quantization.

    The graph is folded first: weights that reach their MatMul through a Transpose would be quantized in every run. The
    exporter's shapes contradict those of the folded graph and are removed.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    model = onnx.load(file)
    del model.graph.value_info[:]
    _replace_transposed_gemms(model.graph)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch, _quiet():
        plain, folded = Path(scratch) / "plain.onnx", Path(scratch) / "folded.onnx"
        onnx.save(model, plain)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantize_dynamic(
            folded,
            quantized,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=_router_nodes(model.graph),
        )


def _replace_transposed_gemms(graph) -> None:
    """
    Write each Gemm with a transposed weight as Transpose, MatMul and Add.

    onnxruntime's quantizer transposes the weight of each such Gemm in place: one that several layers share, as the
    layers of a group do, would be transposed several times.
    """
    from onnx import helper

    nodes, transposed = [], {}
    for node in graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        is_linear = node.op_type == "Gemm" and attributes.get("transB") and not attributes.get("transA")
        if not is_linear or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        if weight not in transposed:
            transposed[weight] = f"{weight}_transposed"
            nodes.append(helper.make_node("Transpose", [weight], [transposed[weight]], perm=[1, 0]))
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [x, transposed[weight]], [product], name=node.name))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], list(node.output), name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def _router_nodes(graph) -> list[str]:
    """
    Return names of the nodes that multiply by a router's weight, directly or by way of nodes that only rearrange it.
    """
    makers = {output: node for node in graph.node for output in node.output}

    def origin(name: str) -> str:
        while name in makers and makers[name].op_type in ("Transpose", "Gather", "Slice", "Squeeze", "Reshape"):
            name = makers[name].input[0]
        return name

    multiplying = (node for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    return [node.name for node in multiplying if "mol_router" in origin(node.input[1])]


def run_onnx(file: Path, batches: Sequence[dict[str, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Run an ONNX file on each batch, on the CPU, and return its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in batches:
        inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        yield tuple(map(torch.from_numpy, session.run(None, inputs)))


@torch.no_grad()
def _run_torch(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> Iterator[tuple]:
    module = _OnnxModule(model)
    for batch in batches:
        yield module(batch["input_ids"], batch["attention_mask"])


def _largest_difference(model: PreTrainedModel, file: Path, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Over all outputs at real tokens. Raises a ValueError where it is above the tolerance, or not a number."""
    largest = 0.0
    for batch, actual, expected in zip(batches, run_onnx(file, batches), _run_torch(model, batches)):
        for name, ours, theirs in zip(output_names(model), expected, actual):
            if ours.shape[: batch["attention_mask"].dim()] == batch["attention_mask"].shape:  # token by token
                ours, theirs = (x[batch["attention_mask"].bool()] for x in (ours, theirs))
            difference, scale = (ours - theirs).abs().max().item(), max(1.0, ours.abs().max().item())
            if not difference <= TOLERANCE * scale:
                shape = tuple(batch["input_ids"].shape)
                raise ValueError(
                    f"the ONNX graph's {name} differs from PyTorch's by {difference:.2e} (allowed: "
                    f"{TOLERANCE * scale:.2e}) on a batch of shape {shape}: nothing is written."
                )
            largest = max(largest, difference)
    return largest


def _measure_agreement(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, batches: Sequence[dict]
) -> tuple[str, float]:
    """Return what the agreement of a quantized file with PyTorch is, and its value over all batches."""
    name = type(model).__name__
    if name.endswith("MaskedLM"):
        batches = [_mask_tokens(model, tokenizer, batch) for batch in batches]
    equal, total = 0.0, 0
    for batch, actual, expected in zip(batches, run_onnx(file, batches), _run_torch(model, batches)):
        mask = batch["attention_mask"]
        if model.base_model is model:
            weights = mask.unsqueeze(-1).float()
            pooled = [(x[0] * weights).sum(dim=1) for x in (actual, expected)]
            scores = nn.functional.cosine_similarity(*pooled)
        elif model.config.num_labels == 1 and name.endswith("SequenceClassification"):
            scores = -(actual[0] - expected[0]).abs().flatten()
        else:
            places = slice(None)
            if name.endswith("MaskedLM"):
                places = batch["masked"]
            elif name.endswith("TokenClassification"):
                places = mask.bool()
            hidden = [
                (x.masked_fill(mask == 0, -torch.inf) if name.endswith("QuestionAnswering") else x)[places]
                for pair in zip(actual, expected)
                for x in pair
            ]
            scores = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(hidden[::2], hidden[1::2])])
        equal, total = equal + scores.sum().item(), total + scores.numel()
    if model.base_model is model:
        measure = "mean cosine of mean-pooled states"
    elif model.config.num_labels == 1 and name.endswith("SequenceClassification"):
        measure = "minus the mean absolute difference"
    else:
        measure = f"share of equal {'masked words' if name.endswith('MaskedLM') else 'predictions'}"
    return measure, equal / max(1, total)


def _mask_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, batch: dict) -> dict:
    """Mask every fifth token of the batch, from the second on."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].bool()
    masked = torch.zeros_like(mask)
    masked[:, 1::5] = True
    masked &= mask
    mask_id = getattr(tokenizer, "mask_token_id", None)
    ids[masked] = mask_id if mask_id is not None else 0
    return batch | {"input_ids": ids, "masked": masked}


def _make_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: list[str]) -> list[dict]:
    """Make batches: one text alone, then up to eight, padded as the tokenizer pads."""
    rows = [texts[:1], *(texts[start : start + 8] for start in range(1, len(texts), 8))]
    batches = []
    for row in rows:
        if tokenizer is None:
            generator = torch.Generator().manual_seed(len(row))
            ids = torch.randint(model.config.vocab_size, (len(row), 24), generator=generator)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            longest = min(LONGEST_TEXT, model.config.max_position_embeddings)
            encoded = tokenizer(row, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if type(model).__name__.endswith("MultipleChoice"):
            batch = {name: value.unsqueeze(0) for name, value in batch.items()}
        batches.append(batch)
    return batches


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantizer's advice, which is for their own developers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
