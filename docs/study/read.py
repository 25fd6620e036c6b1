"""Tables of the study's runs: python docs/study/read.py RUNS [NAME ...]

Adds the accuracies (%) of the finished runs in RUNS, folders NAME-SEED and NAME-SEED-FINETUNING, to length.json beside
this file. Prints one row per NAME (default: all in length.json) and one column per metric: mean (lowest to highest,
number of seeds).
"""

import json
import re
import sys
from pathlib import Path

STORE = Path(__file__).with_name("length.json")


def accuracies(run: Path) -> dict[str, float]:
    """Return in % the k-NN and ridge accuracy of a pre-training, or the last metrics of a fine-tuning."""
    found = {}
    if (run / "knn.txt").exists():
        values = map(float, re.findall(r"([\d.]+)% by", (run / "knn.txt").read_text()))
        found |= dict(zip(("k-NN", "ridge"), values, strict=True))
    if (run / "done").exists():
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        names = dict(top1="", box_ap="box AP", mask_ap="mask AP")
        found |= {name: round(100 * last[key], 2) for key, name in names.items() if key in last}
    return found


def main(folder: str, *names: str) -> None:
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    for run in sorted(Path(folder).iterdir()):
        parts = re.fullmatch(r"(.+?)-([0-9])(?:-([^0-9].*))?", run.name)
        if parts and run.is_dir():
            name, seed, tuning = parts.groups(default="")
            for metric, value in accuracies(run).items():
                store.setdefault(name, {}).setdefault(f"{tuning} {metric}".strip(), {})[seed] = value
    STORE.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n")
    columns = list(dict.fromkeys(metric for name in names or store for metric in store[name]))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in names or store:
        cells = []
        for column in columns:
            values = list(store[name].get(column, {}).values())
            text = f"{sum(values) / len(values):.1f}" if values else ""
            if len(values) > 1:
                text += f" ({min(values):.1f} to {max(values):.1f}, {len(values)})"
            cells.append(text)
        print(f"| {name} | {' | '.join(cells)} |")


main(*sys.argv[1:])
