"""Draw the picture of accuracy by budget from the table in ``docs/benchmarks.md``.

    python scripts/draw_budgets.py

The table is what ``scripts/bench/budgets.py`` measured; the picture shows each seed with its paired
95% interval, and the mean. Drawing it from the page keeps the two from drifting apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "resnet20-budgets.svg"

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 48
FIRST, LAST = 0.25, 1.0  # fractions of the MACs
LOW, HIGH = 82.0, 89.0  # accuracy in percent
SPREAD = 0.008  # between the seeds of one budget, so that their intervals stand side by side


@dataclass(frozen=True)
class Measured:
    """Points of accuracy lost at one budget.

    Attributes:
        fraction: Of the MACs.
        mean: Over the seeds.
        seeds: Per seed the loss and the ends of its interval.
    """

    fraction: float
    mean: float
    seeds: tuple[tuple[float, float, float], ...]


def read_table(page: str) -> tuple[float, list[Measured]]:
    """Return the original's accuracy and the columns of the table that are budgets of MACs."""
    found = re.search(r"classifies ([\d.]+)% of these", page)
    if found is None:
        raise ValueError(f"{PAGE} does not say what the original classifies correctly")
    table = page[page.index("| kept |") :].partition("\n\n")[0]
    lines = table.replace("\N{MINUS SIGN}", "-").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    seeds = [k for k, row in enumerate(rows) if row[0].startswith("seed")]
    budgets = []
    for column, title in enumerate(rows[0]):
        if title.endswith(" MACs"):
            found_seeds = []
            for k in seeds:
                low, high = map(float, rows[k + 1][column].split(" to "))
                found_seeds.append((float(rows[k][column]), low, high))
            mean = float(rows[2][column])
            budgets.append(Measured(float(title.split()[0]), mean, tuple(found_seeds)))
    return float(found[1]), budgets


def _x(fraction: float) -> float:
    return LEFT + (fraction - FIRST) / (LAST - FIRST) * (WIDTH - LEFT - RIGHT)


def _y(accuracy: float) -> float:
    return HEIGHT - BOTTOM - (accuracy - LOW) / (HIGH - LOW) * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, words: str, anchor: str = "middle", **more: str) -> str:
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{words}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _axes(before: float) -> list[str]:
    grid = 'stroke="#e2e5ea"'
    parts = []
    for percent in range(int(LOW), int(HIGH) + 1):
        parts.append(_line(LEFT, _y(percent), WIDTH - RIGHT, _y(percent), grid))
        parts.append(_text(LEFT - 8, _y(percent) + 4, f"{percent}%", "end"))
    for tenths in range(3, 11):
        x = _x(tenths / 10)
        parts.append(_line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5, 'stroke="#8a919c"'))
        parts.append(_text(x, HEIGHT - BOTTOM + 20, f"{tenths / 10:.1f}"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "fraction of MACs kept"))
    title = "ResNet-20 on CIFAR-10: test accuracy after compression, no retraining"
    parts.append(_text(LEFT, 22, title, "start", font_weight="600"))
    dashed = 'stroke="#555" stroke-dasharray="5 4"'
    parts.append(_line(LEFT, _y(before), WIDTH - RIGHT, _y(before), dashed))
    parts.append(_text(WIDTH - RIGHT, _y(before) - 7, f"original, {before}%", "end"))
    return parts


def draw(before: float, budgets: list[Measured]) -> str:
    """Return the picture as SVG."""
    parts = _axes(before)
    for budget in budgets:
        middle = (len(budget.seeds) - 1) / 2
        for k, (lost, low, high) in enumerate(budget.seeds):
            x = _x(budget.fraction + (k - middle) * SPREAD)
            whisker = 'stroke="#9db7e8" stroke-width="2"'
            parts.append(_line(x, _y(before - low), x, _y(before - high), whisker))
            parts.append(
                f'<circle cx="{x:.1f}" cy="{_y(before - lost):.1f}" r="3" fill="#7196de"/>'
            )
    path = " ".join(f"{_x(b.fraction):.1f},{_y(before - b.mean):.1f}" for b in budgets)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f4fb0" stroke-width="2"/>')
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" '
        'fill="#333" role="img">\n'
        "  <title>Test accuracy of ResNet-20 by fraction of MACs kept; three seeds with their "
        "paired 95% intervals, and their mean</title>\n"
        f'  <rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>\n'
        f"  {body}\n</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(*read_table(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"Wrote {PICTURE}")


if __name__ == "__main__":
    main()
