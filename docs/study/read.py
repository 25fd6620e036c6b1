"""Tables of the study's runs: python docs/study/read.py runs/study NAME [NAME ...]

A row for each NAME, with the mean (lowest to highest) of what NAME-SEED/knn.txt and the logs of fine-tuning say.
"""

import json
import re
import sys
from pathlib import Path


def scores(run: Path) -> dict[str, float]:
    """What one run left, in %: neighbours, ridge, and the last top-1 of each fine-tuning, RUN-SHARE."""
    found = {}
    if (run / "knn.txt").exists():
        percents = re.findall(r"([\d.]+)% by", (run / "knn.txt").read_text())
        found |= dict(zip(("neighbours", "ridge"), map(float, percents), strict=True))
    for log in run.parent.glob(f"{run.name}-*/metrics.jsonl"):
        last = json.loads(log.read_text().splitlines()[-1])
        if "top1" in last:  # else a pre-training that was moved aside
            found[log.parent.name.removeprefix(f"{run.name}-")] = 100 * last["top1"]
    return found


def cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def main(folder: str, *names: str) -> None:
    rows = {name: [scores(Path(folder, f"{name}-{seed}")) for seed in range(3)] for name in names}
    columns = list(dict.fromkeys(column for seeds in rows.values() for found in seeds for column in found))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, seeds in rows.items():
        cells = [cell([found[column] for found in seeds if column in found]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


main(*sys.argv[1:])
