"""What timm's own tools ask of a model: ``PrunedViT`` answers as timm's model does."""

import pytest
import torch
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from prunevit.agents import DynamicViTPolicy, KeepAll, PrunedViT, TopK, prune
from prunevit.envs.vit import execution
from prunevit.envs.vit.blocks import masked_block
from prunevit.envs.vit.staged_vit import StagedViT

DEPTH, GRID, WIDTH, STAGES = 4, (4, 4), 32, (1, 3)
MODELS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "rotary": {"name": "eva02_tiny_patch14_224"},
}
each_model = pytest.mark.parametrize("family", MODELS)
each_place = pytest.mark.parametrize("prune_at", ["block", "mlp"])


class Draw:
    """Random decisions, the same for the same stage; the first image loses all, the last none."""

    needs_attention, macs_per_decision = True, 0

    def __init__(self):
        self.stages = []

    def __call__(self, view):
        self.stages.append(view.stage)
        generator = torch.Generator().manual_seed(view.stage)
        share = torch.linspace(0, 1, len(view.alive))[:, None]
        return torch.rand(view.alive.shape, generator=generator) < share


@pytest.fixture
def images(some_images):
    return some_images.images[:5]


def leaves(found):
    """All tensors of an answer, and how they are nested."""
    return torch.utils._pytree.tree_flatten(found)


def run_masked(monkeypatch, model, images):
    """What each block leaves in all slots [B, L, D] in masked execution, and the survivors of each
    stage.
    """
    outputs, blocks = {}, list(model.backbone.model.blocks)

    def record(call, x, alive):
        out, received = masked_block(call, x, alive)
        outputs[blocks.index(call.block)] = out.unflatten(0, alive.shape)
        return out, received

    with monkeypatch.context() as patch:
        patch.setattr(execution, "masked_block", record)
        keep = model.train()(images, return_keep=True)[1]
    model.eval()
    return [outputs[i] for i in range(len(blocks))], keep


# --- intermediates ---


ARGUMENTS = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [-1, 0, 0, 2], "return_prefix_tokens": True},
    {"indices": (1,), "stop_early": True, "output_fmt": "NLC"},
    {"indices": [2, 0], "stop_early": True, "norm": True, "intermediates_only": True},
]


@each_model
@each_place
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@torch.no_grad()
def test_without_pruning_they_are_timms(make_vit, images, family, prune_at, arguments):
    vit = make_vit(**MODELS[family])
    if family == "no prefix":
        arguments = arguments | {"return_prefix_tokens": True}  # of which timm returns none
    model = prune(vit, KeepAll(), STAGES, prune_at=prune_at)
    expected, nesting = leaves(vit.forward_intermediates(images, **arguments))
    found, ours = leaves(model.forward_intermediates(images, **arguments))
    assert ours == nesting
    for mine, timms in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, timms, rtol=0, atol=1e-5)


@pytest.mark.parametrize("intermediates_only", [False, True])
@pytest.mark.parametrize("return_prefix_tokens", [False, True])
@torch.no_grad()
def test_a_dictionary_as_timms(vit, images, intermediates_only, return_prefix_tokens):
    arguments = {
        "output_dict": True,
        "intermediates_only": intermediates_only,
        "return_prefix_tokens": return_prefix_tokens,
    }
    expected = vit.forward_intermediates(images, **arguments)
    found = prune(vit, KeepAll(), STAGES).forward_intermediates(images, **arguments)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each_model
@each_place
@torch.no_grad()
def test_slots_of_pruned_patches_hold_zeros(monkeypatch, make_vit, images, family, prune_at):
    model = prune(make_vit(**MODELS[family]), Draw(), STAGES, prune_at=prune_at)
    prefix = model.backbone.num_prefix
    expected, keep = run_masked(monkeypatch, model, images)
    last, found = model.forward_intermediates(
        images, return_prefix_tokens=prefix > 0, output_fmt="NLC"
    )
    assert len(found) == DEPTH
    assert not keep[:, 0].all()
    for i, (output, slots) in enumerate(zip(found, expected, strict=True)):
        patches, *prefixes = output if prefix else (output,)
        passed = sum(stage <= i for stage in STAGES)
        alive = keep[:, passed - 1] if passed else torch.ones_like(keep[:, 0])
        torch.testing.assert_close(patches, slots[:, prefix:] * alive[..., None], rtol=0, atol=1e-4)
        assert torch.equal(patches.ne(0).any(2), alive)
        if prefix:
            torch.testing.assert_close(prefixes[0], slots[:, :prefix], rtol=0, atol=1e-4)
    torch.testing.assert_close(last, model.forward_features(images))


@each_place
@torch.no_grad()
def test_the_norm_is_for_living_tokens(vit, images, prune_at):
    model = prune(vit, Draw(), STAGES, prune_at=prune_at)
    plain, normed = (
        model.get_intermediate_layers(images, range(DEPTH), norm=norm) for norm in (False, True)
    )
    for before, after in zip(plain, normed, strict=True):
        expected = vit.norm(before) * before.ne(0).any(2, keepdim=True)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    features = model.forward_features(images)
    torch.testing.assert_close(normed[-1], features[:, 1:])


@torch.no_grad()
def test_merged_patches_stand_where_they_went(vit, images):
    model = prune(vit, TopK((6, 3)), STAGES, on_prune="merge")
    last, outputs = model.forward_intermediates(images, output_fmt="NLC")
    torch.testing.assert_close(last, model.forward_features(images))
    counts = [output.ne(0).any(2).sum(1).tolist() for output in outputs]
    assert counts == [[16] * 5, [6] * 5, [6] * 5, [3] * 5]
    dropped = prune(vit, TopK((6, 3)), STAGES).get_intermediate_layers(images, [1])[0]
    assert not torch.allclose(outputs[1], dropped)


@pytest.mark.parametrize(
    ("prune_at", "last", "stages", "blocks"),
    [
        ("block", 0, [], [0]),
        ("block", 1, [0], [0, 1]),
        ("block", 3, [0, 1], [0, 1, 2, 3]),
        ("mlp", 0, [], [0]),
        ("mlp", 1, [0], [0, 1]),
        ("mlp", 2, [0], [0, 1, 2]),
    ],
)
@torch.no_grad()
def test_stopping_early_runs_no_more_blocks_and_stages(vit, images, prune_at, last, stages, blocks):
    model = prune(vit, Draw(), STAGES, prune_at=prune_at)
    ran = []
    for i, block in enumerate(model.backbone.model.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    whole, expected = model.forward_intermediates(images, [last], norm=True, output_fmt="NLC")
    ran.clear()
    model.policy.stages.clear()
    final, (found,) = model.forward_intermediates(
        images, [last], norm=True, stop_early=True, output_fmt="NLC"
    )
    assert (model.policy.stages, sorted(set(ran))) == (stages, blocks)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(final[:, 1:], found, rtol=0, atol=1e-5)
    assert (last == DEPTH - 1) == torch.allclose(final, whole, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"indices": 0},
        {"indices": DEPTH + 1},
        {"indices": [DEPTH]},
        {"indices": [-DEPTH - 1]},
        {"output_fmt": "NHWC"},
    ],
    ids=str,
)
def test_errors_are_timms(vit, images, arguments):
    messages = []
    for model in (vit, prune(vit, KeepAll(), STAGES)):
        with pytest.raises(AssertionError) as caught:
            model.forward_intermediates(images, **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] != ""


@pytest.mark.parametrize("arguments", [{"attn_mask": torch.ones(17, 17)}, {"is_causal": True}])
def test_masks_are_refused(vit, images, arguments):
    with pytest.raises(ValueError, match="attends among the tokens that survive"):
        prune(vit, KeepAll(), STAGES).forward_intermediates(images, **arguments)


def test_masks_are_refused_by_dinos_name(vit, images):
    with pytest.raises(ValueError, match="attends among the tokens that survive"):
        prune(vit, KeepAll(), STAGES).get_intermediate_layers(images, attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"n": 3, "reshape": True}, {"n": [0, 2], "return_prefix_tokens": True, "norm": True}],
    ids=str,
)
@torch.no_grad()
def test_dinos_name(vit, images, arguments):
    expected = vit.get_intermediate_layers(images, **arguments)
    found = prune(vit, KeepAll(), STAGES).get_intermediate_layers(images, **arguments)
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=1e-5)


@each_place
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_masked_execution(vit, images, prune_at, checkpointing):
    model = prune(vit, Draw(), STAGES, prune_at=prune_at)
    gradients = []
    for training in (False, True):
        model.train(training).set_grad_checkpointing(checkpointing and not training)
        model.zero_grad()
        last, outputs = model.forward_intermediates(images, 3, norm=True)
        (last.square().sum() + sum(output.pow(3).sum() for output in outputs)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["backbone.model.blocks.3.mlp.fc2.weight"].ne(0).any()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_timms_wrapper_for_features(vit, images):
    """The one behind ``features_only`` of timm's ``create_model``."""
    model = prune(vit, KeepAll(), STAGES)
    wrapped = FeatureGetterNet(model, out_indices=(1, 3), prune=False)
    expected = FeatureGetterNet(vit, out_indices=(1, 3), prune=False)
    for attribute in ("channels", "reduction"):
        found, timms = (getattr(net.feature_info, attribute)() for net in (wrapped, expected))
        assert found == timms
    parts = dict(model.named_modules())
    assert all(name in parts for name in wrapped.feature_info.module_name())
    torch.testing.assert_close(wrapped(images), expected(images), rtol=0, atol=1e-5)


# --- training ---


def settings_by_name(model, groups):
    """Weight decay and share of the learning rate of each parameter of timm's groups."""
    names = {id(p): name.removeprefix("backbone.model.") for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group["lr_scale"])
        for group in groups
        for p in group["params"]
    }


@each_model
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_those_of_the_backbone(make_vit, family, coarse):
    vit = make_vit(**MODELS[family])
    model = prune(vit, KeepAll(), STAGES)
    found, expected = (
        group_parameters(each, each.group_matcher(coarse=coarse), reverse=True)
        for each in (model, vit)
    )
    assert len(set(expected.values())) > 1
    assert {
        name.removeprefix("backbone.model."): layer for name, layer in found.items()
    } == expected


@each_model
def test_layer_decay_and_weight_decay_are_those_of_the_backbone(make_vit, family):
    vit = make_vit(**MODELS[family])
    settings = []
    for model in (vit, prune(vit, KeepAll(), STAGES)):
        groups = param_groups_layer_decay(
            model, 0.1, model.no_weight_decay(), weight_decay_exclude_1d=False, layer_decay=0.7
        )
        settings.append(settings_by_name(model, groups))
    assert settings[0] == settings[1]
    assert len(set(settings[0].values())) > DEPTH
    assert settings[0]["pos_embed"][0] == 0


def test_timms_optimizer_sees_the_layers_of_the_backbone(vit, images):
    settings, models = [], (vit, prune(vit, KeepAll(), STAGES))
    for model in models:
        optimizer = create_optimizer_v2(model, "sgd", lr=1, weight_decay=0.1, layer_decay=0.7)
        settings.append(settings_by_name(model, optimizer.param_groups))
    assert settings[0] == settings[1]
    assert settings[0]["cls_token"][0] == 0
    before = [parameter.clone() for parameter in models[1].parameters()]
    models[1](images).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, models[1].parameters()))


def test_a_policy_that_learns_goes_with_the_head(make_vit):
    backbone = StagedViT(make_vit(), STAGES)
    model = PrunedViT(backbone, DynamicViTPolicy(WIDTH, len(STAGES), hidden=8))
    optimizer = create_optimizer_v2(model, "sgd", lr=1, layer_decay=0.7)
    settings = settings_by_name(model, optimizer.param_groups)
    policy = {scale for name, (_, scale) in settings.items() if name.startswith("policy.")}
    assert policy == {settings["head.weight"][1]} == {1}
    alone = create_optimizer_v2(make_vit(), "sgd", lr=1, layer_decay=0.7)
    assert {g["lr_scale"] for g in optimizer.param_groups} == {
        g["lr_scale"] for g in alone.param_groups
    }


@each_place
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_computes_blocks_again(vit, images, prune_at, training):
    model = prune(vit, Draw(), STAGES, prune_at=prune_at).train(training)
    calls, gradients = [], []
    model.backbone.model.blocks[2].norm1.register_forward_pre_hook(lambda *_: calls.append(None))
    for enable in (False, True):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        once = len(calls) // (1 + enable)
        assert len(calls) == once * (1 + enable) > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pool", "read"), [(None, "token"), ("avg", "avg")])
@torch.no_grad()
def test_a_new_classifier_is_counted(vit, images, pool, read):
    model, before = (prune(vit, Draw(), STAGES) for _ in range(2))
    model.reset_classifier(7, pool)
    assert model.get_classifier() is model.backbone.model.head
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model.backbone.model.global_pool == read
    assert model(images).shape == (len(images), 7)
    assert model.backbone.dense_macs - before.backbone.dense_macs == 2 * WIDTH
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images).shape == (len(images), WIDTH)


def test_what_timms_distillation_asks_of_a_student(make_vit, images):
    task = pytest.importorskip("timm.task")
    student = prune(make_vit(in_chans=1), KeepAll(), STAGES)
    assert student.head_hidden_size == student.num_features == WIDTH
    assert student.in_chans == 1
    student = prune(make_vit(), KeepAll(), STAGES)
    teacher = make_vit(seed=1)
    for kind in (task.LogitDistillationTask, task.FeatureDistillationTask):
        distilled = kind(student, teacher_model=teacher, criterion=torch.nn.CrossEntropyLoss())
        distilled(images, torch.zeros(len(images), dtype=torch.long))["loss"].backward()
        assert student.backbone.model.cls_token.grad.abs().sum() > 0
