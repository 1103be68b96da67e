"""The page itself: one HTML file without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lightning_lpsgld.report.charts import bars, lines
from lightning_lpsgld.report.facts import Facts, Mistake

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
.dot:hover { r: 6px; } .bar { fill: var(--k0); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; } th, td { padding: 3px 12px 3px 0; text-align: left; }
td.n { font-variant-numeric: tabular-nums; text-align: right; }
.key { font-weight: 400; margin-left: 10px; } .key::before { content: "\\25CF "; }
.mistakes { display: flex; flex-wrap: wrap; gap: 12px; } .mistakes figure { width: 132px; }
.mistakes img { width: 100%; image-rendering: pixelated; }
details > summary { cursor: pointer; }
""" + "".join(
    f".line.k{i} {{ stroke: var(--k{i}); }} .dot.k{i} {{ fill: var(--k{i}); }} .key.k{i} {{ color: var(--k{i}); }}\n"
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


def _mistake(mistake: Mistake) -> str:
    picture = ""
    if mistake.image is not None:
        data = base64.b64encode(png(mistake.image)).decode()
        picture = f'<img alt="test point {mistake.index}" src="data:image/png;base64,{data}">'
    text = f"{mistake.answer}, truth {mistake.truth}"
    return f"<figure>{picture}<figcaption>{text}</figcaption>{mistake.confidence:.1%}, no. {mistake.index}</figure>"


def _figures(facts: Facts) -> str:
    sizes = [float(k) for k in range(1, len(facts.growth) + 1)]
    made = [
        lines("Error against samples", {"error": list(zip(sizes, (g["error"] for g in facts.growth)))}, "samples"),
        lines("NLL against samples", {"nll": list(zip(sizes, (g["nll"] for g in facts.growth)))}, "samples"),
    ]
    if facts.reliability is not None:
        bins = facts.reliability
        points = [
            (c, a) for c, a, n in zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.count.tolist()) if n > 0
        ]
        made.append(lines("Reliability", {"accuracy": points}, "confidence", "accuracy", diagonal=True))
    rates = [(float(step), lr) for step, lr, _ in facts.rates if lr is not None]
    made.append(lines("Learning rate at the samples", {"lr": sorted(rates)}, "step"))
    if facts.heat:
        made.append(lines("Noise over target, per layer", facts.heat, "step"))
    made.append(
        bars("Disagreement with the ensemble", {str(i): v for i, v in enumerate(facts.disagreement)}, "share of points")
    )
    for name, chains in list(facts.traces.items())[:4]:
        made.append(lines(f"Trace: {name}", {f"chain {c}": points for c, points in chains.items()}, "step"))
    return f'<div class="grid-of-figures">{"".join(made)}</div>'


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
        [(name, f"{one:.4g}", f"{all_:.4g}") for name, (one, all_) in facts.scores.items()],
    )
    parts = [f"<h1>{escape(title)}</h1>", "<h2>The samples</h2>", card, "<h2>Scores</h2>", scores]
    parts += ["<h2>Figures</h2>", _figures(facts)]
    if facts.convergence:
        rows = [(name, f"{r:.3f}", f"{ess:.1f}") for name, (r, ess) in facts.convergence.items()]
        parts += ["<h2>Convergence</h2>", _table(("quantity", "R-hat", "ESS"), rows)]
    parts.append("<h2>Most confident mistakes</h2>")
    wrong = "".join(map(_mistake, facts.mistakes)) or "<p>None.</p>"
    parts.append(f'<div class="mistakes">{wrong}</div>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
