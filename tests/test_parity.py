"""PCAE equals the authors' code: every step is compared with a recording.

The recording was made once by running the authors' release with a small model on four images. It has weights, inputs,
the split's noise, scores and tokens kept at each stage, latents, prediction, loss, gradients, and the weights after
one AdamW and EMA step. `PCAE_PARITY` names the file, which is not part of this repository; without the variable these
tests are skipped. Tokens may have any order, so they are compared in ascending order of patch ids.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from model import PCAE, ViT, sincos_position_embedding, split_patches
from ptr import PTR, drop_blocks, gather_tokens, num_kept, redundancy, select_tokens
from util.training import ema_momentum, warmup_cosine

if not os.environ.get("PCAE_PARITY"):
    pytest.skip("PCAE_PARITY does not name a recording", allow_module_level=True)

RECORD = torch.load(os.environ["PCAE_PARITY"], weights_only=True)
CASES = list(RECORD["cases"])
IMAGES = RECORD["imgs"]


def our_name(name):
    """Map the authors' name of a parameter to ours."""
    if name.startswith("decoder_"):
        return "decoder." + name.removeprefix("decoder_")
    return "decoder.mask_token" if name == "mask_token" else "student." + name


def our_state(student, teacher):
    return {our_name(k): v for k, v in student.items()} | {"teacher." + k: v for k, v in teacher.items()}


def load(case):
    """Return a case and its model with the recorded weights."""
    case, arch = RECORD["cases"][case], RECORD["meta"]["arch"]
    side, depth, cfg = arch["img_size"], arch["depth"], case["cfg"]
    student = ViT((side, side), arch["patch_size"], dim=arch["embed_dim"], depth=depth, heads=arch["num_heads"])
    model = PCAE(
        student,
        mask_ratio=cfg["mask_ratio"],
        ptr=PTR(drop_blocks(depth, cfg["drop_stage"]), 1 - cfg["keep_ratio"]),
        decoder_dim=arch["decoder_embed_dim"],
        decoder_depth=arch["decoder_depth"],
        decoder_heads=arch["decoder_num_heads"],
    )
    model.load_state_dict(our_state(RECORD["student_state"], RECORD["teacher_state"]))
    return case, model


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def by_patch(values, ids):
    """Sort per-token values (B, n[, D]) by patch ids (B, n)."""
    order = ids.argsort(dim=1)
    return values.gather(1, order) if values.dim() == 2 else gather_tokens(values, order)


def assert_same_tokens(ours, our_ids, theirs, their_ids):
    assert torch.equal(our_ids.sort(dim=1).values, their_ids.sort(dim=1).values)
    assert_close(by_patch(ours, our_ids), by_patch(theirs, their_ids))


@pytest.mark.parametrize("case", CASES)
def test_split_and_schedule(case):
    case, model = load(case)
    visible, masked = split_patches(case["mask_noise"], case["cfg"]["mask_ratio"])
    assert torch.equal(visible.sort(dim=1).values, case["student_ids_keep"].sort(dim=1).values)
    assert torch.equal(masked.sort(dim=1).values, case["ids_remove"].sort(dim=1).values)
    assert list(model.ptr.blocks) == case["drop_indices"]
    assert model.token_counts == case["teacher_token_counts"]


def test_positions():
    for theirs in (RECORD["student_state"]["pos_embed"], RECORD["student_state"]["decoder_pos_embed"]):
        assert_close(sincos_position_embedding(theirs.shape[-1], (8, 8)), theirs)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_teacher_by_stages_and_whole(case):
    case, model = load(case)
    stages = iter(zip(case["stage_scores"], case["stage_ids_keep"], strict=True))
    _, masked = split_patches(case["mask_noise"], model.mask_ratio)
    ids, their_ids = masked, case["ids_remove"]
    x = model.teacher.embed(IMAGES, ids, class_token=False)
    for i, block in enumerate(model.teacher.blocks):
        x = block(x)
        if i in model.ptr.blocks:
            scores, kept_of_previous = next(stages)
            assert_same_tokens(redundancy(x), ids, scores, their_ids)
            kept = select_tokens(x, num_kept(x.shape[1], model.ptr.drop_ratio))
            x, ids, their_ids = gather_tokens(x, kept), ids.gather(1, kept), their_ids.gather(1, kept_of_previous)
            assert torch.equal(ids.sort(dim=1).values, their_ids.sort(dim=1).values)
    assert next(stages, None) is None, "as many stages as recorded"
    latent, retained, _ = model.teacher(IMAGES, masked, class_token=False, ptr=model.ptr)
    assert_same_tokens(latent, retained, case["teacher_latent"], case["teacher_ids_keep"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_student_decoder_and_loss(case):
    case, model = load(case)
    seen = {}
    model.student.register_forward_hook(lambda _, inputs, output: seen.update(student=output.tokens))
    model.decoder.embed.register_forward_hook(lambda _, inputs, output: seen.update(embed=output))
    model.decoder.blocks[-1].register_forward_hook(lambda _, inputs, output: seen.update(blocks=output))
    out = model(IMAGES, case["mask_noise"])
    their_visible, their_retained = case["student_ids_keep"], case["teacher_ids_keep"]

    for ours, theirs in ((seen["student"], case["student_latent"]), (seen["embed"], case["decoder_embed"])):
        assert_close(ours[:, 0], theirs[:, 0])  # the class token
        assert_same_tokens(ours[:, 1:], out.visible, theirs[:, 1:], their_visible)

    # class, visible, queried tokens; our decoder normalises only the queried ones
    cuts = [1, out.visible.shape[1], out.retained.shape[1]]
    cls, visible, queried = model.decoder.norm(seen["blocks"]).split(cuts, dim=1)
    their_cls, their_seen, their_queried = case["decoder_latent"].split(cuts, dim=1)
    assert_close(cls, their_cls)
    assert_same_tokens(visible, out.visible, their_seen, their_visible)
    assert_same_tokens(queried, out.retained, their_queried, their_retained)

    assert_same_tokens(out.prediction, out.retained, case["prediction"], their_retained)
    # the authors divide by the unbiased variance; only the direction enters the loss
    target, their_target = (F.normalize(t, dim=-1) for t in (out.target, case["target"]))
    assert_same_tokens(target, out.retained, their_target, their_retained)
    assert_close(out.loss, case["loss"])


def test_gradients_and_a_step():
    case, model = load("default")
    step, grads = RECORD["step"], {our_name(name): grad for name, grad in case["grads"].items()}
    model(IMAGES, case["mask_noise"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == grads.keys()
    for name, p in trained.items():
        assert_close(p.grad, grads[name], atol=1e-6)

    no_decay = {our_name(name) for name in step["no_decay"]}  # theirs decays class and mask token, ours does not
    groups = [
        {"params": [p for name, p in trained.items() if name not in no_decay], "weight_decay": step["weight_decay"]},
        {"params": [p for name, p in trained.items() if name in no_decay], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=step["lr"], betas=step["betas"], eps=step["eps"]).step()
    model.update_teacher(step["momentum"])
    ours, theirs = model.state_dict(), our_state(step["student_after"], step["teacher_after"])
    assert ours.keys() == theirs.keys()
    for name in theirs:
        allowed = torch.tensor(1e-6)  # a tolerance of 1e-5 would hide weight decay (3e-5 of a weight)
        if name in trained:
            # Adam divides by |gradient| + eps, so steps differ where the gradient is rounding noise
            grad, noise = trained[name].grad.abs(), (trained[name].grad - grads[name]).abs()
            allowed = allowed + torch.where(grad < 1e-6, step["lr"] / step["eps"] * noise, 0.0)
        assert ((ours[name] - theirs[name]).abs() <= allowed).all(), name


def test_schedules():
    rates, momentum = RECORD["schedules"]["pretrain_lr"], RECORD["schedules"]["momentum"]
    cfg, theirs = rates["cfg"], momentum["values"]  # learning rate at some epochs, momentum at each step
    shape = dict(peak=cfg["lr"], total=cfg["epochs"], warmup=cfg["warmup_epochs"])
    assert [warmup_cosine(epoch, **shape) for epoch in rates["epochs"]] == pytest.approx(rates["lr"], abs=1e-12)
    base, total = momentum["cfg"]["base"], len(theirs)
    assert [ema_momentum(step, base=base, total=total) for step in range(total)] == pytest.approx(theirs, rel=1e-12)
