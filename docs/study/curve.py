"""Draw accuracy against compute from length.json: python docs/study/curve.py, which writes docs/length.svg."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Runs by compute: multiply-accumulates relative to PCAE for 10 epochs of 20,000 images. MAE has 4 % more.
PCAE = {1: "short", 3: "pcae-10", 6: "pcae-20", 12: "pcae-40", 18: "pcae-60"}
MAE = {1.04: "mae-short", 3.12: "mae-9", 6.24: "mae-18", 12.48: "mae-36", 18.72: "mae-54"}
RAW = {"k-NN": 86.17, "ridge": 81.13}  # raw pixels, 60,000 labelled images

store = json.loads((HERE / "length.json").read_text())
figure = Figure(figsize=(9, 3), layout="constrained")
for i, (metric, raw) in enumerate(RAW.items(), start=1):
    panel = figure.add_subplot(
        1, 2, i, ylabel=f"{metric} accuracy, %", xlabel="compute of the pre-training", xscale="log"
    )
    for name, runs, colour in (("PCAE", PCAE, "#d55e00"), ("MAE", MAE, "#0072b2")):
        points = [(x, list(store[run][metric].values())) for x, run in runs.items() if metric in store.get(run, {})]
        panel.plot([x for x, _ in points], [sum(y) / len(y) for _, y in points], "-", color=colour, label=name)
        panel.plot(*zip(*[(x, value) for x, y in points for value in y], strict=True), "o", color=colour, markersize=4)
    panel.axhline(raw, color="grey", linestyle="--", label="raw pixels")
    panel.set_xticks([1, 3, 6, 12], ["1", "3", "6", "12"], minor=False)
    panel.xaxis.minorticks_off()
    panel.legend(fontsize="small")
figure.savefig(HERE.parent / "length.svg", metadata=dict(Date=None))
