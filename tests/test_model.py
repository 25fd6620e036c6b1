"""The networks: against torchvision's and plain loops, the split's and the teacher's invariants, sizes, mistakes."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model import (
    MODELS,
    PCAE,
    Classifier,
    Decoder,
    PatchEmbed,
    ViT,
    cosine_loss,
    grid_size,
    mean_direction,
    pool,
    sincos_position_embedding,
    split_patches,
    spread,
)
from ptr import PTR, drop_blocks

PATCH, GRID, N = 4, (6, 10), 60  # small images that are not square
SIZE = (24, 40)


def small_vit(**changes):
    return ViT(**{"image_size": SIZE, "patch_size": PATCH, "dim": 32, "depth": 4, "heads": 4, **changes})


def small_pcae(stages=3, ratio=0.5, mask_ratio=0.75, criterion="similarity", **changes):
    torch.manual_seed(0)
    student = small_vit(**changes)
    ptr = PTR(drop_blocks(len(student.blocks), stages), ratio, criterion)
    return PCAE(student, mask_ratio=mask_ratio, ptr=ptr, decoder_dim=24, decoder_depth=2, decoder_heads=3)


def random_images(batch=3, size=SIZE, channels=3, seed=0):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def random_ids(batch, n, num_patches=N):
    return torch.stack([torch.randperm(num_patches)[:n] for _ in range(batch)])


@torch.no_grad()
def randomize(module):
    """Give every parameter a value of its own: at the start, zero biases and unit norms would hide a wrong one."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def pixels_of(ids, grid=GRID, patch=PATCH):
    """Boolean (B, 1, H, W): the pixels of the patches `ids` (B, n)."""
    rows, columns = grid
    inside = torch.zeros(len(ids), 1, rows * patch, columns * patch, dtype=torch.bool)
    for image, row in enumerate(ids.tolist()):
        for patch_id in row:
            y, x = divmod(patch_id, columns)
            inside[image, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = True
    return inside


def capture(module, pick=lambda inputs, output: output):
    """A list that collects what `pick` takes of each call of `module`."""
    calls = []
    module.register_forward_hook(lambda _, inputs, output: calls.append(pick(inputs, output)))
    return calls


# --- patches and positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size, patch", [((32, 32), 8), ((24, 40), 4), ((28, 70), 14), ((48, 16), 16)])
def test_patch_embedding_is_the_convolution_at_these_patches(size, patch, channels):
    embed = PatchEmbed(patch, channels, 20)
    images = random_images(2, size, channels)
    whole = embed.proj(images).flatten(2).mT  # (B, N, D), row-major
    ids = random_ids(2, 3, whole.shape[1])
    torch.testing.assert_close(embed(images), whole)
    torch.testing.assert_close(embed(images, ids), torch.stack([w[i] for w, i in zip(whole, ids, strict=True)]))


@pytest.mark.parametrize("dim, grid", [(32, (4, 4)), (16, (3, 5)), (20, (5, 2)), (768, (14, 14))])
def test_positions_equal_a_plain_loop(dim, grid):
    table = sincos_position_embedding(dim, grid)
    rows, columns = grid
    quarter = dim // 4
    assert table.shape == (1, 1 + rows * columns, dim) and table.dtype == torch.float32
    assert not table[0, 0].any(), "the class token's"
    for row in range(rows):
        for column in range(columns):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (k / quarter) for k in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[0, 1 + row * columns + column], torch.tensor(expected))


def test_positions_are_fixed():
    assert not small_vit().pos_embed.requires_grad and not small_pcae().decoder.pos_embed.requires_grad


def test_drop_path_grows_with_depth():
    rates = [block.drop_path.p for block in small_vit(drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initialisation():
    torch.manual_seed(0)
    vit = small_vit()
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))  # Xavier-uniform; a convolution counts as the linear map it is
            assert 0.9 * bound < weight.abs().max() <= bound and not module.bias.any()
    assert 0.01 < vit.cls_token.std() < 0.03


# --- the encoder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def torchvision_weights(theirs):
    """A torchvision VisionTransformer's weights under our names."""
    names = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "encoder.ln": "norm",
    }
    ours = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not name.startswith("heads"):
            ours[name] = value
    return ours


@pytest.mark.parametrize("size", ["small", "vit_b_16"])
@torch.no_grad()
def test_encoder_equals_torchvisions(size):
    torch.manual_seed(0)
    if size == "small":
        theirs = torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256
        )
        ours, images = ViT((32, 32), 8, dim=64, depth=3, heads=4), random_images(2, (32, 32))
        randomize(theirs)
    else:
        theirs, ours, images = torchvision.models.vit_b_16(), ViT(), random_images(1, (224, 224))
        nn.init.normal_(theirs.class_token)
    ours.load_state_dict(torchvision_weights(theirs))
    theirs.eval(), ours.eval()
    encoded = capture(theirs.encoder)
    theirs(images)
    tokens, patch_ids = ours(images)
    torch.testing.assert_close(tokens, encoded[0], atol=2e-5, rtol=0)
    assert torch.equal(patch_ids, torch.arange(ours.num_patches).expand(len(images), -1))

    ids = random_ids(len(images), ours.num_patches // 3, ours.num_patches)
    patches = theirs._process_input(images) + theirs.encoder.pos_embedding[:, 1:]
    patches = torch.stack([image[i] for image, i in zip(patches, ids, strict=True)])
    expected = theirs.encoder.ln(theirs.encoder.layers(patches))
    tokens, patch_ids = ours(images, ids, class_token=False)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=0)
    assert torch.equal(patch_ids, ids)


def plain_loop(vit, image, left, ptr, class_token=True):
    """One image, one token at a time: the tokens that leave the last block, and the patches that are left."""
    x = vit.patch_embed.proj(image).flatten(1).mT[left] + vit.pos_embed[0, [1 + i for i in left]]
    prefix = int(class_token)
    if class_token:
        x = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], x])
    for i, block in enumerate(vit.blocks):
        x = block(x[None])[0]
        if i in ptr.blocks:
            patches = x[prefix:]
            cosines = [F.cosine_similarity(token, patches, dim=1).tolist() for token in patches]
            redundancy = [sum(row) / len(row) for row in cosines]
            order = sorted(range(len(left)), key=redundancy.__getitem__, reverse=ptr.criterion == "reverse")
            keep = sorted(order[: int(len(left) * (1 - ptr.drop_ratio) + 1e-9)])
            left, x = [left[j] for j in keep], torch.cat([x[:prefix], patches[keep]])
    return x, left


@pytest.mark.parametrize("criterion", ["similarity", "reverse"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("blocks", [(0, 2, 3), (1,), (0, 1, 2, 3)])
@torch.no_grad()
def test_encoder_with_ptr_equals_a_plain_loop(blocks, class_token, criterion):
    torch.manual_seed(0)
    vit = randomize(small_vit())
    images, ids = random_images(), random_ids(3, 40)
    tokens, patch_ids = vit(images, ids, class_token=class_token, ptr=PTR(blocks, 0.3, criterion))
    for image in range(3):
        expected, left = plain_loop(vit, images[image], ids[image].tolist(), PTR(blocks, 0.3, criterion), class_token)
        assert patch_ids[image].tolist() == left
        torch.testing.assert_close(tokens[image], vit.norm(expected), atol=2e-5, rtol=0)


def test_encoder_drops_at_random_when_asked():
    vit, images = small_vit(), random_images()
    draws = [vit(images, ptr=PTR((0, 2), 0.5, "random")).patch_ids for _ in range(2)]
    assert draws[0].shape == draws[1].shape == (3, 15)
    assert not torch.equal(*draws)


def timm_names(depth):
    """The parameters of timm's encoder."""
    layers = ["patch_embed.proj", "norm"]
    for i in range(depth):
        layers += [f"blocks.{i}.{name}" for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    return {"cls_token", "pos_embed"} | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_state_dict_has_timms_names():
    assert set(small_vit(depth=3).state_dict()) == timm_names(3)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(image_size=[32, 16], patch_size=8, channels=1, dim=48, depth=3, heads=6, mlp_ratio=2.5, drop_path=0.1)],
)
def test_arguments_build_the_same_encoder(changes):
    vit = randomize(small_vit(**changes)).eval()
    file = io.BytesIO()
    torch.save(vit.arguments, file)
    file.seek(0)
    again = ViT(**torch.load(file, weights_only=True)).eval()
    again.load_state_dict(vit.state_dict())
    images = random_images(2, vit.image_size, vit.arguments["channels"])
    assert torch.equal(again(images).tokens, vit(images).tokens), "the number of heads is in no weight's shape"
    assert again.arguments == vit.arguments and "drop_path" not in vit.arguments, "which belongs to the training"


@pytest.mark.parametrize(
    "name, parameters",  # the usual sizes: what timm counts for these without a head
    [
        ("vit_mini", None),  # ours, free to change
        ("vit_tiny", 5_524_416),
        ("vit_small", 21_665_664),
        ("vit_base", 85_798_656),
        ("vit_large", 303_301_632),
        ("vit_huge", 630_764_800),
    ],
)
def test_model_sizes(name, parameters):
    with torch.device("meta"):
        vit = ViT(patch_size=14 if name == "vit_huge" else 16, **MODELS[name])
    assert set(MODELS) == {"vit_mini", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"}
    dim, patches = vit.dim, vit.num_patches
    patch_weights = vit.patch_embed.proj.weight[0].numel()
    # 4 D^2 + 4 D in attention, 8 D^2 + 5 D in the MLP, 4 D in two norms
    by_hand = len(vit.blocks) * (12 * dim**2 + 13 * dim) + (patch_weights + 1) * dim + (1 + patches) * dim + 3 * dim
    assert sum(parameter.numel() for parameter in vit.parameters()) == by_hand
    assert parameters in (by_hand, None)


@pytest.mark.parametrize("stages", [3, 5])
@pytest.mark.parametrize("depth", [24, 32])
def test_deep_models_train(depth, stages):
    model = small_pcae(stages, 0.3, depth=depth)
    assert len(model.ptr.blocks) == stages
    loss = model(random_images()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- the decoder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoder_sequence():
    torch.manual_seed(0)
    decoder = randomize(Decoder(GRID, 32, 24, 2, 3, 40))
    tokens, ids = torch.randn(2, 1 + 7, 32), random_ids(2, 12)
    visible, queried = ids[:, :7], ids[:, 7:]
    before = capture(decoder.blocks[0], lambda inputs, output: inputs[0])
    after = capture(decoder.blocks[-1])
    prediction = decoder(tokens, visible, queried)
    assert prediction.shape == (2, 5, 40)
    position = decoder.pos_embed[0]
    for i in range(2):  # class token, visible tokens, mask tokens: each with its patch's position
        sequence = [decoder.embed(tokens[i, 0]) + position[0]]
        sequence += [decoder.embed(t) + position[1 + p] for t, p in zip(tokens[i, 1:], visible[i], strict=True)]
        sequence += [decoder.mask_token[0, 0] + position[1 + p] for p in queried[i]]
        torch.testing.assert_close(before[0][i], torch.stack(sequence))
        torch.testing.assert_close(prediction[i], decoder.pred(decoder.norm(after[0][i, 8:])))


@torch.no_grad()
def test_decoder_does_not_care_about_order():
    torch.manual_seed(0)
    decoder = randomize(Decoder(GRID, 32, 24, 2, 3, 40))
    tokens, ids = torch.randn(2, 1 + 7, 32), random_ids(2, 12)
    visible, queried = ids[:, :7], ids[:, 7:]
    prediction = decoder(tokens, visible, queried)
    torch.testing.assert_close(decoder(tokens, visible, queried.flip(1)), prediction.flip(1))
    flipped = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(flipped, visible.flip(1), queried), prediction)
    assert (decoder(tokens, visible.flip(1), queried) - prediction).abs().max() > 1e-3, "a token belongs to its patch"


@pytest.mark.parametrize("patch, dim", [(4, 32), (2, 32), (8, 64)])  # 3 p p = 48, 12, 192
def test_prediction_has_the_teachers_width(patch, dim):
    out = small_pcae(patch_size=patch, dim=dim)(random_images())
    assert out.prediction.shape == out.target.shape == (*out.retained.shape, dim)
    assert 3 * patch * patch != dim


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio, visible", [(0.75, 49), (0.85, 29), (0.9, 19)])
def test_split_is_a_partition(mask_ratio, visible):
    noise = torch.rand(5, 196)
    split = split_patches(noise, mask_ratio)
    assert [part.shape for part in split] == [(5, visible), (5, 196 - visible)]
    for seen, masked in zip(*(part.tolist() for part in split), strict=True):
        assert sorted(seen + masked) == list(range(196))


def test_noise_decides_the_split():
    noise = torch.rand(3, N)
    visible, masked = split_patches(noise, 0.7)  # floor(60 * .3) = 18
    for row, seen, rest in zip(noise.tolist(), visible.tolist(), masked.tolist(), strict=True):
        order = sorted(range(N), key=row.__getitem__)
        assert seen == order[:18] and rest == order[18:]
    out = small_pcae(mask_ratio=0.7)(random_images(), noise)
    assert torch.equal(out.visible, visible) and torch.equal(out.masked, masked)


def test_same_noise_same_output():
    model, noise = small_pcae(), torch.rand(3, N)
    for first, again in zip(model(random_images(), noise), model(random_images(), noise), strict=True):
        assert torch.equal(first, again)


def test_the_default_split_is_drawn_per_image_and_call():
    model, images = small_pcae(), random_images()
    first, second = model(images), model(images)
    for out in (first, second):
        assert out.visible.shape == (3, 15)
        for seen, masked in zip(out.visible.tolist(), out.masked.tolist(), strict=True):
            assert sorted(seen + masked) == list(range(N))
    assert not torch.equal(first.visible, second.visible)
    assert set(first.visible[0].tolist()) != set(first.visible[1].tolist())


@pytest.mark.parametrize("criterion", ["similarity", "random", "reverse"])
@pytest.mark.parametrize("stages, ratio", [(0, 0.5), (1, 0.875), (3, 0.5), (4, 0.16)])
def test_retained_patches_are_masked_ones(stages, ratio, criterion):
    model = small_pcae(stages, ratio, criterion=criterion)
    lengths = [capture(block, lambda inputs, output: inputs[0].shape[1]) for block in model.teacher.blocks]
    out = model(random_images())
    assert out.retained.shape == (3, model.token_counts[-1])
    assert [length[0] for length in lengths] == model.token_counts[:-1]
    for retained, masked in zip(out.retained.tolist(), out.masked.tolist(), strict=True):
        assert len(set(retained)) == len(retained) and set(retained) <= set(masked)


# --- who sees what ----------------------------------------------------------------------------------------------------


def test_student_does_not_see_masked_pixels():
    model, images, noise = small_pcae(), random_images(), torch.rand(3, N)
    latents = capture(model.student, lambda inputs, output: output.tokens)
    out = model(images, noise)
    other = random_images(seed=1)
    model(torch.where(pixels_of(out.masked), other, images), noise)
    model(torch.where(pixels_of(out.visible), other, images), noise)
    assert latents[0].shape == (3, 1 + 15, 32), "with its class token"
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_teacher_does_not_see_visible_pixels():
    model, images, noise = small_pcae(), random_images(), torch.rand(3, N)
    out = model(images, noise)
    other = random_images(seed=1)
    same = model(torch.where(pixels_of(out.visible), other, images), noise)
    assert torch.equal(same.target, out.target) and torch.equal(same.retained, out.retained)
    assert not torch.equal(same.prediction, out.prediction)
    changed = model(torch.where(pixels_of(out.masked), other, images), noise)
    assert not torch.equal(changed.target, out.target)


def test_teacher_has_no_class_token():
    model, images, noise = small_pcae(), random_images(), torch.rand(3, N)
    out = model(images, noise)
    with torch.no_grad():
        model.teacher.cls_token.normal_()
    again = model(images, noise)
    assert torch.equal(again.target, out.target) and torch.equal(again.retained, out.retained)


def test_target_is_the_teachers_normalised_output():
    model, images = small_pcae(), random_images()
    randomize(model.teacher.norm)
    out = model(images)
    latent, retained = model.teacher(images, out.masked, class_token=False, ptr=model.ptr)
    assert torch.equal(retained, out.retained)
    centred = latent - latent.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out.target, expected)


@torch.no_grad()
def test_prediction_is_the_decoders_at_the_retained_patches():
    model, images = small_pcae().eval(), random_images()
    out = model(images)
    expected = model.decoder(model.student(images, out.visible).tokens, out.visible, out.retained)
    torch.testing.assert_close(out.prediction, expected)


# --- the loss and its gradients ---------------------------------------------------------------------------------------


def test_loss_of_perfect_opposite_and_orthogonal_predictions():
    target = torch.randn(2, 5, 32)
    lengths = torch.rand(2, 5, 1) + 0.5  # only the direction counts
    assert cosine_loss(lengths * target, target).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-lengths * target, target).item() == pytest.approx(2, abs=1e-6)
    axes = torch.eye(4)[None]
    assert cosine_loss(axes[:, [0, 1, 2, 3]], axes[:, [0, 1, 3, 2]]).item() == pytest.approx(0.5)  # two right of four


def test_loss_is_float32():
    prediction, target = torch.randn(2, 50, 32), torch.randn(2, 50, 32)
    rounded = prediction.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cosine_loss(rounded, target)
    assert loss.dtype == torch.float32
    expected = 1 - F.cosine_similarity(rounded.double(), target.double(), dim=-1).mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=0)


def test_loss_is_over_the_retained_tokens():
    out = small_pcae()(random_images())
    pairs = zip(out.prediction.flatten(0, 1), out.target.flatten(0, 1), strict=True)
    cosines = [(p @ t / (p.norm() * t.norm())).item() for p, t in pairs]
    assert out.loss.item() == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_centered_targets():
    """What all targets share is not asked for, and the output shows them as they are."""
    model, images, noise = small_pcae(), random_images(), torch.rand(3, N)
    plain = model(images, noise)
    model.center = True
    out = model(images, noise)
    assert torch.equal(out.target, plain.target) and torch.equal(out.prediction, plain.prediction)
    flat = plain.target.flatten(0, 1)
    cosines = F.cosine_similarity(plain.prediction.flatten(0, 1), flat - sum(flat) / len(flat), dim=1)
    assert out.loss.item() == pytest.approx(1 - cosines.mean().item(), abs=1e-6) != pytest.approx(plain.loss.item())


@pytest.mark.parametrize("seed", range(3))
def test_loss_starts_near_one(seed):
    torch.manual_seed(seed)
    model = PCAE(small_vit(dim=96), ptr=PTR(drop_blocks(4, 3), 0.5), decoder_dim=64, decoder_heads=4)
    assert abs(model(random_images(8, seed=seed)).loss.item() - 1) < 0.15


def test_gradients_reach_the_student_and_the_decoder_only():
    model = small_pcae()
    model(random_images()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fixed = {f"{part}.pos_embed" for part in ("student", "decoder")}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith("teacher.")} - fixed
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_no_gradient_through_the_target():
    model, images = small_pcae(), random_images().requires_grad_()
    model.teacher.requires_grad_(True)  # even then
    out = model(images)
    out.loss.backward()
    assert not out.target.requires_grad
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert not images.grad[pixels_of(out.masked).expand_as(images)].any()
    assert images.grad[pixels_of(out.visible).expand_as(images)].all()


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_teacher_starts_as_a_copy_of_the_student():
    model = small_pcae()
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    for name in student:
        assert torch.equal(student[name], teacher[name])
        assert student[name].data_ptr() != teacher[name].data_ptr()


def test_teacher_stays_in_evaluation_mode():
    model = small_pcae(drop_path=0.5)
    assert model.training and not any(module.training for module in model.teacher.modules()), "from the start"
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.student.training == model.decoder.training == mode
        assert not any(module.training for module in model.teacher.modules())


def test_teacher_has_no_drop_path():
    model, images, noise = small_pcae(drop_path=0.5).train(), random_images(), torch.rand(3, N)
    first, second = model(images, noise), model(images, noise)
    assert torch.equal(first.target, second.target) and torch.equal(first.retained, second.retained)
    assert not torch.equal(first.prediction, second.prediction), "the student's is at work"


def test_ema_arithmetic():
    model = small_pcae().double()
    momentum, average = 0.9, {name: p.clone() for name, p in model.teacher.named_parameters()}
    students = []
    for _ in range(3):
        students.append({name: p.detach().clone() for name, p in randomize(model.student).named_parameters()})
        model.update_teacher(momentum)
    first, second, third = students
    for name, parameter in model.teacher.named_parameters():
        new = momentum**2 * first[name] + momentum * second[name] + third[name]
        torch.testing.assert_close(parameter, momentum**3 * average[name] + (1 - momentum) * new)
        assert torch.equal(model.student.get_parameter(name), third[name]), "the student is only read"


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ema_extremes(momentum):
    model = small_pcae()
    randomize(model.student)
    expected = {k: v.clone() for k, v in (model.teacher if momentum else model.student).state_dict().items()}
    model.update_teacher(momentum)
    assert all(torch.equal(value, expected[name]) for name, value in model.teacher.state_dict().items())


@pytest.mark.parametrize("momentum", [0.5, 0.99, 0.996, 0.9999])
def test_equal_weights_stay_equal(momentum):
    model = small_pcae(depth=1, stages=1)
    for _ in range(1000):
        model.update_teacher(momentum)
    for student, teacher in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher)


def test_ema_leaves_nothing_for_a_backward_pass():
    model = small_pcae()
    model(random_images()).loss.backward()
    model.update_teacher(0.9)
    assert all(p.is_leaf and not p.requires_grad and p.grad is None for p in model.teacher.parameters())


# --- the classifier ---------------------------------------------------------------------------------------------------

KINDS = [dict(pool=by, frozen=frozen) for by in ("mean", "class") for frozen in (False, True)]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["pool"] + " frozen" * kind["frozen"])


@torch.no_grad()
def small_classifier(ptr=None, *, pool="mean", frozen=False, **changes):
    torch.manual_seed(0)
    model = randomize(Classifier(small_vit(**changes), 7, pool=pool, frozen=frozen, ptr=ptr))
    if frozen:
        model.fc_norm.running_mean.normal_()
        model.fc_norm.running_var.copy_(10 ** torch.linspace(-6, 1, model.encoder.dim))
    return model


def test_pool():
    tokens = torch.randn(2, 1 + 5, 8)
    torch.testing.assert_close(pool(tokens), sum(tokens[:, i] for i in range(1, 6)) / 5)
    assert torch.equal(pool(tokens, "mean"), pool(tokens))
    assert torch.equal(pool(tokens, "class"), tokens[:, 0])


@pytest.mark.parametrize("ptr", [None, PTR((0, 2), 0.3), PTR((1, 2, 3), 0.5, "reverse")])
@all_kinds
@torch.no_grad()
def test_classifier_equals_a_plain_loop(kind, ptr):
    model, images = small_classifier(ptr, **kind).eval(), random_images()
    logits = model(images)
    assert logits.shape == (3, 7)

    def norm(x, layer):
        return F.layer_norm(x, (32,), layer.weight, layer.bias, 1e-6)

    for image, got in zip(images, logits, strict=True):
        tokens, left = plain_loop(model.encoder, image, list(range(N)), ptr or PTR())
        if kind["frozen"] or kind["pool"] == "class":
            tokens = norm(tokens, model.encoder.norm)
        x = sum(tokens[1:]) / len(left) if kind["pool"] == "mean" else tokens[0]
        if kind["frozen"]:
            x = (x - model.fc_norm.running_mean) / (model.fc_norm.running_var + 1e-6).sqrt()
        elif kind["pool"] == "mean":
            x = norm(x, model.fc_norm)
        torch.testing.assert_close(got, model.head.weight @ x + model.head.bias, atol=1e-4, rtol=1e-4)


@all_kinds
def test_classifier_has_timms_names(kind):
    expected = {f"encoder.{name}" for name in timm_names(4)} | {"head.weight", "head.bias"}
    if kind["frozen"]:
        expected |= {f"fc_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    elif kind["pool"] == "mean":
        expected |= {"fc_norm.weight", "fc_norm.bias"}
        expected -= {"encoder.norm.weight", "encoder.norm.bias"}
    assert set(small_classifier(**kind).state_dict()) == expected


def test_norms_have_timms_epsilon():
    norms = [m for m in small_classifier().modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 9 and {norm.eps for norm in norms} == {1e-6}


@all_kinds
def test_logits_start_at_zero(kind):
    torch.manual_seed(0)
    model = Classifier(small_vit(), 100, **kind)
    assert not model.head.bias.any()
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert 0 < model(random_images()).abs().max() < 1e-3


@pytest.mark.parametrize("criterion", ["similarity", "random", "reverse"])
@all_kinds
def test_dropping_nothing_changes_nothing(kind, criterion):
    images, results = random_images(), []
    for ptr in (None, PTR((0, 2), 0.0, criterion), PTR((), 0.5, criterion)):
        model = small_classifier(ptr, **kind)
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
        results.append([logits] + [p.grad for p in model.parameters() if p.requires_grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_token_counts_inside_the_classifier():
    model = small_classifier(PTR((0, 2), 0.3))
    lengths = [capture(block, lambda inputs, output: inputs[0].shape[1]) for block in model.encoder.blocks]
    encoded = capture(model.encoder, lambda inputs, output: [len(row) for row in (*output.tokens, *output.patch_ids)])
    model(random_images())
    model.ptr = PTR((1,), 0.5)  # as evaluation does
    model(random_images())
    model.ptr = None
    model(random_images())
    per_call = [list(call) for call in zip(*lengths, strict=True)]
    # floor(60 * .7) = 42, floor(42 * .7) = 29, and the class token
    assert per_call == [[61, 43, 43, 30], [61, 61, 31, 31], [61, 61, 61, 61]]
    assert encoded == [[30] * 3 + [29] * 3, [31] * 3 + [30] * 3, [61] * 3 + [60] * 3]


@pytest.mark.parametrize("length", [100, -100])
@torch.no_grad()
def test_the_class_token_is_protected(length):
    """Even where it would be the first to go, or the last; and the patches' scores know nothing of it."""
    model, images = small_classifier(PTR((0,), 0.9), pool="class"), random_images()
    encoder = model.encoder
    encoder.blocks = nn.ModuleList([nn.Identity()])  # so that its output is what goes in
    patches = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    cls = length * F.normalize(patches, dim=-1).mean(dim=(0, 1))  # along what the patches share, or against it
    encoder.cls_token.copy_(cls - encoder.pos_embed[:, :1])
    encoded = capture(encoder)
    logits = model(images)
    tokens, ids = encoded[0]
    torch.testing.assert_close(tokens[:, 0], encoder.norm(cls).expand(3, -1))
    torch.testing.assert_close(logits, model.head(encoder.norm(cls)).expand(3, -1))
    for x, kept in zip(F.normalize(patches, dim=-1), ids.tolist(), strict=True):
        redundancy = (x @ x.T).mean(dim=1).tolist()
        assert kept == sorted(sorted(range(N), key=redundancy.__getitem__)[:6])


@pytest.mark.parametrize("by", ["mean", "class"])
def test_everything_trains_with_the_positions(by):
    model = small_classifier(PTR((0, 2), 0.3), pool=by)
    F.cross_entropy(model(random_images()), torch.tensor([0, 3, 6])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad.any(), name
    assert model.encoder.pos_embed.grad.any(dim=-1).all(), "the class token's, and of patches that were dropped too"


@pytest.mark.parametrize("by", ["mean", "class"])
def test_frozen_is_frozen(by):
    encoder = small_vit(drop_path=0.5)
    encoder.pos_embed.requires_grad_()
    model = randomize(Classifier(encoder, 7, pool=by, frozen=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    F.cross_entropy(model(random_images()), torch.tensor([0, 3, 6])).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        trains = name in ("head.weight", "head.bias")
        assert parameter.requires_grad == trains == (parameter.grad is not None), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {f"fc_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"head.weight", "head.bias"} | statistics


def test_frozen_encoder_stays_in_evaluation_mode():
    model, images = small_classifier(frozen=True, drop_path=0.5), random_images()
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.fc_norm.training == model.head.training == mode
        assert not any(module.training for module in model.encoder.modules())
    assert torch.equal(model(images), model(images)), "no drop path"
    trained = small_classifier(drop_path=0.5)
    for mode in (False, True):
        assert trained.train(mode) is trained
        assert all(module.training == mode for module in trained.modules())
    assert not torch.equal(trained(images), trained(images)), "drop path is at work"


@torch.no_grad()
def test_batch_norm_follows_the_features():
    model, images = randomize(Classifier(small_vit(), 7, frozen=True)).train(), random_images(5)
    features = capture(model.fc_norm, lambda inputs, output: inputs[0])
    logits = model(images)
    x, norm = features[0], model.fc_norm
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(dim=0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(dim=0))
    standard = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(logits, model.head(standard))
    before = norm.running_mean.clone(), norm.running_var.clone()
    model.eval()(images)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, patch", [((33, 32), 16), ((32, 33), 16), ((0, 32), 16), ((32, 32), 0), ((8, 8), 16)])
def test_image_size_is_not_a_multiple_of_the_patch(size, patch):
    with pytest.raises(ValueError, match="--image-size.*--patch-size"):
        grid_size(size, patch)
    with pytest.raises(ValueError, match="--image-size"):
        small_vit(image_size=size, patch_size=patch)


def test_grid_has_rows_first():
    assert grid_size((24, 40), 4) == (6, 10)


@pytest.mark.parametrize("mask_ratio", [-0.1, 0.0, 0.999, 1.0, 1.5])
def test_mask_ratio_out_of_range(mask_ratio):
    with pytest.raises(ValueError, match="--mask-ratio"):
        PCAE(small_vit(), mask_ratio=mask_ratio)


def test_one_patch_visible_or_masked_is_enough():
    for mask_ratio, visible in ((1 - 1 / N, 1), (1 / N, N - 1)):
        model = PCAE(small_vit(), mask_ratio=mask_ratio, decoder_dim=24, decoder_heads=3)
        assert model(random_images()).visible.shape[1] == visible


@pytest.mark.parametrize("heads", [0, 3, 5])
def test_heads_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match="--heads"):
        small_vit(heads=heads)


@pytest.mark.parametrize("heads", [0, 5, 7])
def test_decoder_heads_do_not_divide_its_width(heads):
    with pytest.raises(ValueError, match="--decoder-dim.*--decoder-heads"):
        PCAE(small_vit(), decoder_dim=24, decoder_heads=heads)


def test_width_is_not_a_multiple_of_four():
    with pytest.raises(ValueError, match="30.*--dim.*multiple of 4"):
        small_vit(dim=30, heads=3)
    with pytest.raises(ValueError, match="30.*--decoder-dim.*multiple of 4"):
        PCAE(small_vit(), decoder_dim=30, decoder_heads=3)


@pytest.mark.parametrize("size", [(40, 40), (16, 64), (64, 16), (24, 32)])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match="made for"):
        small_vit()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_mask_ratio_is_no_ratio(ratio):
    with pytest.raises(ValueError, match="--mask-ratio"):
        PCAE(small_vit(), mask_ratio=ratio)


@torch.no_grad()
def test_spread_of_tokens():
    one_direction = torch.ones(4, 8, 64) * torch.rand(4, 8, 1)
    all_directions = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    assert spread(mean_direction(one_direction)) < 1e-3
    assert spread(mean_direction(all_directions)).item() == pytest.approx(1, abs=0.01)
    # Half of each unit vector's square is common to all: what is left has a deviation of sqrt(1/2).
    shared = F.normalize(all_directions, dim=-1) + F.normalize(torch.randn(64), dim=-1)
    assert spread(mean_direction(shared)).item() == pytest.approx(0.5**0.5, abs=0.02)


def test_schedule_does_not_fit_the_model():
    with pytest.raises(ValueError, match="--drop-blocks.*4 blocks"):
        PCAE(small_vit(), ptr=PTR((0, 4), 0.5))
    with pytest.raises(ValueError, match="no token.*--drop-ratio"):
        PCAE(small_vit(), ptr=PTR((0, 1, 2), 0.8))
