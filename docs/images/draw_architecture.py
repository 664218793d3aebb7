# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Draw the picture of README.md, `architecture-light.svg` and `architecture-dark.svg`.

    python docs/images/draw_architecture.py
"""

from pathlib import Path


FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 960, 440
LIGHT = {
    "text": "#1f2328",
    "muted": "#59636e",
    "border": "#8c959f",
    "panel": "#d1d9e0",
    "box": "#f6f8fa",
    "chosen": "#8250df",
    "chosen_box": "#f3e8ff",
    "attention": "#0969da",
    "attention_box": "#ddf4ff",
}
DARK = {
    "text": "#f0f6fc",
    "muted": "#9da7b3",
    "border": "#6e7681",
    "panel": "#3d444d",
    "box": "#1b222c",
    "chosen": "#bc8cff",
    "chosen_box": "#2e2148",
    "attention": "#58a6ff",
    "attention_box": "#12263f",
}
NUM_GROUPS, DEPTH = 3, 2


class Drawing:
    """SVG elements in the colours of one scheme."""

    def __init__(self, colours: dict[str, str]):
        self.colours = colours
        self.elements: list[str] = []

    def box(self, x, y, width, height, fill="box", stroke="border", radius=6, dashed=False):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        fill = self.colours.get(fill, fill)
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
            f'stroke="{self.colours[stroke]}" stroke-width="1.5"{dash}/>'
        )

    def text(self, x, y, text, size=14, colour="text", anchor="middle", weight="normal", italic=False):
        style = ' font-style="italic"' if italic else ""
        self.elements.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.colours[colour]}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{style}>{text}</text>'
        )

    def path(self, points, colour="border", arrow=True, dashed=False, width=1.6):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        head = f' marker-end="url(#{colour})"' if arrow else ""
        self.elements.append(
            f'<path d="{points}" fill="none" stroke="{self.colours[colour]}" stroke-width="{width}"{dash}{head}/>'
        )

    def labelled_box(self, x, y, width, height, text, size=14, **style):
        self.box(x, y, width, height, **style)
        self.text(x + width / 2, y + height / 2 + 0.35 * size, text, size)

    def panel(self, x, width, title, *caption):
        self.box(x, 8, width, HEIGHT - 16, fill="none", stroke="panel", radius=10)
        self.text(x + width / 2, 34, title, 16, weight="bold")
        for line, text in enumerate(caption):
            self.text(x + width / 2, HEIGHT - 42 + 18 * line, text, 13, "muted")

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{self.colours[name]}"/></marker>'
            for name in ("border", "chosen")
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
                "<title>ModernALBERT: groups of layers used several times, a Mixture of LoRAs, the merged FFN</title>",
                f"<defs>{heads}</defs>",
                *self.elements,
                "</svg>\n",
            ]
        )


def sub(letter: str, index: str) -> str:
    return f'{letter}<tspan font-size="70%" dy="3">{index}</tspan><tspan dy="-3"> </tspan>'


def draw_encoder(drawing: Drawing) -> None:
    """K groups of weights, each used G times; the last ones carry experts."""
    left, middle = 28, 138
    drawing.panel(12, 268, "Recursive encoder", "K groups of weights, each used", "G times: K × G layers")
    drawing.text(middle, 374, "token ids", italic=True)
    drawing.path(f"M{middle},360 V347")
    drawing.labelled_box(left, 317, 220, 28, "embedding")
    drawing.path(f"M{middle},317 V301")
    for group in range(NUM_GROUPS):
        y = 246 - 72 * group
        drawing.box(left, y, 220, 54, fill="none")
        drawing.labelled_box(left + 8, y + 22, 92, 26, "attention", 13, fill="attention_box", stroke="attention")
        if group:
            drawing.labelled_box(left + 106, y + 22, 106, 26, "FFN + MoL", 13, fill="chosen_box", stroke="chosen")
        else:
            drawing.labelled_box(left + 106, y + 22, 106, 26, "FFN", 13)
        drawing.text(left + 10, y + 15, f"group {group}", 12, "muted", "start")
        right = left + 220
        drawing.path(f"M{right},{y + 12} h12 q6,0 6,6 v18 q0,6 -6,6 h-11")
        drawing.text(right - 8, y + 15, f"used {DEPTH} ×", 12, "muted", "end")
        drawing.path(f"M{middle},{y} V{y - 16 if group < NUM_GROUPS - 1 else y - 15}")
    drawing.labelled_box(left, 59, 220, 28, "final norm, head")


def draw_mixture(drawing: Drawing) -> None:
    """One FFN: shared projections, a router, and k of E LoRA pairs on both projections."""
    left, width = 296, 404
    drawing.panel(
        left,
        width,
        "Mixture of LoRAs (MoL)",
        "For each token the router picks k of E experts.",
        "An expert is a LoRA pair on both projections.",
    )
    centre = left + 74
    columns = [left + x for x in (170, 224, 278, 354)]
    rows = {"out": 116, "in": 252}
    drawing.text(centre, 374, "token x", italic=True)
    drawing.path(f"M{centre},360 V292")
    drawing.labelled_box(centre - 48, rows["in"], 96, 38, sub("W", "in"), 16)
    drawing.path(f"M{centre},{rows['in']} V220")
    drawing.labelled_box(centre - 48, 188, 96, 30, "GeGLU")
    drawing.path(f"M{centre},188 V156")
    drawing.labelled_box(centre - 48, rows["out"], 96, 38, sub("W", "out"), 16)
    drawing.path(f"M{centre},{rows['out']} V80")
    drawing.text(centre, 72, "output", italic=True)
    for y in rows.values():
        drawing.text(centre + 60, y + 25, "+", 18)
    for column, name, is_chosen in zip(columns, ("1", "2", "3", "E"), (False, True, False, True)):
        stroke, fill = ("chosen", "chosen_box") if is_chosen else ("panel", "none")
        colour = "text" if is_chosen else "muted"
        drawing.box(column - 24, 84, 48, 222, fill="none", stroke=stroke, dashed=not is_chosen)
        drawing.text(column, 103, name, 14, colour, weight="bold" if is_chosen else "normal")
        for place, y in rows.items():
            drawing.box(column - 19, y, 38, 38, fill=fill, stroke=stroke)
            drawing.text(column, y + 16, f'B<tspan font-size="70%" dy="2">{place}</tspan>', 13, colour)
            drawing.text(column, y + 32, f'A<tspan font-size="70%" dy="2">{place}</tspan>', 13, colour)
        if is_chosen:
            drawing.path(f"M{column},331 V309", "chosen")
    drawing.text((columns[2] + columns[3]) / 2, 212, "…", 18, "muted")
    drawing.text((columns[0] + columns[3]) / 2, 72, "experts", 13, "muted")
    drawing.labelled_box(
        columns[0] - 24,
        332,
        columns[3] - columns[0] + 48,
        28,
        "router: top-k of softmax",
        13,
        fill="chosen_box",
        stroke="chosen",
    )
    drawing.path(f"M{centre},346 H{columns[0] - 26}")


def draw_merged(drawing: Drawing) -> None:
    """Draw the merged FFN: two projections."""
    left, width = 752, 196
    centre = left + width / 2
    drawing.panel(left, width, "Merged", "The plain FFN, or one", "stock LoRA: no router")
    drawing.text(centre, 374, "token x", italic=True)
    drawing.path(f"M{centre},360 V292")
    drawing.labelled_box(
        centre - 70, 252, 140, 38, sub("W", "in") + "+ " + sub("Δ", "in"), 16, fill="chosen_box", stroke="chosen"
    )
    drawing.path(f"M{centre},252 V220")
    drawing.labelled_box(centre - 70, 188, 140, 30, "GeGLU")
    drawing.path(f"M{centre},188 V156")
    drawing.labelled_box(
        centre - 70, 116, 140, 38, sub("W", "out") + "+ " + sub("Δ", "out"), 16, fill="chosen_box", stroke="chosen"
    )
    drawing.path(f"M{centre},116 V80")
    drawing.text(centre, 72, "output", italic=True)
    drawing.path("M704,208 H748", "chosen", width=2.4)
    drawing.text(726, 198, "merge", 13, "chosen")


def main() -> None:
    for scheme, colours in (("light", LIGHT), ("dark", DARK)):
        drawing = Drawing(colours)
        draw_encoder(drawing)
        draw_mixture(drawing)
        draw_merged(drawing)
        (FOLDER / f"architecture-{scheme}.svg").write_text(drawing.svg(), "utf-8")


if __name__ == "__main__":
    main()
