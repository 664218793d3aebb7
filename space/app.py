# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
A page to try a checkpoint: fill a mask, classify, compare sentences, and see which experts each token takes.

    pip install -e '.[space]'
    python space/app.py

It runs on this machine alone, at http://127.0.0.1:7860. All four work with the shipped checkpoint.
"""

import html
from dataclasses import dataclass, field
from pathlib import Path

import gradio
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.export.hub_folder import load_model, load_tokenizer
from modernalbert.merge_experts import merge_experts


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "modernalbert-nano"
# Longer input is refused: the page shows a cell for each token and layer.
LONGEST_INPUT, LONGEST_ROUTED_INPUT = 512, 64
# One color for each expert, told apart by people who see red and green alike.
COLORS = (
    "#88ccee #ddcc77 #e08a97 #5cbfae #d08bc6 #b5b548 #8fb3e0 #f5a184 #bbcc33 #ffaabb #aaaa00 #77aadd #eedd88 #99ddff "
    "#44bb99 #dddddd"
).split()
STYLE = """
<style>
.routing {overflow-x: auto; padding-bottom: 0.5rem}
.routing-box p {margin: 0 0 0.6rem}
.routing table {border-collapse: separate !important; border-spacing: 3px; width: auto; font-size: 0.9rem}
.routing table, .routing tr, .routing th, .routing td {border: 0 !important; white-space: nowrap}
.routing th, .routing td {padding: 4px 8px !important}
.routing th {font-weight: normal !important; text-align: left; position: sticky; left: 0; padding-left: 0 !important;
  background: var(--block-background-fill, white); color: var(--body-text-color-subdued, #555)}
.routing td {color: #111; text-align: center !important; border-radius: 4px}
.routing td.token {color: inherit; font-weight: 600}
.routing-box .legend span {color: #111; border-radius: 4px; padding: 1px 8px; margin: 0 4px 4px 0;
  display: inline-block}
</style>
"""
EXPLANATION = (
    "A cell holds the experts of one token at one layer. The first has the larger weight and gives the color. Below: "
    "the words that the routed and the merged model expect (green: the token itself), and how far the last state of "
    "the merged model is from that of the routed one."
)


@dataclass
class Demo:
    """A checkpoint, and the same with its experts merged."""

    routed: PreTrainedModel  # a masked language model
    merged: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, texts: list[str], longest: int = LONGEST_INPUT) -> dict[str, torch.Tensor]:
        """Texts -> input_ids and attention_mask (batch, sequence). Raises gradio.Error where a text is too long."""
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        if batch["input_ids"].shape[1] > longest:
            raise gradio.Error(f"This is {batch['input_ids'].shape[1]} tokens long; {longest} are allowed here.")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def fill_mask(self, text: str) -> dict[str, float]:
        """The eight likeliest words for the first mask, with their probabilities."""
        if self.tokenizer.mask_token not in text:
            raise gradio.Error(f"Write {self.tokenizer.mask_token} where a word is missing.")
        batch = self.encode([text])
        with torch.inference_mode():
            logits = self.routed(**batch).logits[0]
        place = (batch["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[0, 0]
        top = logits[place].softmax(dim=-1).topk(8)
        words = self.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        return dict(zip(words, top.values.tolist()))

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Texts -> unit vectors (texts, d): the mean of the last states."""
        batch = self.encode(texts)
        with torch.inference_mode():
            states = self.routed.base_model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * weights).sum(dim=1), dim=-1)

    def classify(self, text: str, labels: str) -> dict[str, float]:
        """Labels, one a line -> how near the text is to each: the softmax of 20 times the cosine."""
        names = list(dict.fromkeys(line.strip() for line in labels.splitlines() if line.strip()))
        if not text.strip() or len(names) < 2:
            raise gradio.Error("Write a text, and at least two labels, one a line.")
        vectors = self.embed([text, *names])
        return dict(zip(names, (20 * vectors[1:] @ vectors[0]).softmax(dim=0).tolist()))

    def compare(self, sentences: str) -> list[list]:
        """Sentences, one a line -> a table of all pairs and their cosines, the nearest first."""
        lines = [line.strip() for line in sentences.splitlines() if line.strip()]
        if not 2 <= len(lines) <= 20:
            raise gradio.Error("Write 2 to 20 sentences, one a line.")
        cosines = self.embed(lines)
        cosines = cosines @ cosines.T
        pairs = [(i, j) for i in range(len(lines)) for j in range(i)]
        pairs.sort(key=lambda pair: -cosines[pair])
        return [[round(cosines[i, j].item(), 3), lines[j], lines[i]] for i, j in pairs]

    def show_routing(self, text: str) -> str:
        """
        A table with a column for each token. Rows: the experts at each routed depth, colored by the first; what the
        routed and the merged model expect at that place; how far the merged model's state is from the routed one's.
        """
        if not text.strip():
            raise gradio.Error("Write a sentence.")
        batch = self.encode([text], LONGEST_ROUTED_INPUT)
        with torch.inference_mode():
            routed = self.routed(**batch, output_router_logits=True, output_hidden_states=True)
            merged = self.merged(**batch, output_hidden_states=True)
        config = self.routed.config
        rows = [_row("", [_cell(token, "", "token") for token in self._tokens(batch["input_ids"][0])])]
        for layer, logits in zip(_routed_layers(config), routed.router_logits or ()):
            top = logits[0].softmax(dim=-1).topk(config.num_experts_per_tok, dim=-1)
            weights = top.values / top.values.sum(dim=-1, keepdim=True)
            cells = [
                _cell(
                    " ".join(str(expert) for expert in experts),
                    _color(experts[0]),
                    title=", ".join(f"expert {e}: {w:.2f}" for e, w in zip(experts, shares)),
                )
                for experts, shares in zip(top.indices.tolist(), weights.tolist())
            ]
            rows.append(_row(f"layer {layer}, group {layer // config.group_depth}", cells))
        for name, outputs in (("routed: expects", routed), ("merged: expects", merged)):
            expected = self._tokens(outputs.logits[0].argmax(dim=-1))
            given = self._tokens(batch["input_ids"][0])
            rows.append(_row(name, [_cell(e, "#d8e8d8" if e == g else "#eeeeee") for e, g in zip(expected, given)]))
        before, after = routed.hidden_states[-1][0], merged.hidden_states[-1][0]
        errors = ((after - before).norm(dim=-1) / before.norm(dim=-1)).tolist()
        shades = [f"rgba(204, 102, 119, {min(1.0, error):.2f})" for error in errors]
        rows.append(_row("merged: difference", [_cell(f"{100 * e:.0f} %", shade) for e, shade in zip(errors, shades)]))
        legend = "".join(f'<span style="background:{_color(e)}">expert {e}</span>' for e in range(config.num_experts))
        head = f'<p class="legend">{legend}</p><p>{EXPLANATION}</p>'
        return f'{STYLE}<div class="routing-box">{head}<div class="routing"><table>{"".join(rows)}</table></div></div>'

    def _tokens(self, ids: torch.Tensor) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids.tolist())


def _routed_layers(config) -> list[int]:
    """The 0-based layers that have router logits, in their order."""
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer // config.group_depth in config.modulated_groups
        and config.is_modulated_position(layer % config.group_depth)
    ]


def _color(expert: int) -> str:
    return COLORS[expert % len(COLORS)]


def _cell(text: str, color: str, css_class: str = "", title: str = "") -> str:
    """What is shown comes from a user and a vocabulary: it is escaped."""
    return (
        f'<td class="{css_class}" style="background:{color or "none"}" title="{html.escape(title)}">'
        f"{html.escape(text)}</td>"
    )


def _row(name: str, cells: list[str]) -> str:
    return f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>"


def build_page(demo: Demo) -> gradio.Blocks:
    """The page, with an example in every field."""
    mask = demo.tokenizer.mask_token
    with gradio.Blocks(title="ModernALBERT", analytics_enabled=False) as page:
        gradio.Markdown(
            "# ModernALBERT\nA recursive encoder with a Mixture of LoRAs: "
            f"{demo.routed.config.num_hidden_layers} layers share {demo.routed.config.num_groups} sets of weights, and "
            f"each token chooses {demo.routed.config.num_experts_per_tok} of {demo.routed.config.num_experts} experts."
        )
        with gradio.Tab("Experts"):
            example = "The bank by the river raised its interest rates."
            sentence = gradio.Textbox(example, label="A sentence")
            button = gradio.Button("Show the experts", variant="primary", elem_id="show-experts")
            routing = gradio.HTML(demo.show_routing(example), elem_id="routing")
            gradio.on([button.click, sentence.submit], demo.show_routing, sentence, routing)
        with gradio.Tab("Fill a mask"):
            masked = gradio.Textbox(
                f"The president of the United {mask} spoke to congress.", label=f"Text with a {mask}"
            )
            button = gradio.Button("Fill", variant="primary", elem_id="fill")
            words = gradio.Label(label="Words", elem_id="words")
            gradio.on([button.click, masked.submit], demo.fill_mask, masked, words)
        with gradio.Tab("Classify"):
            text = gradio.Textbox("The striker scored twice in the last minutes.", label="Text")
            labels = gradio.Textbox("sports\npolitics\ncooking", label="Labels, one a line", lines=3)
            button = gradio.Button("Classify", variant="primary", elem_id="classify")
            nearest = gradio.Label(label="Nearest label", elem_id="labels")
            gradio.on([button.click, text.submit], demo.classify, [text, labels], nearest)
        with gradio.Tab("Compare sentences"):
            sentences = gradio.Textbox(
                "A man is playing a guitar on the stage.\nA musician performs with his guitar.\n"
                "The central bank raised interest rates again.\nBorrowing became more expensive.",
                label="Sentences, one a line",
                lines=5,
            )
            button = gradio.Button("Compare", variant="primary", elem_id="compare")
            pairs = gradio.Dataframe(headers=["cosine", "sentence", "sentence "], wrap=True, elem_id="pairs")
            button.click(demo.compare, sentences, pairs)
    return page


def load_demo(name_or_path: str) -> Demo:
    """
    Load a routed masked language model, and merge a copy of it with the moving averages of its routing.

    Raises:
        UserError: the model is another, or has no tokenizer.
    """
    model = load_model(name_or_path)
    if not type(model).__name__.endswith("ForMaskedLM") or model.config.ffn_modulation != "mol":
        raise UserError(f"{name_or_path}: a {type(model).__name__} is not allowed: it must be a routed masked LM.")
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer is None or tokenizer.mask_token is None:
        raise UserError(f"{name_or_path}: there is no tokenizer with a mask beside the model.")
    model = model.float().eval()
    return Demo(model, merge_experts(model, weights="ema").model, tokenizer)


@dataclass
class PageArguments:
    """A page to try a checkpoint: fill a mask, classify, compare sentences, see experts."""

    model_name_or_path: str = field(
        default=str(CHECKPOINT), metadata={"help": "Folder or Hub name of a ModernALBERT with experts."}
    )
    server_name: str = field(default="127.0.0.1", metadata={"help": "Address to listen at."})
    server_port: int = field(default=7860, metadata={"help": "Port to listen at."})


def main() -> None:
    (arguments,) = parse_arguments(PageArguments, description=PageArguments.__doc__)
    page = build_page(load_demo(arguments.model_name_or_path))
    try:
        # The font of the machine that looks at it, for tables too: nothing is fetched from elsewhere.
        font = [gradio.themes.Font("sans-serif")]
        theme = gradio.themes.Default(font=font, font_mono=font)
        page.launch(server_name=arguments.server_name, server_port=arguments.server_port, theme=theme)
    except OSError as error:
        raise UserError(f"--server_port {arguments.server_port}: {error}") from None


if __name__ == "__main__":
    run(main)
