"""Cost of each method: MACs equal closed forms; the timed step is complete; the command runs."""

import argparse
import runpy

import pytest
import torch

import benchmark
from baselines import MAE, SimMIM
from helpers import ROOT
from model import MODELS, PCAE, Classifier, ViT
from ptr import PTR, drop_blocks
from report import at_largest_batch
from util import profiling


def blocks_macs(counts, dim):
    """Return MACs of blocks with `counts` tokens: q, k, v, projection, MLP; then the two products of attention."""
    return sum(n * 12 * dim**2 + 2 * n**2 * dim for n in counts)


def step_macs(method, visible, seen, blocks, *, dim, pixels, width):
    """Return MACs of a training step per image. `seen`: tokens that enter each block of the teacher, then the retained.

    Trained parts cost three forward passes (output, gradients of weights and of input), the patch embedding only two,
    because images need no gradient. The teacher costs one forward pass.
    """
    masked, depth, embedding = seen[0], len(seen) - 1, 2 * visible * pixels * dim
    if method is SimMIM:
        return embedding + 3 * (blocks_macs([visible + masked + 1] * depth, dim) + masked * dim * pixels)
    queries, out = (seen[-1], dim) if method is PCAE else (masked, pixels)
    decoder = (visible + 1) * dim * width + blocks_macs([visible + 1 + queries] * blocks, width) + queries * width * out
    teacher = masked * pixels * dim + blocks_macs(seen[:-1], dim) if method is PCAE else 0
    return embedding + 3 * (blocks_macs([visible + 1] * depth, dim) + decoder) + teacher


@pytest.mark.parametrize(
    "mask_ratio, visible, seen",
    [
        (0.75, 49, [147] + [73] * 4 + [36] * 4 + [18] * 4),
        (0.9, 19, [177] + [88] * 4 + [44] * 4 + [22] * 4),
    ],
)
def test_macs_of_a_step(mask_ratio, visible, seen):
    options = dict(mask_ratio=mask_ratio, decoder_dim=512, decoder_depth=2, decoder_heads=16)
    with torch.device("meta"):
        pcae = PCAE(ViT(), ptr=PTR(drop_blocks(12, 3), 0.5), **options)
        models = pcae, MAE(ViT(), **options), SimMIM(ViT(), mask_ratio=mask_ratio)
    for model in models:
        macs = profiling.count_macs(model, torch.zeros(1, 3, 224, 224), backward=True)
        assert macs == step_macs(type(model), visible, seen, dim=768, pixels=768, width=512, blocks=2)


@pytest.mark.parametrize("ptr, counts", [(PTR(), [197] * 12), (PTR((1, 5), 0.4), [197] * 2 + [118] * 4 + [71] * 6)])
def test_macs_of_a_classifier(ptr, counts):
    with torch.device("meta"):
        classifier = Classifier(ViT(), 1000)
    macs = profiling.count_macs(classifier, torch.zeros(1, 3, 224, 224), ptr=ptr)
    assert macs == 196 * 768 * 768 + blocks_macs(counts, 768) + 768 * 1000


@pytest.mark.parametrize("method", [PCAE, MAE, SimMIM])
def test_the_timed_step_updates_all_networks(method):
    model = method(ViT((8, 8), 2, **MODELS["vit_mini"]))
    before = [parameter.clone() for parameter in model.parameters()]
    benchmark.training_step(model, torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), "fp32", compiled=False)()
    pairs = zip(model.named_parameters(), before, strict=True)
    moved = {name.partition(".")[0] for (name, new), old in pairs if not torch.equal(new, old)}
    assert moved == {name for name, _ in model.named_children()}  # the teacher, too
    assert all(parameter.grad is None for parameter in model.parameters())


# The rows of PRETRAINING for vit_mini on 4 x 4 patches: visible patches, the teacher's tokens, decoder blocks.
CASES = [
    (PCAE, 4, [12, 6, 3, 1, 1], 2),
    (PCAE, 2, [14, 7, 3, 1, 1], 2),
    (PCAE, 1, [15, 7, 3, 1, 1], 2),
    (MAE, 4, [12] * 5, 8),
    (SimMIM, 4, [12] * 5, 0),
    (MAE, 4, [12] * 5, 2),
    (PCAE, 4, [12, 6, 3, 1, 1], 8),
    (PCAE, 4, [12] * 5, 2),
]


def test_command_line(tmp_path, capsys):
    sizes = "--model vit_mini --image-size 32 --patch-size 8 --batch-size 2 --rounds 3 --device cpu"
    benchmark.main([*sizes.split(), "--markdown", str(tmp_path / "tables.md")])
    tables, printed = [], capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == printed
    for line in printed.splitlines():
        if line.startswith("## "):
            tables.append([])
        elif line.startswith("| "):
            tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
    methods, schedules, classifier, readers = (rows[2:] for rows in tables)  # below the header
    for cells, (method, visible, seen, blocks) in zip(methods, CASES, strict=True):
        assert cells[0].startswith(method.__name__) and cells[1] == " ".join(map(str, seen)) * (method is PCAE)
        macs = step_macs(method, visible, seen, dim=64, pixels=192, width=32, blocks=blocks)
        assert float(cells[2]) == pytest.approx(macs / 1e9, rel=1e-3)
        days = 300 * 1_281_167 / float(cells[3].replace(",", "")) / 86_400
        assert float(cells[8].replace(",", "")) == pytest.approx(days, rel=0.01)
    assert float(methods[0][10]) < float(methods[5][10]) < float(methods[4][10])  # memory: PCAE, MAE, SimMIM
    assert len(schedules) == len(benchmark.SCHEDULES) and len(readers) == 4
    for cells, (one, two) in zip(classifier, [(16, 16), (14, 12), (12, 9), (11, 7), (9, 5)], strict=True):
        macs = 16 * 192 * 64 + blocks_macs([17, one + 1, two + 1, two + 1], 64) + 64 * 1000
        assert int(cells[1]) == two and float(cells[2]) == pytest.approx(macs / 1e9, rel=1e-3)


def report_rows(tmp_path, capsys, batch_size):
    """Return the rows of a report by their first cell."""
    sizes = "--model vit_mini --image-size 32 --patch-size 8 --rounds 1 --device cpu --report".split()
    benchmark.main([*sizes, str(tmp_path / "page.md"), "--batch-size", str(batch_size)])
    page = (tmp_path / "page.md").read_text()
    assert page == capsys.readouterr().out and torch.__version__ in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if cells}


def test_report(tmp_path, capsys):
    """One page has five training steps, inference at five drop ratios, and the loader's speed."""
    rows = report_rows(tmp_path, capsys, 2)
    assert {"0", "0.1", "0.2", "0.3", "0.4", "JPEG, as pretrain.py reads it"} < rows.keys()
    macs = [step_macs(*case, dim=64, pixels=192, width=32) for case in CASES[:5]]
    for (name, *_), work in zip(benchmark.PRETRAINING[:5], macs, strict=True):
        batch_size, images_per_second, _, by_macs, *_, days = rows[name]
        assert batch_size == "2" and float(by_macs) == pytest.approx(macs[0] / work, abs=0.006)
        seconds = 300 * 1_281_167 / float(images_per_second.replace(",", ""))
        assert float(days.replace(",", "")) == pytest.approx(seconds / 86_400, rel=0.01)


def test_a_step_out_of_memory_is_a_row_of_the_report(tmp_path, capsys):
    rows = report_rows(tmp_path, capsys, 2**40)
    for name, *_ in benchmark.PRETRAINING[:5]:
        (reason,) = rows[name]
        assert "memory" in reason
    assert "JPEG, as pretrain.py reads it" in rows


def test_the_largest_batch():
    """The batch is halved until a step fits in memory; if a single image does not fit, the error is raised."""
    done = []

    def make_step(batch_size, limit=5):
        def step():
            if batch_size > limit:
                raise torch.OutOfMemoryError
            done.append(batch_size)

        return step

    step, batch_size = at_largest_batch(make_step, 16)
    step()
    assert batch_size == 4 and done == [4, 4]
    with pytest.raises(torch.OutOfMemoryError):
        at_largest_batch(lambda batch_size: make_step(batch_size, limit=0), 16)


@pytest.mark.parametrize("case", benchmark.PRETRAINING[3:5])
def test_the_prediction_for_gpus_counts_the_same_macs(case):
    sizes = argparse.Namespace(model="vit_mini", image_size=224, patch_size=16, decoder_dim=None)
    macs = profiling.count_macs(benchmark.build(sizes, *case[1:-2]), torch.zeros(1, 3, 224, 224), backward=True)
    step = runpy.run_path(str(ROOT / "docs/predict.py"))["Step"]("vit_mini", case, batch_size=2)
    assert step.flop == 2 * 2 * macs and step.kept > 0


@pytest.mark.parametrize("flags", ["--image-size 18", "--decoder-dim 30", "--report x.md"])
def test_mistakes(flags):
    with pytest.raises(SystemExit, match="error"):
        benchmark.main(["data", *flags.split()])
