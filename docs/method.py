"""Draws docs/method.svg, the method in three panels: python docs/method.py"""

from pathlib import Path
from random import Random

STYLE = """
text { font: 16px sans-serif; fill: #1f2328 } .b { font-weight: bold } .m { text-anchor: middle } .s { fill: #59636e }
.box { fill: #ddf4ff; stroke: #0969da; stroke-width: 1.5 } .teach { fill: #fff8c5; stroke: #9a6700; stroke-width: 1.5 }
.dec { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.5 }
.see { fill: #0969da } .hide { fill: #d4a72c } .gone { fill: #d1d9e0 } .tip { fill: #59636e }
path { stroke: #59636e; stroke-width: 1.5; fill: none; marker-end: url(#tip) } .ema { stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .s { fill: #9198a1 } .box { fill: #0c2d6b; stroke: #4493f8 }
  .teach { fill: #3b2300; stroke: #d29922 } .dec { fill: #033a16; stroke: #3fb950 } .see { fill: #4493f8 }
  .hide { fill: #d29922 } .gone { fill: #3d444d } path { stroke: #9198a1 } .tip { fill: #9198a1 }
}"""
parts: list[str] = []


def text(x: float, y: float, words: str, kind: str = "m") -> None:
    parts.append(f'<text x="{x}" y="{y}" class="{kind}">{words}</text>')


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>')
    for i, line in enumerate(lines):
        text(x + width / 2, y + height / 2 + 6 + 20 * (i - (len(lines) - 1) / 2), line)


def arrow(points: str, kind: str = "") -> None:
    parts.append(f'<path d="M{points}" class="{kind}"/>')


def grid(x: float, y: float, kinds: dict[int, str], cell: int = 9) -> None:
    """14 x 14 patches, of which those in `kinds` are drawn."""
    for i, kind in kinds.items():
        place = f'x="{x + i % 14 * cell}" y="{y + i // 14 * cell}" width="{cell - 1}" height="{cell - 1}"'
        parts.append(f'<rect {place} class="{kind}"/>')


order = Random(1).sample(range(196), 196)
visible, masked = order[:49], order[49:]
stages = [masked[:count] for count in (147, 73, 36, 18)]

text(20, 28, "a  Pre-training: predict the teacher's latents of the retained patches", "b")
grid(20, 130, {i: "see" if i in visible else "hide" for i in range(196)})
text(83, 118, "196 patches")
arrow("154,170 C175,170 175,98 196,98")
arrow("154,216 C175,216 175,290 196,290")
text(262, 56, "49 visible")
box(200, 66, 124, 64, "box", "student ViT")
text(262, 344, "147 masked")
box(200, 258, 124, 64, "teach", "teacher ViT")
arrow("262,132 L262,254", "ema")
text(272, 198, "moving average", "s")
arrow("326,98 L600,98")
text(463, 88, "50 tokens")
for i, (stage, count) in enumerate(zip(stages[1:], (73, 36, 18), strict=True)):
    x = 366 + 146 * i
    grid(x, 240, {j: "hide" if j in stage else "gone" for j in stages[i]}, cell=7)
    text(x + 48, 228, f"{count} kept")
    text(x + 48, 362, f"after block {4 * i}", "s m")
    arrow(f"{x - 38},290 L{x - 4},290")
box(604, 66, 124, 64, "dec", "light", "decoder")
arrow("666,208 L666,134")
text(678, 178, "18 positions", "s")
arrow("730,98 L782,98")
box(786, 66, 116, 64, "dec", "1 - cosine", "= loss")
arrow("760,290 C844,290 844,250 844,134")
text(766, 316, "18 latents,", "s")
text(766, 338, "the targets", "s")

text(20, 410, "b  Fine-tuning: PTR makes the student a faster classifier", "b")
for i, (kind, lines) in enumerate((("see", "196 patches"), ("box", "ViT with PTR"), ("dec", "mean, head"))):
    if kind == "see":
        text(83, 462, lines)
        arrow("142,456 L196,456")
    else:
        box(200 + 200 * (i - 1), 428, 140, 56, kind, lines)
arrow("342,456 L396,456")
text(555, 450, "drop 0.4 at two stages: 9.5 of 17.6 GMACs,", "")
text(555, 472, "the class token is never dropped", "")

text(20, 532, "c  PTR: progressive token reduction, after blocks 0, 4 and 8", "b")
words = "redundancy of a token = mean cosine similarity to all remaining tokens; the least redundant half is kept"
text(20, 562, words, "")

height = 582
head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {height}" width="920" height="{height}" role="img">'
title = "<title>PCAE: a student sees visible patches, a teacher with token reduction makes the targets</title>"
marker = (
    '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    '<path class="tip" style="stroke: none; marker-end: none" d="M0,0 L9,4 L0,8 z"/></marker></defs>'
)
content = "\n".join([head, title, f"<style>{STYLE}</style>", marker, *parts, "</svg>"])
Path(__file__).with_suffix(".svg").write_text(content + "\n")
