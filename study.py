"""Does it work? Six questions about PCAE, answered by runs of the real scripts on the built-in data.

    python study.py                          all of it: hours of one core. Finished runs are skipped, so it goes on
    python study.py 1 3 --seeds 0            only these questions, only this seed
    python study.py --dry-run                the command of every run
    python study.py --tables                 Markdown tables of what is finished
    python study.py --data cifar10 --data-root DIR --out runs/study-cifar10

Two at once share nothing if each has its own seeds.

The design, written before the first run, but for fine-tuning, made shorter before any was run, and for what was *asked
later*. The unit is PCAE for 10 epochs of 10,000 images, half of what `pretrain.py`
does: far from where every method is right for every image, so that differences can show. What such a run costs in
multiply-accumulates buys 7 epochs of MAE with the same light decoder, or 5 of SimMIM. Warm-up is 15 % of each run.

0. Which learning rates are fair? Each method's at its own length, by the linear score of seed 0 (further rates where
   the best lies at an edge). From scratch: learning rate and layer decay, at 10 % of the labels.
1. Does pre-training help? Yes if it beats training from scratch at 1, 10 and 100 % of the labels. Besides: training
   from scratch for as long as pre-training takes; and, asked later, when that had won at 10 %, so at 1 %, and what
   longer fine-tuning gives, for an eighth and a third of the compute of pre-training more.
2. At equal compute, is PCAE better than MAE and SimMIM? Yes if it beats them in most of the five scores of question 1
   and loses none. Besides: at equal epochs, where the others spend 1.5 and 2 times as much; and, asked later, when one
   block had turned out to be the better decoder of PCAE, with one in both (10 and 9 epochs: 0.19 and 0.20 GMACs).
3. Does the criterion matter? Yes if similarity beats random, and random beats reverse, in both feature scores.
4. Are 3 stages, 87.5 % dropped and 75 % masked best? Yes if no other setting lies above the seeds of that one in both
   feature scores. One seed. Asked later, when 10 epochs without PTR had come out ahead, for 1.9 times the compute: is
   PTR better at equal compute, against 5 epochs without it? Yes if it beats them in both feature scores. Three seeds.
5. Does PTR keep a classifier's accuracy? Yes if at drop ratio .4, trained with it, it loses no more than the 1.2 points
   of the poster's Table 5. Switched on only for evaluation, it may lose more.
6. Do the teacher's momentum and the light decoder matter? The teacher's motion does if some moving one is above the one
   that stands still (`--ema 1`), the decoder if a heavier one is above the light one, in both feature scores. One seed.
   Asked later, before those runs: does it help to take from the targets what they all share (`--center`), with the
   default momentum or with .999, whose targets share more? Yes if it beats the same without it in both.

A row beats another in a score if its worst seed is above the other's best. Scores are those after the last epoch, not
of the best one. Where there is one seed, differences within the range of the seeds of the unit are none.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import engine
import finetune
import pretrain
from engine import UserError

SCRIPTS = {"pretrain.py": pretrain, "finetune.py": finetune}


# --- the runs: a name and a command, where {name} is the last checkpoint of another run with the same seed ------------


def pretraining(epochs: int, flags: str) -> str:
    """A pre-training, its features scored at the start and at the end."""
    return f"pretrain.py --epochs {epochs} --warmup-epochs {0.15 * epochs:g} --knn-every {epochs} {flags}"


LABELS = {
    "1%": "--label-fraction 0.01 --epochs 10 --batch-size 10 --lr 8e-4",
    "10%": "--label-fraction 0.1 --epochs 5",
    "100%": "--epochs 2 --warmup-epochs 0.5",
}
RATIOS = ("0", "0.1", "0.2", "0.3", "0.4")
RUNS: dict[str, str] = {}

# 0. Learning rates, at the epochs that cost the same. What is best goes into all that follows.
for method, epochs in (("pcae", 10), ("mae", 7), ("simmim", 5)):
    for blr in ("2e-3", "4e-3", "8e-3", "16e-3", *(("32e-3",) if method != "pcae" else ())):
        RUNS[f"{method}-{blr}"] = pretraining(epochs, f"--method {method} --blr {blr}")
UNIT, MAE, SIMMIM = "pcae-8e-3", "mae-16e-3", "simmim-16e-3"
for name, flags in (
    ("scratch", ""),
    ("scratch-flat", "--layer-decay 1"),
    ("scratch-fast", "--blr 8e-3"),
    ("scratch-both", "--layer-decay 1 --blr 8e-3"),
):
    RUNS[f"{name}-10%"] = f"finetune.py --init none {LABELS['10%']} {flags}".strip()
SCRATCH, SCRATCH_FLAGS = "scratch-both", "--layer-decay 1 --blr 8e-3"

# 1 and 2. Each method and training from scratch, on few labels and many; longer runs of what costs more.
for share, flags in LABELS.items():
    RUNS |= {f"{name}-{share}": f"finetune.py --init {{{name}}} {flags}" for name in (UNIT, MAE, SIMMIM)}
    RUNS[f"{SCRATCH}-{share}"] = f"finetune.py --init none {flags} {SCRATCH_FLAGS}"
RUNS["mae-long"] = pretraining(10, "--method mae --blr 16e-3")
RUNS["mae-decoder-1"] = pretraining(9, "--method mae --blr 16e-3 --decoder-depth 1")
RUNS["simmim-long"] = pretraining(10, "--method simmim --blr 16e-3")
RUNS[f"{UNIT}-long-1%"] = f"finetune.py --init {{{UNIT}}} --label-fraction 0.01 --epochs 60 --batch-size 10 --lr 8e-4"
RUNS[f"{UNIT}-long-10%"] = f"finetune.py --init {{{UNIT}}} --label-fraction 0.1 --epochs 20"
for share, flags in (
    ("1%", "--label-fraction 0.01 --epochs 550 --batch-size 10 --lr 8e-4"),
    ("10%", "--label-fraction 0.1 --epochs 55"),
    ("100%", "--epochs 7"),
):
    RUNS[f"scratch-long-{share}"] = f"finetune.py --init none {flags} {SCRATCH_FLAGS}"

# 3, 4 and 6. PCAE with one setting changed.
CHANGES = {
    "random": "--criterion random",
    "reverse": "--criterion reverse",
    "stages-1": "--drop-stages 1 --drop-ratio 0.875",
    "stages-2": "--drop-stages 2 --drop-ratio 0.64",
    "stages-4": "--drop-stages 4 --drop-ratio 0.39",
    "drop-0": "--drop-ratio 0",
    "drop-77": "--drop-ratio 0.37",
    "drop-81": "--drop-ratio 0.415",
    "drop-85": "--drop-ratio 0.46",
    "drop-92": "--drop-ratio 0.536",
    "mask-85": "--mask-ratio 0.85",
    "mask-90": "--mask-ratio 0.9",
    "ema-99": "--ema 0.99",
    "ema-999": "--ema 0.999",
    "ema-1": "--ema 1",
    "center": "--center",
    "center-ema-999": "--center --ema 0.999",
    "decoder-1": "--decoder-depth 1",
    "decoder-4": "--decoder-depth 4",
    "decoder-wide": "--decoder-dim 128",
}
RUNS |= {f"pcae-{name}": pretraining(10, f"--method pcae --blr 8e-3 {flags}") for name, flags in CHANGES.items()}
RUNS["pcae-drop-0-short"] = pretraining(5, "--method pcae --blr 8e-3 --drop-ratio 0")
RUNS["pcae-60"] = pretraining(60, "--method pcae --blr 8e-3")
RUNS["pcae-60-ema-1"] = pretraining(60, "--method pcae --blr 8e-3 --ema 1")

# 5. Classifiers trained at each drop ratio, and all of them scored at all.
CLASSIFIERS = {"0": f"{UNIT}-10%"} | {ratio: f"ptr-{ratio}" for ratio in RATIOS[1:]}
for ratio, name in CLASSIFIERS.items():
    if ratio != "0":
        RUNS[name] = f"finetune.py --init {{{UNIT}}} {LABELS['10%']} --drop-ratio {ratio}"
    RUNS[f"{name}-eval"] = f"finetune.py --eval {{{name}}} --drop-ratio {' '.join(RATIOS)}"


# --- the tables: what to show of which run ----------------------------------------------------------------------------


class Table(NamedTuple):
    """Rows are names of runs by their labels; a column is what a run's name goes on with there, and a metric of it.

    A metric is one of the log's, `cost`, `shared`, or a drop ratio that was scored. `seeds`: meant to be run.
    """

    question: str
    title: str
    columns: dict[str, tuple[str, str]]
    rows: dict[str, str]
    seeds: tuple[int, ...] = (0, 1, 2)


FEATURES = {"GMACs an image": ("", "cost"), "neighbours": ("", "knn"), "linear": ("", "linear")}
TARGETS = FEATURES | {"shared by all targets": ("", "shared")}
ALL = FEATURES | {f"{share} of labels": (f"-{share}", "top1") for share in LABELS}
PTR = {f"drop ratio {ratio}": ("-eval", ratio) for ratio in RATIOS}
TABLES = [
    Table(
        "0", "Learning rates", TARGETS,
        {name.replace("-", ", --blr ", 1): name for name in RUNS if re.fullmatch(r"(pcae|mae|simmim)-\d.*e-3", name)},
        seeds=(0,),
    ),
    Table(
        "0", "Settings from scratch", {"10% of labels": ("-10%", "top1")},
        {
            "defaults": "scratch", "--layer-decay 1": "scratch-flat", "--blr 8e-3": "scratch-fast",
            "--layer-decay 1 --blr 8e-3": "scratch-both",
        },
        seeds=(0,),
    ),
    Table(
        "1", "Does pre-training help? At equal compute, is PCAE better?", ALL,
        {
            "PCAE, 10 epochs": UNIT, "MAE, 7 epochs": MAE, "SimMIM, 5 epochs": SIMMIM, "from scratch": SCRATCH,
            "PCAE, 10 epochs, longer fine-tuning": f"{UNIT}-long",
            "from scratch, with the compute of pre-training": "scratch-long",
        },
    ),
    Table(
        "2", "At equal epochs", FEATURES,
        {"PCAE, 10 epochs": UNIT, "MAE, 10 epochs": "mae-long", "SimMIM, 10 epochs": "simmim-long"},
    ),
    Table(
        "2", "At equal compute, a decoder of one block", FEATURES,
        {"PCAE, 10 epochs": "pcae-decoder-1", "MAE, 9 epochs": "mae-decoder-1"},
    ),
    Table(
        "3", "Does the criterion matter?", TARGETS,
        {"similarity": UNIT, "random": "pcae-random", "reverse": "pcae-reverse"},
    ),
    Table(
        "4", "Stages, 87.5 % dropped in all", TARGETS,
        {"1": "pcae-stages-1", "2": "pcae-stages-2", "3": UNIT, "4": "pcae-stages-4"},
        seeds=(0,),
    ),
    Table(
        "4", "Dropped in all, in 3 stages", TARGETS,
        {
            "0 %": "pcae-drop-0", "77 %": "pcae-drop-77", "81 %": "pcae-drop-81", "85 %": "pcae-drop-85",
            "87.5 %": UNIT, "92 %": "pcae-drop-92",
        },
        seeds=(0,),
    ),
    Table(
        "4", "PTR at equal compute", TARGETS, {"87.5 %, 10 epochs": UNIT, "0 %, 5 epochs": "pcae-drop-0-short"},
    ),
    Table(
        "4", "Mask ratio", TARGETS, {"0.75": UNIT, "0.85": "pcae-mask-85", "0.9": "pcae-mask-90"}, seeds=(0,),
    ),
    Table("5", "PTR in the classifier", PTR, {f"trained at {ratio}": name for ratio, name in CLASSIFIERS.items()}),
    Table(
        "6", "Momentum of the teacher", TARGETS,
        {"0.99": "pcae-ema-99", "0.999": "pcae-ema-999", "0.9999": UNIT, "1: stands still": "pcae-ema-1"},
        seeds=(0,),
    ),
    Table(
        "6", "Momentum of the teacher, 60 epochs", TARGETS,
        {"0.9999": "pcae-60", "1: stands still": "pcae-60-ema-1"},
        seeds=(0,),
    ),
    Table(
        "6", "Targets without what they share", TARGETS,
        {
            "0.9999": UNIT, "0.9999, --center": "pcae-center",
            "0.999": "pcae-ema-999", "0.999, --center": "pcae-center-ema-999",
        },
    ),
    Table(
        "6", "Decoder, blocks x width", TARGETS,
        {"1 x 64": "pcae-decoder-1", "2 x 64": UNIT, "4 x 64": "pcae-decoder-4", "2 x 128": "pcae-decoder-wide"},
        seeds=(0,),
    ),
]  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------------


def starts_from(name: str) -> str | None:
    """The run whose checkpoint this one needs."""
    found = re.search(r"\{(.+?)\}", RUNS[name])
    return found and found[1]


def folder(name: str, seed: int, out: Path) -> Path:
    """Where a run's files are; the scores of a classifier lie with it, and go when it is trained anew."""
    return folder(starts_from(name), seed, out) if " --eval " in RUNS[name] else out / name / f"seed-{seed}"


def command(name: str, seed: int, out: Path, extra: list[str]) -> list[str]:
    """The words of a run's command line."""
    text, start = RUNS[name], starts_from(name)
    words = shlex.split(text)
    if start:
        words = [str(folder(start, seed, out) / "last.pt") if word == f"{{{start}}}" else word for word in words]
    own = [] if "--eval" in words else ["--seed", str(seed), "--out", str(folder(name, seed, out))]
    return words + own + extra


def needed(tables: list[Table], seeds: list[int] | None) -> list[tuple[str, int]]:
    """The runs that fill tables, each once and behind the one it starts from: names and seeds."""
    runs: dict[tuple[str, int], None] = {}

    def add(name: str, seed: int) -> None:
        if start := starts_from(name):
            add(start, seed)
        runs[name, seed] = None

    for table in tables:
        names = [base + suffix for base in table.rows.values() for suffix, _ in table.columns.values()]
        for seed in seeds or table.seeds:
            for name in names:
                if name in RUNS:
                    add(name, seed)
    return list(runs)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; none where there is no such run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_finished(name: str, seed: int, out: Path, extra: list[str]) -> bool:
    """Whether a run is in its folder, whole. Raises UserError where another one is."""
    words, path = command(name, seed, out, extra), folder(name, seed, out)
    if "--eval" in words:
        return (path / "scores.txt").exists() and is_finished(starts_from(name), seed, out, extra)
    rows = read_log(path / "metrics.jsonl")
    if not rows:
        return False
    script = SCRIPTS[words[0]]
    args, given = engine.parse_arguments(script.arguments(), script.RECIPES, words[1:])
    saved = json.loads((path / "args.json").read_text())
    engine.check_settings(saved, {flag: given[flag] for flag in given if flag not in engine.FREE}, path)
    return rows[-1]["epoch"] == args.epochs


def run(name: str, seed: int, out: Path, extra: list[str]) -> None:
    """Run a command, from where it was interrupted if it was. Raises UserError where it fails."""
    words, path = command(name, seed, out, extra), folder(name, seed, out)
    scores = "--eval" in words
    if (path / "last.pt").exists() and not scores:
        words.append("--resume")
    print(f"python {shlex.join(words)}", flush=True)
    process = [sys.executable, str(Path(__file__).with_name(words[0])), *words[1:]]
    result = subprocess.run(process, stdout=subprocess.PIPE if scores else None, text=True)
    if result.returncode:
        raise UserError(f"the run above ended with code {result.returncode}; the next call goes on from there")
    if scores:
        print(result.stdout)
        engine.replace_file(path / "scores.txt", lambda file: file.write(result.stdout.encode()))


# --- tables -----------------------------------------------------------------------------------------------------------


def cost(words: list[str]) -> float:
    """Multiply-accumulates for an image in a pre-training, forward and backward through all epochs, in 10^9."""
    args, _ = pretrain.read_settings(words[1:])
    model, encoder = pretrain.build_model(args)
    image = torch.zeros(1, args.channels, *encoder["image_size"])
    return engine.count_macs(model, image, backward=True) * args.epochs / 1e9


def score(path: Path, metric: str) -> float:
    """A number in [0, 1] from a run's folder: its log's after the last epoch, or of a drop ratio. Raises UserError."""
    if metric in RATIOS:
        for line in (path / "scores.txt").read_text().splitlines():
            if line.split()[:1] == [metric]:
                return float(line.split()[3].rstrip("%")) / 100
        raise UserError(f"{path / 'scores.txt'} does not say what drop ratio {metric} gives: delete it, run this again")
    row = read_log(path / "metrics.jsonl")[-1]
    return 1 - row["target_std"] ** 2 if metric == "shared" else row[metric]


def cell(name: str, metric: str, out: Path, extra: list[str], only: list[int] | None) -> str:
    """What a table says of a run: the mean over the seeds that are finished, with the lowest and the highest."""
    if name not in RUNS:
        return ""
    if metric == "cost":
        return f"{cost(command(name, 0, out, extra)):.2f}" if RUNS[name].startswith("pretrain.py") else ""
    folders = folder(name, 0, out).parent.glob("seed-*")
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in folders if path.name[5:].isdigit())
    seeds = [seed for seed in seeds if seed in (only or seeds) and is_finished(name, seed, out, extra)]
    values = [100 * score(folder(name, seed, out), metric) for seed in seeds]
    if not values:
        return "-"
    text = f"{sum(values) / len(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def markdown(table: Table, out: Path, extra: list[str], only: list[int] | None = None) -> str:
    """A table of what is finished, of `only` some seeds; empty cells are no runs, dashes runs to come."""
    lines = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    for label, base in table.rows.items():
        columns = table.columns.values()
        lines.append([label, *(cell(base + suffix, metric, out, extra, only) for suffix, metric in columns)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.question}. {table.title} (scores in %)\n\n{rows}\n"


# --- the command line -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = engine.flag_parser(__doc__)
    questions = sorted({table.question for table in TABLES})
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"{', '.join(questions)} (default: all)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="to run and to show (default: run 0 1 2, or 0, show all)"
    )
    parser.add_argument("--out", default="runs/study", metavar="FOLDER", help="of all runs (default: runs/study)")
    parser.add_argument("--data", help="other than shapes: cifar10, stl10, a folder with train/ and val/")
    parser.add_argument("--data-root", metavar="FOLDER", help="where torchvision's sets lie")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and which of them are done")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is finished")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.questions) - set(questions))
    if unknown:
        raise UserError(f"there is no question {unknown[0]}: choose among {' '.join(questions)}")

    out = Path(args.out)
    flags = {"--data": args.data, "--data-root": args.data_root}
    extra = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    tables = [table for table in TABLES if not args.questions or table.question in args.questions]
    if not args.tables:
        for name, seed in needed(tables, args.seeds):
            done = is_finished(name, seed, out, extra)
            if args.dry_run:
                print(f"python {shlex.join(command(name, seed, out, extra))}{'  # done' if done else ''}")
            elif not done:
                run(name, seed, out, extra)
    if not args.dry_run:
        print("\n".join(markdown(table, out, extra, args.seeds) for table in tables))


if __name__ == "__main__":
    engine.launch(main)
