"""The benchmark: MACs against closed forms, ratios and memory against hand counts, steps that train, its tables."""

import argparse
import json
import time

import pytest
import torch
from torch import nn

import baselines
import benchmark
import data
import engine
from engine import UserError
from helpers import flags
from model import MODELS, PCAE, ViT
from ptr import PTR, drop_blocks, token_counts

CPU = engine.World(0, 1, torch.device("cpu"))
TINY = dict(model="vit_mini", image_size=16, patch_size=4, batch_size=2, rounds=3, device="cpu")


def settings(**changes):
    return argparse.Namespace(**(vars(benchmark.arguments().parse_args(flags(TINY))) | changes))


# --- MACs -------------------------------------------------------------------------------------------------------------


def blocks_macs(counts, dim):
    """Transformer blocks on so many tokens each: q, k, v, projection and MLP, then attention's two products."""
    return sum(n * 12 * dim**2 + 2 * n**2 * dim for n in counts)


@pytest.mark.parametrize("name, size, patch", [("vit_base", 224, 16), ("vit_mini", 32, 4)])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.9])
def test_macs_of_a_step(name, size, patch, mask_ratio):
    """A trained layer costs its forward pass three times, but twice where nothing before it is trained."""
    sizes, n = MODELS[name], (size // patch) ** 2
    dim, depth, pixels, width, blocks = sizes["dim"], sizes["depth"], 3 * patch**2, 64, 2
    visible = {0.75: n // 4, 0.9: int(n * 0.1)}[mask_ratio]
    masked = n - visible
    ptr = PTR(drop_blocks(depth, 3), 0.5)
    options = dict(mask_ratio=mask_ratio, decoder_dim=width, decoder_depth=blocks, decoder_heads=4)

    def vit():
        return ViT((size, size), patch, **sizes)

    def decoder(queried, out):
        n = visible + 1
        return n * dim * width + blocks_macs([n + queried] * blocks, width) + queried * width * out

    counts = token_counts(masked, depth, ptr)
    student = blocks_macs([visible + 1] * depth, dim)
    light = decoder(counts[-1], dim)
    teacher = masked * pixels * dim + blocks_macs(counts[:-1], dim)
    heavy = decoder(masked, pixels)
    whole = blocks_macs([n + 1] * depth, dim) + masked * dim * pixels
    embedding = visible * pixels * dim
    with torch.device("meta"):
        models = {
            PCAE(vit(), ptr=ptr, **options): (student + light, teacher),
            baselines.MAE(vit(), **options): (student + heavy, 0),
            baselines.SimMIM(vit(), mask_ratio=mask_ratio): (whole, 0),
        }
    image = torch.zeros(1, 3, size, size)
    for model, (trained, fixed) in models.items():
        assert engine.count_macs(model, image) == embedding + trained + fixed
        assert engine.count_macs(model, image, backward=True) == 2 * embedding + 3 * trained + fixed


# --- speeds -----------------------------------------------------------------------------------------------------------


def test_speeds_are_compared_round_by_round():
    reference = benchmark.Measured([2.0, 4.0, 30.0], batch_size=8, macs=100)
    other = benchmark.Measured([1.0, 8.0, 10.0], batch_size=8, macs=50)
    assert other.speed(reference) == (2.0, 0.5, 3.0)  # ratios 2, .5 and 3
    assert other.images_per_second == 1.0 and reference.speed(reference) == (1.0, 1.0, 1.0)


def test_all_take_turns_with_the_matrix_product(monkeypatch):
    seen = []

    def turns(functions, device, rounds):
        for function in functions:
            function()
        return [[float(i + 1)] * rounds for i in range(len(functions))]

    monkeypatch.setattr(engine, "take_turns", turns)
    runs = [lambda: seen.append("a"), lambda: seen.append("b")]
    measured, rate = benchmark.measure(settings(rounds=3), runs, [10, 20], torch.device("cpu"))
    assert seen == ["a", "b"] and [one.seconds for one in measured] == [[1.0] * 3, [2.0] * 3]
    assert [one.macs for one in measured] == [10, 20] and rate == 1536**3 / 3.0


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_for_backward():
    """A linear layer keeps its input, a ReLU its output, which the next layer keeps as well; and the weights."""
    layers = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 5), nn.Sigmoid())
    weights = 30 * 5  # the first layer's are not needed: no gradient goes to the images
    for batch in (1, 4):
        kept = benchmark.kept_for_backward(layers, torch.randn(batch, 10))
        assert kept == 4 * (batch * (10 + 30 + 5) + weights)


def test_parts_of_one_tensor_are_kept_once():
    class Gate(nn.Linear):
        def forward(self, x):
            a, b = super().forward(x).chunk(2, dim=-1)
            return a * b

    assert benchmark.kept_for_backward(Gate(10, 30), torch.randn(4, 10)) == 4 * 4 * (10 + 30)


def test_activations_of_an_image_do_not_depend_on_weights():
    for width, expected in ((4, 4 * (3 * 8 * 8 + 4)), (400, 4 * (3 * 8 * 8 + 400))):
        layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, 1))
        found = benchmark.activation_memory(settings(image_size=8, precision="fp32"), layers, torch.device("cpu"))
        assert found == expected


def test_pcae_keeps_less_than_mae():
    """Of MAE's light decoder it decodes only a part, and the teacher keeps nothing."""
    found = {}
    for method in ("pcae", "mae", "simmim"):
        model, _ = benchmark.training_step(settings(image_size=32), dict(method=method), CPU)
        found[method] = benchmark.activation_memory(settings(image_size=32), model, torch.device("cpu"))
    assert found["pcae"] < found["mae"] < found["simmim"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu():
    def step():
        torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")

    assert 64 * 2**20 <= benchmark.peak_memory(step, torch.device("cuda")) < 65 * 2**20


# --- training steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", benchmark.PRETRAINING, ids=lambda case: case.name)
def test_steps_train(case):
    """Every row is a whole step of what it says: forward, backward, AdamW and, in PCAE, the teacher's."""
    model, step = benchmark.training_step(settings(), case.settings, CPU)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [step(), step()]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    # A bias may have no gradient, and the teacher's small steps leave a norm's weight of 1 where it is.
    trained = {name for name in before if "norm" not in name and not name.endswith(("bias", "pos_embed"))}
    assert trained - {"teacher.cls_token"} <= moved
    assert ("teacher.blocks.0.attn.qkv.weight" in moved) == (case.settings["method"] == "pcae")
    assert case.name.split(",")[0].split()[0].lower() == case.settings["method"]


def test_rows_of_the_poster():
    by_name = {case.name: case for case in benchmark.PRETRAINING}
    poster = {name: round(case.poster, 3) for name, case in by_name.items() if case.poster}
    assert list(poster.values()) == [1.0, 1.344, 1.591, 0.656]
    assert benchmark.PRETRAINING[0].poster == 1.0, "what the others are compared with"
    assert [case.settings.get("mask_ratio") for case in benchmark.PRETRAINING[:3]] == [0.75, 0.85, 0.9]
    kept = {}
    for stages, ratio in benchmark.SCHEDULES:
        kept[stages, ratio] = token_counts(147, 12, PTR(drop_blocks(12, stages), ratio))[-1]
    assert kept == {
        (3, 0.5): 18, (1, 0.875): 18, (6, 0.29): 17, (12, 0.16): 16, (3, 0.37): 35, (3, 0.415): 28, (3, 0.47): 21,
        (3, 0.536): 14,
    }  # fmt: skip


@pytest.mark.parametrize("model, dim, heads", [
    ("vit_base", 512, 16), ("vit_small", 256, 8), ("vit_tiny", 128, 4), ("vit_mini", 32, 1),
])  # fmt: skip
def test_decoders_are_as_wide_for_their_encoder_as_the_papers(model, dim, heads):
    pcae, _ = benchmark.training_step(settings(model=model), dict(method="pcae"), CPU)
    assert pcae.decoder.embed.out_features == dim and pcae.decoder.blocks[0].attn.heads == heads
    pcae, _ = benchmark.training_step(settings(decoder_dim=96), dict(method="pcae"), CPU)
    assert pcae.decoder.embed.out_features == 96


def test_tokens_of_the_teacher():
    with torch.device("meta"):
        model = PCAE(ViT(), ptr=PTR((0, 4, 8), 0.5))
    assert benchmark.describe_tokens(model) == "147 73x4 36x4 18x3 -> 18"
    assert benchmark.describe_tokens(nn.Linear(1, 1)) == ""


# --- anatomy and data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation, part", [
    ("aten::mm", "matrix products, attention"), ("aten::addmm", "matrix products, attention"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "matrix products, attention"),
    ("aten::mul_", "gradient clipping"), ("aten::_fused_adamw_", "AdamW"), ("aten::add_", "LayerNorm, GELU, sums"),
    ("aten::native_layer_norm_backward", "LayerNorm, GELU, sums"), ("aten::lerp_", "teacher's step"),
    ("aten::topk", "split, PTR, gathers"), ("aten::copy_", benchmark.REST), ("aten::mul", benchmark.REST),
])  # fmt: skip
def test_parts(operation, part):
    assert benchmark.part_of(operation) == part


def test_parts_make_up_the_step():
    """A large product takes most of the time that a call takes, and the parts add up to it."""
    a = torch.randn(600, 600)

    def step():
        (a @ a).sort(dim=1)

    start = time.perf_counter()
    seconds = benchmark.operation_seconds(step, torch.device("cpu"), steps=5)
    assert 0 < sum(seconds.values()) <= (time.perf_counter() - start) / 5
    assert seconds["matrix products, attention"] > 0 and seconds["split, PTR, gathers"] > 0
    assert all(taken == 0 for part, taken in seconds.items() if part in ("AdamW", "teacher's step"))
    assert all(taken >= 0 for taken in seconds.values())


def test_every_part_of_pcae_is_found():
    _, step = benchmark.training_step(settings(), dict(method="pcae"), CPU)
    assert all(taken > 0 for taken in benchmark.operation_seconds(step, torch.device("cpu")).values())


def test_photographs(tmp_path):
    for path in benchmark.write_photographs(tmp_path, 2):
        assert data.read_image(path).shape == (3, 375, 500) and 40_000 < path.stat().st_size < 120_000


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SCHEDULES", [(3, 0.5), (1, 0.875), (6, 0.29)])
        benchmark.main(flags(TINY | dict(markdown=folder / "a.md", json=folder / "a.json")))
    return (folder / "a.md").read_text(), json.loads((folder / "a.json").read_text())


def test_tables(report):
    text, content = report
    assert list(content) == ["machine", "settings", *benchmark.SECTIONS]
    assert content["settings"]["model"] == "vit_mini" and content["machine"] in text and torch.__version__ in text
    rows = content["pretrain"]["rows"]
    assert [row["trained"] for row in rows] == [case.name for case in benchmark.PRETRAINING]
    for row in rows:
        assert 1.5 * row["GMACs forward"] < row["GMACs a step"] < 3 * row["GMACs forward"]
        assert row["by MACs"] == pytest.approx(rows[0]["GMACs a step"] / row["GMACs a step"])
        assert row["speed"][1] <= row["speed"][0] <= row["speed"][2] and row["images/s"] > 0
        assert 0 < row["of matrix rate"] < 1 and row["activations, MiB/image"] > 0
    assert [row["drop ratio"] for row in content["inference"]["rows"]] == ["0", "0.1", "0.2", "0.3", "0.4"]
    assert [row["tokens at the end"] for row in content["inference"]["rows"]] == [16, 12, 9, 7, 5]
    assert [row["trained"] for row in content["ablations"]["rows"]] == ["3 x 0.5", "1 x 0.875"]  # 6 do not fit 4 blocks
    assert all("poster" not in row for row in content["ablations"]["rows"])
    assert [row["part"] for row in content["profile"]["rows"]] == [*benchmark.PARTS, benchmark.REST]
    assert sum(float(row["share"].rstrip("%")) for row in content["profile"]["rows"]) == pytest.approx(100, abs=0.5)
    assert [row["images/s"] > 0 for row in content["data"]["rows"]] == [True] * 3


def test_markdown_holds_the_same_numbers(report):
    text, content = report
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    for name in benchmark.SECTIONS:
        columns, rule, *rows = lines[: len(content[name]["rows"]) + 2]
        lines = lines[len(content[name]["rows"]) + 2 :]
        assert columns == list(content[name]["rows"][0]) and set("".join(rule)) == {"-"}
        for cells, row in zip(rows, content[name]["rows"], strict=True):
            assert cells == [benchmark.show(tuple(v) if isinstance(v, list) else v) for v in row.values()]
    assert not lines


@pytest.mark.parametrize("value, text", [
    ((1.234, 1.0, 2.5), "1.23 [1.00-2.50]"), (17.57, "17.57"), (0.0123, "0.0123"), (1234.5, "1,234"), (100.0, "100"),
    (1.234, "1.23"), (0.6559, "0.656"), (None, ""), ("0.1", "0.1"), (7, "7"), (0.5, "0.5"),
])  # fmt: skip
def test_cells(value, text):
    assert benchmark.show(value) == text


def test_the_note_compares_methods_with_the_same_decoder(report):
    text, content = report
    speed = {row["trained"]: row["speed"][0] for row in content["pretrain"]["rows"]}
    light = speed["PCAE, mask .75, decoder 2"] / speed["MAE, mask .75, decoder 2"]
    heavy = speed["PCAE, mask .75, decoder 8"] / speed["MAE, mask .75, decoder 8"]
    assert f"with 2 in both PCAE is {light:.2f} times as fast, with 8 in both {heavy:.2f} times" in text


def test_compiled_rows_are_static_graphs(monkeypatch):
    """Left to itself torch makes shapes dynamic from the second model on, and compiles no more than eight."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    rows = len(benchmark.PRETRAINING) + len(benchmark.SCHEDULES) + 5
    monkeypatch.setattr(benchmark, "SCHEDULES", [(3, 0.5), (2, 0.5)])
    for section in ("ablations", "inference"):
        benchmark.main([section, *flags(TINY), "--compile"])
    assert calls == [dict(dynamic=False)] * (2 + 5)
    assert torch._dynamo.config.recompile_limit >= rows


def test_one_section(capsys):
    benchmark.main(["inference", *flags(TINY)])
    words = capsys.readouterr().out
    assert "## Inference" in words and "Pre-training" not in words


@pytest.mark.parametrize("changes, sentence", [
    (dict(batch_size=0), "--batch-size"), (dict(rounds=2), "--rounds"), (dict(image_size=18), "--image-size"),
    (dict(decoder_dim=30), "--decoder-dim"), (dict(patch_size=0), "--patch-size"), (dict(device="nowhere"), "--device"),
    (dict(markdown="no/folder.md"), "--markdown"), (dict(json="no/folder.json"), "--json"),
])  # fmt: skip
def test_mistakes(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        benchmark.main(flags(TINY | changes))
    if "image_size" in changes:
        with pytest.raises(UserError, match=sentence):
            benchmark.main(["inference", *flags(TINY | changes)])
