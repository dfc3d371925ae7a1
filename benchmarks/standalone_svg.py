"""A chart of a report as a file of its own, with its colours and a legend."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = ("#1a5fa8", "#c2571a", "#2e8b57", "#7d4ba3", "#b0246e")
STYLE = (
    "svg{background:#fff}.grid{stroke:#dfe3e4}.tick{font:12px sans-serif}.line{fill:none;"
    "stroke-width:2.5}"
) + "".join(f".s{slot}{{stroke:{colour}}}" for slot, colour in enumerate(COLOURS))


def standalone(chart: object, names: Sequence[str]) -> str:
    """An SVG file of `svg.line_chart`'s chart; `names` are those of its lines, by slot."""
    text = str(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    legend = "".join(
        f'<text class="tick" x="86" y="{28 + 16 * slot}" fill="{COLOURS[slot]}">{name}</text>'
        for slot, name in enumerate(names)
    )
    return text.replace(">", f"><style>{STYLE}</style>{legend}", 1)
