"""What each method costs: multiply-accumulates against closed forms, the step that is timed, one run of the command."""

import pytest
import torch

import benchmark
import scores
from baselines import MAE, SimMIM
from model import MODELS, PCAE, Classifier, ViT
from ptr import PTR, drop_blocks


def blocks_macs(counts, dim):
    """Transformer blocks on so many tokens each: q, k, v, projection and MLP, then attention's two products."""
    return sum(n * 12 * dim**2 + 2 * n**2 * dim for n in counts)


def step_macs(method, visible, seen, dim, pixels, width, blocks):
    """A training step on an image: `seen` of its masked patches enter each of the teacher's blocks, and leave the last.

    What is trained costs its forward pass three times (output, gradients of weights and of input), but the embedding
    of patches twice, since images need no gradient. The teacher costs it once.
    """
    masked, depth, embedding = seen[0], len(seen) - 1, 2 * visible * pixels * dim
    if method is SimMIM:
        return embedding + 3 * (blocks_macs([visible + masked + 1] * depth, dim) + masked * dim * pixels)
    queries, out = (seen[-1], dim) if method is PCAE else (masked, pixels)
    decoder = (visible + 1) * dim * width + blocks_macs([visible + 1 + queries] * blocks, width) + queries * width * out
    teacher = masked * pixels * dim + blocks_macs(seen[:-1], dim) if method is PCAE else 0
    return embedding + 3 * (blocks_macs([visible + 1] * depth, dim) + decoder) + teacher


@pytest.mark.parametrize("mask_ratio, visible, seen", [
    (0.75, 49, [147] + [73] * 4 + [36] * 4 + [18] * 4), (0.9, 19, [177] + [88] * 4 + [44] * 4 + [22] * 4),
])  # fmt: skip
def test_macs_of_a_step(mask_ratio, visible, seen):
    options = dict(mask_ratio=mask_ratio, decoder_dim=512, decoder_depth=2, decoder_heads=16)
    with torch.device("meta"):
        pcae = PCAE(ViT(), ptr=PTR(drop_blocks(12, 3), 0.5), **options)
        models = pcae, MAE(ViT(), **options), SimMIM(ViT(), mask_ratio=mask_ratio)
    for model in models:
        macs = scores.count_macs(model, torch.zeros(1, 3, 224, 224), backward=True)
        assert macs == step_macs(type(model), visible, seen, dim=768, pixels=768, width=512, blocks=2)


@pytest.mark.parametrize("ptr, counts", [(PTR(), [197] * 12), (PTR((1, 5), 0.4), [197] * 2 + [118] * 4 + [71] * 6)])
def test_macs_of_a_classifier(ptr, counts):
    with torch.device("meta"):
        classifier = Classifier(ViT(), 1000)
    macs = scores.count_macs(classifier, torch.zeros(1, 3, 224, 224), ptr=ptr)
    assert macs == 196 * 768 * 768 + blocks_macs(counts, 768) + 768 * 1000


@pytest.mark.parametrize("method", [PCAE, MAE, SimMIM])
def test_what_is_timed_is_a_whole_step(method):
    model = method(ViT((8, 8), 2, **MODELS["vit_mini"]))
    before = [parameter.clone() for parameter in model.parameters()]
    benchmark.training_step(model, torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), "fp32", compiled=False)()
    pairs = zip(model.named_parameters(), before, strict=True)
    moved = {name.partition(".")[0] for (name, new), old in pairs if not torch.equal(new, old)}
    assert moved == {name for name, _ in model.named_children()}  # the teacher, too
    assert all(parameter.grad is None for parameter in model.parameters())


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
    methods, schedules, classifier, readers = (rows[2:] for rows in tables)  # below the columns' names and a rule
    cases = [(PCAE, 4, [12, 6, 3, 1, 1], 2), (PCAE, 2, [14, 7, 3, 1, 1], 2), (PCAE, 1, [15, 7, 3, 1, 1], 2),
             (MAE, 4, [12] * 5, 8), (SimMIM, 4, [12] * 5, 0), (MAE, 4, [12] * 5, 2), (PCAE, 4, [12, 6, 3, 1, 1], 8),
             (PCAE, 4, [12] * 5, 2)]  # fmt: skip
    for cells, (method, visible, seen, blocks) in zip(methods, cases, strict=True):
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


@pytest.mark.parametrize("flags", ["--image-size 18", "--decoder-dim 30", "--rounds 0"])
def test_mistakes(flags):
    with pytest.raises(SystemExit, match="error"):
        benchmark.main(["data", *flags.split()])
