"""Plain, slow reimplementation of the method as described in the paper: PCAE must give the same numbers in float64.

Images are processed one by one, as lists of tokens (D,), by elementary arithmetic. `w` are the weights by name.
"""

import math
from fractions import Fraction

import pytest
import torch

from model import PCAE, ViT
from ptr import PTR, drop_blocks
from util.training import parameter_groups

PATCH, DEPTH, HEADS = 4, 4, 2
SETTINGS = [  # image size, channels, mask ratio, stages, drop ratio, criterion
    ((16, 28), 3, 0.75, 3, 0.5, "similarity"),
    ((20, 20), 1, 0.9, 2, 0.3, "reverse"),
    ((32, 8), 3, 0.5, 0, 0, "similarity"),
]


def linear(w, name, x):
    return w[f"{name}.weight"].flatten(1) @ x + w[f"{name}.bias"]


def standardize(x, eps):
    centred = x - x.sum() / len(x)
    return centred / torch.sqrt((centred**2).sum() / len(x) + eps)


def norm(w, name, x):
    return standardize(x, 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(w, name, tokens, heads):
    """Apply attention of each token to all tokens, then the MLP, each with a residual connection."""
    qkv = torch.stack([linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)) for x in tokens])  # (n, 3 D)
    out = []
    for x, query in zip(tokens, qkv, strict=True):
        mixed = []
        for q, k, v in torch.arange(3 * len(x)).reshape(3, heads, -1).unbind(1):  # the channels of a head
            weight = torch.exp(qkv[:, k] @ query[q] / math.sqrt(len(q)))
            mixed.append(weight / weight.sum() @ qkv[:, v])
        x = x + linear(w, f"{name}.attn.proj", torch.cat(mixed))
        hidden = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
        out.append(x + linear(w, f"{name}.mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2))
    return out


def count_kept(n, ratio):
    return math.floor(n * (1 - Fraction(str(ratio))))  # exact arithmetic on the decimal fraction


def pcae(w, image, noise, mask_ratio, stages, drop_ratio, criterion):
    """Return visible and masked patch ids, target and prediction by patch id, of one image (C, H, W) and noise (N,)."""

    def embed(part, i):
        row, column = (PATCH * j for j in divmod(i, image.shape[2] // PATCH))
        pixels = image[:, row : row + PATCH, column : column + PATCH].flatten()
        return linear(w, f"{part}.patch_embed.proj", pixels) + w[f"{part}.pos_embed"][0, 1 + i]

    # The split: the patches with the least noise are visible.
    order = sorted(range(len(noise)), key=noise.tolist().__getitem__)
    visible, masked = order[: count_kept(len(order), mask_ratio)], order[count_kept(len(order), mask_ratio) :]

    # The student encodes the class token and the visible patches.
    x = [w["student.cls_token"][0, 0] + w["student.pos_embed"][0, 0], *(embed("student", i) for i in visible)]
    for layer in range(DEPTH):
        x = block(w, f"student.blocks.{layer}", x, HEADS)
    latent = [norm(w, "student.norm", token) for token in x]

    # The teacher encodes the masked patches. After the first block of each stage, the most redundant are dropped.
    x, retained = [embed("teacher", i) for i in masked], masked
    for layer in range(DEPTH):
        x = block(w, f"teacher.blocks.{layer}", x, HEADS)
        if layer in [stage * DEPTH // stages for stage in range(stages)]:
            units = [token / torch.sqrt(token @ token) for token in x]
            redundancy = [sum(unit @ other for other in units) / len(x) for unit in units]  # mean cosine
            ranks = sorted(range(len(x)), key=redundancy.__getitem__, reverse=criterion == "reverse")
            kept = ranks[: count_kept(len(x), drop_ratio)]
            x, retained = [x[j] for j in kept], [retained[j] for j in kept]
    target = [standardize(norm(w, "teacher.norm", token), 1e-5) for token in x]

    # The decoder gets the student's tokens and a mask token for each retained patch; there it predicts the target.
    position = w["decoder.pos_embed"][0]
    places = [0, *(1 + i for i in visible)]
    x = [linear(w, "decoder.embed", token) + position[j] for token, j in zip(latent, places, strict=True)]
    x += [w["decoder.mask_token"][0, 0] + position[1 + i] for i in retained]
    for layer in range(2):
        x = block(w, f"decoder.blocks.{layer}", x, 3)
    prediction = [linear(w, "decoder.pred", norm(w, "decoder.norm", token)) for token in x[-len(retained) :]]
    return visible, masked, dict(zip(retained, target, strict=True)), dict(zip(retained, prediction, strict=True))


@pytest.fixture(scope="module", params=SETTINGS)
def both(request):
    """Return a model with random tensors, its output, its weights by name, and the output of the reference."""
    size, channels, mask_ratio, stages, drop_ratio, criterion = request.param
    torch.manual_seed(0)
    student = ViT(size, PATCH, channels=channels, dim=16, depth=DEPTH, heads=HEADS)
    ptr = PTR(drop_blocks(DEPTH, stages), drop_ratio, criterion)
    model = PCAE(student, mask_ratio=mask_ratio, ptr=ptr, decoder_dim=12, decoder_depth=2, decoder_heads=3).double()
    for tensor in model.state_dict().values():
        tensor += 0.3 * torch.randn_like(tensor)
    w = {name: tensor.clone().requires_grad_("teacher." not in name) for name, tensor in model.state_dict().items()}
    images, noise = torch.randn(2, channels, *size).double(), torch.rand(2, student.num_patches)
    expected = [pcae(w, *pair, *request.param[2:]) for pair in zip(images, noise, strict=True)]
    return model, model(images, noise), w, expected


def test_patches_target_and_prediction(both):
    _, out, _, expected = both
    for b, (visible, masked, target, prediction) in enumerate(expected):
        for ids, expected_ids in zip(out[1:4], (visible, masked, target), strict=True):
            assert set(ids[b].tolist()) == set(expected_ids)
        for i, ours, predicted in zip(out.retained[b].tolist(), out.target[b], out.prediction[b], strict=True):
            torch.testing.assert_close(ours.double(), target[i], atol=2e-6, rtol=0)  # the target is in float32
            torch.testing.assert_close(predicted, prediction[i], atol=1e-9, rtol=0)


def test_loss_gradients_and_a_step(both):
    model, out, w, expected = both
    pairs = [(target[i], prediction[i]) for *_, target, prediction in expected for i in target]
    cosines = [x @ y / torch.sqrt((x @ x) * (y @ y)) for x, y in pairs]
    loss = 1 - sum(cosines) / len(cosines)
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    loss.backward(), out.loss.backward()
    lr, decay, eps, momentum = 0.01, 0.05, 1e-3, 0.9
    torch.optim.AdamW(parameter_groups(model, decay), lr=lr, betas=(0.9, 0.95), eps=eps).step()
    model.update_teacher(momentum)
    for name, parameter in model.named_parameters():  # the student before the teacher
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, w[name].grad, atol=1e-7, rtol=1e-5)
            kept = 1 - lr * decay * (name.endswith("weight") and "norm" not in name)  # only matrices decay
            w[name] = w[name] * kept - lr * w[name].grad / (w[name].grad.abs() + eps)  # Adam's first step
        elif name.startswith("teacher."):
            w[name] = momentum * w[name] + (1 - momentum) * w[name.replace("teacher.", "student.")]
        torch.testing.assert_close(parameter, w[name], atol=1e-7, rtol=0)
