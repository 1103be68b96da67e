"""The page itself: one HTML file without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lightning_lpsgld.report.charts import Curve, bars, lines
from lightning_lpsgld.report.evaluation import Evaluation, Mistake
from lightning_lpsgld.report.facts import Facts

__all__ = ["png", "render"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --back: #ffffff; --faint: #d8dee4; --card: #f5f7f9;
  --k0: #2563c9; --k1: #c2410c; --k2: #15803d; --k3: #7e22ce; --k4: #0e7490; --k5: #a16207; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --back: #0d1117; --faint: #30363d; --card: #161b22;
  --k0: #6ea8fe; --k1: #fb923c; --k2: #4ade80; --k3: #c084fc; --k4: #22d3ee; --k5: #facc15; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1160px; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--back); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 1.6em 0 .4em; border-bottom: 1px solid var(--faint); }
.grid-of-figures { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure, .card { margin: 0; padding: 10px; background: var(--card); border-radius: 8px; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 11px; } .grid { stroke: var(--faint); }
.line { fill: none; stroke-width: 2; } .diagonal { stroke: var(--ink); stroke-dasharray: 4 4; opacity: .5; }
.tip { display: none; paint-order: stroke; stroke: var(--card); stroke-width: 4px; font-weight: 600; }
.mark { outline: none; cursor: pointer; } .mark:hover .dot, .mark:focus .dot { r: 6px; }
.mark:hover .tip, .mark:focus .tip { display: block; } .bar { fill: var(--k0); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; } th, td { padding: 3px 12px 3px 0; text-align: left; }
td.n { font-variant-numeric: tabular-nums; text-align: right; }
.key { font-weight: 400; margin-left: 10px; position: relative; cursor: pointer; } .key::before { content: "\\25CF "; }
.key input { position: absolute; opacity: 0; } .key:has(input:not(:checked)) { opacity: .4; }
.key:has(input:focus-visible) { outline: 2px solid; }
.mistakes { display: flex; flex-wrap: wrap; gap: 12px; } .mistakes figure { width: 132px; }
.mistakes img { width: 100%; image-rendering: pixelated; }
details > summary { cursor: pointer; }
""" + "".join(
    f".line.k{i} {{ stroke: var(--k{i}); }} .dot.k{i} {{ fill: var(--k{i}); }} .key.k{i} {{ color: var(--k{i}); }}\n"
    f"figure:has(.key.k{i} input:not(:checked)) .series.s{i} {{ display: none; }}\n"
    for i in range(6)
)


def png(image: Tensor) -> bytes:
    """PNG file of an image of any range, which is stretched to black and white.

    Args:
        image: Shape ``(1 or 3, height, width)``.
    """
    image = image.detach().double().cpu()
    low, high = float(image.min()), float(image.max())
    scaled = (255 * (image - low) / (high - low or 1.0)).round().to(torch.uint8)
    channels, height, width = scaled.shape
    pixels = scaled.movedim(0, -1).reshape(height, width * channels).numpy()
    raw = b"".join(b"\x00" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll card"><table><tr>{top}</tr>{body}</table></div>'


def _number(value: float) -> str:
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.4g}"


def _mistake(mistake: Mistake, said: str) -> str:
    picture = ""
    if mistake.image is not None:
        data = base64.b64encode(png(mistake.image)).decode()
        picture = f'<img alt="test input {mistake.index}" src="data:image/png;base64,{data}">'
    text = said.format(mistake.size)
    return f"<figure>{picture}<figcaption>{escape(mistake.text)}</figcaption>{text}, no. {mistake.index}</figure>"


def _rates(facts: Facts) -> Curve:
    """Learning rate of the run where it was logged, and at the samples, cycle by cycle."""
    series: dict[str, list[tuple[float, float]]] = {f"run, {name}": rows for name, rows in facts.schedule.items()}
    for step, lr, cycle in facts.rates:
        if lr is not None:
            name = "samples" if cycle is None else f"samples of cycle {cycle}"
            series.setdefault(name, []).append((float(step), lr))
    sampled = [name for name in series if name.startswith("samples")]
    ordered = {name: sorted(points) for name, points in series.items()}
    return Curve("Learning rate at the samples", ordered, "step", marked=sampled)


def _figures(facts: Facts) -> str:
    evaluation = facts.evaluation
    made = [lines(curve) for curve in [*evaluation.curves, _rates(facts)]]
    if facts.heat:
        made.append(lines(Curve("Noise over target, per layer", facts.heat, "step")))
    unit = "rms difference" if evaluation.task == "regression" else "share of points"
    made.append(bars("Disagreement with the ensemble", {str(i): v for i, v in enumerate(evaluation.distance)}, unit))
    for name, chains in list(facts.traces.items())[:4]:
        made.append(lines(Curve(f"Trace: {name}", {f"chain {c}": points for c, points in chains.items()}, "step")))
    return f'<div class="grid-of-figures">{"".join(made)}</div>'


def _wrong(evaluation: Evaluation) -> str:
    """The last part of the page: where the ensemble is wrong."""
    if evaluation.task == "regression":
        title, said = "Largest errors for the spread that was predicted", "{:.3g} standard deviations"
    elif any("points wrong" in mistake.text for mistake in evaluation.mistakes):
        title, said = "Inputs with most points wrong", "{:.1%}"
    else:
        title, said = "Most confident mistakes", "{:.1%}"
    shown = "".join(_mistake(mistake, said) for mistake in evaluation.mistakes) or "<p>None.</p>"
    return f'<h2>{title}</h2><div class="mistakes">{shown}</div>'


def render(facts: Facts, title: str) -> str:
    """The page.

    Args:
        facts: What it says.
        title: Its title.

    Returns:
        HTML text that needs nothing else.
    """
    card = _table(("bank", ""), [(name, value) for name, value in facts.card.items()])
    scores = _table(
        ("test data", "single sample", "ensemble"),
        [(name, *(_number(value) for value in pair)) for name, pair in facts.evaluation.scores.items()],
    )
    parts = [f"<h1>{escape(title)}</h1>", "<h2>The samples</h2>", card, "<h2>Scores</h2>", scores]
    parts += ["<h2>Figures</h2>", _figures(facts)]
    if facts.convergence:
        rows = [(name, _number(r), _number(ess)) for name, (r, ess) in facts.convergence.items()]
        parts += ["<h2>Convergence</h2>", _table(("quantity", "R-hat", "ESS"), rows)]
    parts.append(_wrong(facts.evaluation))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
