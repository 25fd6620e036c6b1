"""Random command lines of all three scripts: each gives a run, or one line of error and exit code 2.

    python -m pytest tests/test_fuzz.py           320 cases, always the same
    python -m pytest tests/test_fuzz.py --long    2,560 cases from other seeds (5 minutes)

Each case adds a few random flags, with sensible or absurd values, to a tiny run in this process. None may end in a
traceback, write elsewhere than in its own folder, ask for more than 3 GB, or take more than half a minute.
"""

import contextlib
import io
import random
import re
import shlex
import shutil
import traceback

import pytest
import torch
from PIL import Image

import data
import detect
import engine
import finetune
import pretrain
from helpers import flags, limits, score_few, write_classes, write_images

SCRIPTS = dict(pretrain=pretrain, finetune=finetune, detect=detect)
CASES = dict(pretrain=120, finetune=120, detect=80)  # of each seed
SECONDS, BYTES = 30, 3 * 2**30

TINY = dict(
    limit=16, batch_size=8, epochs=2, warmup_epochs=1, lr=1e-3, dim=16, depth=2, heads=2, drop_stages=2, device="cpu",
    patch_size=4, image_size=16,
)  # fmt: skip
SCORED = TINY | dict(drop_stages=None, init="none")
BASE = dict(
    pretrain=TINY | dict(ema=0.9, decoder_dim=16, decoder_heads=2, knn_every=0),
    finetune=SCORED,
    detect=SCORED | dict(
        image_size=None, heads=1, batch_size=2, short_side=32, long_side=32, channels=8, rois=4, proposals=8, limit=4,
    ),
)  # fmt: skip

# Words for numbers, names and files: usual ones, those at the edge, and those that only a slip or an enemy would type.
INTEGERS = [
    "0", "1", "2", "3", "4", "5", "7", "8", "16", "17", "20", "-1", "-2", "200", "200000", "99999999", "2147483648",
    "4294967296", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "1.5", "1e3", "0x10", "1_0", " 4",
    "٣", "½", "", "nan", "inf", "None", "True", "--", "four",
]  # fmt: skip
FLOATS = [
    "0", "0.1", "0.3", "0.5", "0.75", "0.9", "1", "1.0", "2", "10", "-0.5", "-0", "1e-9", "1e-308", "5e-324", "1e9",
    "1e30", "1e308", "1e400", "-1e400", "nan", "-nan", "inf", "-inf", "infinity", "٠٫٥", "", "1,5", "1e", "½", "x",
]  # fmt: skip
NAMES = [
    "", " ", ".", "..", "none", "shapes", "cifar10", "coco", "auto", "cpu", "cpu:7", "cuda", "cuda:99", "meta", "mps",
    "xpu", "vulkan", "privateuseone", "cpu:-1", "toaster", "nowhere", "no/such/folder", "a\nb", "\x1b[31mred",
    "größe 图", "\udcff\udcfe", "x" * 300, "y/" * 3000, "-", "*", "~", "$HOME", "%s", "{}", "con", "/dev/null",
    "/proc/self/nothing", "file", "file/below", "empty", "images", "classes", "broken", "gone", "text.pt", "empty.pt",
    "image.pt", "half.pt", "good.pt", "classifier.pt", "detector.pt", "good.safetensors", "list.pt", "nan.pt",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files and folders of all sorts to point flags at."""
    folder = tmp_path_factory.mktemp("fuzz") / "in" / "here"
    folder.mkdir(parents=True)
    write_images(folder / "images")
    write_classes(folder / "classes")
    for name in ("broken", "empty"):
        (folder / name).mkdir()
    (folder / "broken" / "a.jpg").write_text("no image")
    (folder / "gone").symlink_to("nowhere")
    (folder / "file").write_text("a file")
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "empty.pt").touch()
    Image.new("RGB", (8, 8)).save(folder / "image.pt", "PNG")
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), contextlib.chdir(folder):
        for script, name in (("pretrain", "good.pt"), ("finetune", "classifier.pt"), ("detect", "detector.pt")):
            SCRIPTS[script].main(flags(BASE[script] | dict(out="made", epochs=1, warmup_epochs=0)))
            (folder / "made" / "last.pt").rename(folder / name)
    whole = (folder / "good.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "good.safetensors").write_bytes(whole)
    torch.save([1, 2, 3], folder / "list.pt")
    content = torch.load(folder / "good.pt", weights_only=True)
    content["student"]["norm.bias"][0] = float("nan")
    torch.save(content, folder / "nan.pt")
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_images_to_score():
    with pytest.MonkeyPatch.context() as patch:
        score_few(patch, 20)
        patch.setattr(torch, "compile", lambda model, **options: model)  # takes a minute
        patch.setitem(data.NUM_SCENES, "train", 4)
        patch.setitem(data.NUM_SCENES, "val", 2)
        yield


# --- drawing a command line -------------------------------------------------------------------------------------------


def draw_value(action, draw):
    """A word for a flag: one of its choices or of its kind, at times one of another kind."""
    pools = {int: INTEGERS, float: FLOATS, None: NAMES}
    pool = list(action.choices) if action.choices is not None else pools[action.type]
    if draw.random() < 0.15:
        pool = draw.choice([INTEGERS, FLOATS, NAMES])
    return str(draw.choice(pool))


def draw_words(script, draw):
    """The flags of one case."""
    words = flags(BASE[script] | dict(out="run"))
    dry = ["--dry-run"] if draw.random() < 0.7 else []
    actions = [a for a in SCRIPTS[script].arguments()._actions if a.dest not in ("help", "download")]
    for action in draw.choices(actions, k=draw.choice([1, 1, 1, 2, 3, 5])):
        words.append(action.option_strings[-1])
        count = {0: 0, "?": draw.choice([0, 1]), "*": draw.choice([0, 1, 2]), "+": draw.choice([1, 1, 2, 3])}
        words += [draw_value(action, draw) for _ in range(count.get(action.nargs, 1))]
    words += ["--dry-run"] if "--epochs" in words[len(flags(BASE[script])) :] else dry  # which may be a billion
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words)), draw.choice([*NAMES, "--nonsense", "--epoch", "-h=1", "---"]))
    return words


# --- running it -------------------------------------------------------------------------------------------------------


BAR = re.compile(r"\d+%\||\d+it \[|^\s*$")


def outcome(script, words):
    """Run a script: None where it worked or said in one line what is wrong, else what was wrong with that; the code."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits(SECONDS, BYTES):
        try:
            engine.launch(lambda: SCRIPTS[script].main(words))
        except SystemExit as end:
            code = end.code
        except BaseException:
            return traceback.format_exc(), None
    lines = [line for line in re.split("[\r\n]", err.getvalue()) if not BAR.search(line)]
    if code == 0:
        return (f"it says {lines}" if lines else None), code
    if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable():
        return f"exit code {code}, it says {lines}", code
    return None, code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_random_command_lines(monkeypatch, pytestconfig, place, script):
    monkeypatch.chdir(place)
    seeds = [random.SystemRandom().randrange(10**9) for _ in range(8)] if pytestconfig.getoption("long") else [0]
    wrong, codes = [], []
    for seed in seeds:
        for case in range(CASES[script]):
            for left in place.glob("run*"):
                shutil.rmtree(left)
            words = draw_words(script, random.Random(f"{seed} {script} {case}"))
            problem, code = outcome(script, words)
            codes.append(code)
            if problem:
                wrong.append(f"seed {seed}, case {case}: {script}.py {shlex.join(words)}\n{problem}")
    text = "\n\n".join(wrong)
    assert not wrong, f"{len(wrong)} of {len(codes)}:\n\n{text}"
    assert 0.15 < codes.count(0) / len(codes) < 0.85, "most of what is drawn should be neither all right nor all wrong"
