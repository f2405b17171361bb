"""``prune`` makes a model that takes the timm model's place, and survives being saved."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunevit.agents import (
    AttentionThreshold,
    DynamicViTPolicy,
    KeepAll,
    LearnedPolicy,
    PrunedViT,
    TopK,
    prune,
)
from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.dither import dither_levels
from prunevit.agents.policies.serialization import SavedModelError, learned_policy
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers.mappo import main as mappo

BATCH, PATCHES, STAGES = 5, 16, (1, 3)
SHAPE = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 8}  # not to be seen on a model
POOLINGS = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "avgmax without class token": {"class_token": False, "global_pool": "avgmax"},
    "map": {"class_token": False, "global_pool": "map"},
}


# older versions want model_kwargs, and the model is refused without
timm_records = pytest.mark.skipif(
    not hasattr(timm.models, "get_model_args"), reason="timm does not record arguments here"
)


def random_policy(backbone, fields=DEFAULT_FIELDS, heads=0):
    """Its random decisions are not all the same."""
    alpha = 0.1 if "alpha" in fields else None
    priors = "cls_attention" in fields, "redundancy" in fields
    policy = learned_policy(backbone, fields, [8], priors[0], alpha, heads, priors[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in (policy.actor.net[1], policy.actor.net[-1]):
            torch.nn.init.normal_(layer.weight)
    if priors[1]:
        torch.nn.init.constant_(policy.actor.redundancy_weight, 0.4)
    return policy


class Draw:
    """Random decisions: the first image loses all patches, the last none."""

    needs_attention, macs_per_decision = False, 0

    def __call__(self, view):
        generator = torch.Generator().manual_seed(view.stage)
        share = torch.linspace(0, 1, len(view.alive))[:, None]
        return torch.rand(view.alive.shape, generator=generator) < share


def pruned(vit, policy=None):
    policy = policy or random_policy(StagedViT(vit, STAGES))
    return prune(vit, policy, STAGES, model_kwargs=SHAPE)


def data_config(vit):
    """Of a model that was built for images of 32 pixels, which timm doesn't note."""
    return resolve_model_data_config(vit) | {"input_size": (3, 32, 32)}


@pytest.fixture
def images(some_images):
    return some_images.load(range(BATCH))[0]


# --- in the place of the timm model ---


@torch.no_grad()
def test_a_policy_that_keeps_all_changes_nothing(make_vit, images):
    for kwargs in POOLINGS.values():
        vit = make_vit(**kwargs)
        model = pruned(vit, KeepAll())
        torch.testing.assert_close(model(images), vit(images), rtol=0, atol=1e-5)
        features = model.forward_features(images)
        torch.testing.assert_close(features, vit.forward_features(images), rtol=0, atol=1e-5)
        for pre_logits in (False, True):
            torch.testing.assert_close(
                model.forward_head(features, pre_logits),
                vit.forward_head(features, pre_logits),
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.parametrize("kwargs", POOLINGS.values(), ids=POOLINGS)
@torch.no_grad()
def test_features_and_head_are_the_forward_pass(make_vit, images, kwargs):
    model = pruned(make_vit(**kwargs), Draw())
    logits, keep = model(images, return_keep=True)
    assert torch.equal(logits, model(images))
    assert keep.shape == (BATCH, len(STAGES), PATCHES)
    assert keep.dtype == torch.bool
    prefix = model.backbone.num_prefix
    assert keep[0].sum() == model.backbone.keeps_last_patch * len(STAGES)
    assert keep[-1].all()
    features = model.forward_features(images)
    assert torch.equal(features[:, prefix:].ne(0).any(2), keep[:, -1])
    torch.testing.assert_close(model.forward_head(features), logits, rtol=0, atol=1e-5)
    with_head_apart = model.backbone.model.get_classifier()(model.forward_head(features, True))
    torch.testing.assert_close(with_head_apart, logits, rtol=0, atol=1e-5)


def test_the_given_model_and_policy_stay_as_they_are(make_vit, images):
    vit = make_vit()
    policy = random_policy(StagedViT(vit, STAGES))
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    model = prune(vit, policy, STAGES).train().to(torch.bfloat16)
    torch.optim.SGD(model.parameters(), 1.0)
    model(images.bfloat16()).square().sum().backward()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not vit.training
    assert all(torch.equal(vit.state_dict()[key], before[key]) for key in before)
    assert policy.actor.net[-1].weight.abs().sum() > 0


def test_it_tells_what_timms_tools_ask(vit):
    model = pruned(vit)
    assert resolve_model_data_config(model) == data_config(vit)
    assert (model.num_classes, model.num_features) == (vit.num_classes, vit.num_features)
    assert model.default_cfg["architecture"] == vit.default_cfg["architecture"]


@torch.no_grad()
def test_timms_validation_loop_runs_on_it(vit, some_images):
    """Loader, transform and top-1 as timm's validate.py has them."""
    from timm.data import create_loader
    from timm.utils import accuracy
    from torch.utils.data import Dataset
    from torchvision.transforms.functional import to_pil_image

    class Pictures(Dataset):
        transform = None

        def __len__(self):
            return len(some_images)

        def __getitem__(self, i):
            image, label = some_images.load([i])
            return self.transform(to_pil_image(image[0].sigmoid())), int(label[0])

    model = pruned(vit)
    config = resolve_model_data_config(model)
    # without workers: libraries that start processes anew could not send them a local class
    loader = create_loader(
        Pictures(),
        batch_size=4,
        use_prefetcher=False,
        device=torch.device("cpu"),
        num_workers=0,
        persistent_workers=False,
        **config,
    )
    scores = [accuracy(model(batch), labels, topk=(1, 5))[1] for batch, labels in loader]
    assert scores == [100.0] * 3  # five classes: the label is among the five best


@torch.no_grad()
def test_half_precision_moves_the_backbone_alone(vit, images):
    model = pruned(vit)
    full = model(images)
    half = model.bfloat16()
    assert half.backbone.model.head.weight.dtype == torch.bfloat16
    assert half.policy.actor.net[-1].weight.dtype == torch.float32
    logits = half(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    # decisions near the threshold may flip: images that kept the same tokens agree
    same = (pruned(vit)(images, True)[1] == half(images.bfloat16(), True)[1]).all(2).all(1)
    assert same.any()
    torch.testing.assert_close(logits[same].float(), full[same], rtol=0, atol=0.3)


def test_training_masks_what_evaluation_removes(vit, make_vit, images):
    # timm builds models in training mode, in which nothing would be faster
    assert not pruned(make_vit().train()).training
    model = pruned(vit)
    assert not model.training
    with torch.no_grad():
        removed, kept = model(images, return_keep=True)
    masked, kept_in_training = model.train()(images, return_keep=True)
    assert torch.equal(kept, kept_in_training)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-4)
    masked.sum().backward()
    assert model.backbone.model.blocks[0].attn.qkv.weight.grad.norm() > 0


@torch.no_grad()
def test_passes_do_not_touch_each_other(vit, images):
    """Two threads over one module, as DataParallel runs its replicas."""
    from concurrent.futures import ThreadPoolExecutor

    model = pruned(vit)
    expected = model(images)
    before = {key: id(value) for key, value in vars(model.backbone).items()}
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: model(images[i : i + 1]), [*range(BATCH)] * 4))
    torch.testing.assert_close(torch.cat(rows), expected.repeat(4, 1), rtol=0, atol=1e-5)
    assert {key: id(value) for key, value in vars(model.backbone).items()} == before


@torch.no_grad()
def test_many_tokens(make_vit):
    """32 x 32 patches of one image, and a single survivor in the next."""
    vit = make_vit(img_size=256, depth=2)

    def keep(view):
        first = torch.arange(view.alive.shape[1]) == 0
        return torch.stack([torch.ones_like(first), first])

    keep.needs_attention, keep.macs_per_decision = False, 0
    model = prune(vit, keep, (1,)).eval()
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    logits, kept = model(images, return_keep=True)
    assert kept.sum(2).tolist() == [[1024], [1]]
    torch.testing.assert_close(logits[:1], vit(images[:1]), rtol=0, atol=1e-4)
    masked = PrunedViT(StagedViT(vit, (1,), "masked"), keep)
    torch.testing.assert_close(logits, masked.eval()(images), rtol=0, atol=1e-4)


@torch.no_grad()
def test_any_callable_is_a_policy(make_vit, images):
    """Even one that says nothing of itself may look at attention."""
    vit = make_vit()
    assert torch.equal(prune(vit, lambda view: view.alive, STAGES)(images), vit(images))
    threshold = AttentionThreshold((0.9, 1.1))
    model = prune(vit, lambda view: threshold(view), STAGES)
    expected = prune(vit, threshold, STAGES).trace(images)
    trace = model.trace(images)
    assert torch.equal(trace.logits, expected.logits)
    assert torch.equal(trace.macs, expected.macs)
    with pytest.raises(ValueError, match=r"must answer bool \[5, 16\]: got NoneType"):
        prune(vit, lambda view: None, STAGES)(images)
    with pytest.raises(ValueError, match="the policy must be callable: got None"):
        prune(vit, None, STAGES)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_policy_may_write_on_what_it_is_shown(vit, images, training):
    def careful(view):
        return view.alive & (view.scatter(view.patch) < 9 - 4 * view.stage)

    def careless(view):
        view.alive[:, 9 - 4 * view.stage :] = False
        assert len(view.image) == len(view.patch) == len(view.token) == view.count.sum()
        return view.alive

    ours, expected = (
        prune(vit, policy, STAGES).train(training).trace(images) for policy in (careless, careful)
    )
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.alive, expected.alive)
    assert torch.equal(ours.macs, expected.macs)


def test_attention_that_was_not_asked_for_is_not_made_up(vit, images):
    class Forgetful:
        needs_attention = False

        def __call__(self, view):
            return view.scatter(view.cls_attention > 1)

    with pytest.raises(ValueError, match="needs_attention = False: let it say True"):
        prune(vit, Forgetful(), STAGES)(images)
    policy = random_policy(StagedViT(vit, STAGES))
    policy.needs_attention = False
    with pytest.raises(ValueError, match="needs_attention = False: let it say True"):
        prune(vit, policy, STAGES)(images)
    # before the first block there is none
    assert prune(vit, Forgetful(), (0,))(images, return_keep=True)[1].sum() == 0


def test_attention_before_the_first_block_ranks_nothing(vit, images):
    with pytest.warns(UserWarning, match="before block 0 all patches have the same attention"):
        prune(vit, TopK((4, 2)), (0, 2))(images)


def test_shares_are_numbers_of_patches(vit, images):
    for tokens, counts in {
        (0.5, 0.25): (8, 4),
        (1.0, 4): (16, 4),
        (np.int64(9), 0.0): (9, 0),
    }.items():
        _, keep = prune(vit, TopK(tokens), STAGES)(images, return_keep=True)
        assert keep.sum(2).tolist() == [list(counts)] * BATCH
    for tokens in ((98.0, 1), (-1, 1), ("a", 1), (1.5, 1)):
        with pytest.raises(ValueError, match="whole number of patches, as 98, or a share"):
            TopK(tokens)


def test_every_parameter_that_asks_for_a_gradient_gets_one(vit, images):
    """Or DistributedDataParallel waits for those that don't."""
    for model in (pruned(vit).train(), pruned(vit).eval()):
        model(images).square().sum().backward()
        wanting = [p for p in model.parameters() if p.requires_grad]
        assert len(wanting) == len(list(vit.parameters()))
        assert all(parameter.grad is not None for parameter in wanting)


def test_embeddings_without_a_head(make_vit, images):
    vit = make_vit(num_classes=0)
    model = prune(vit, TopK((9, 4)), STAGES)
    assert model.forward_features(images).ne(0).any(2).sum(1).tolist() == [5] * BATCH
    assert model(images).shape == (BATCH, vit.embed_dim)
    torch.testing.assert_close(prune(vit, KeepAll(), STAGES)(images), vit(images))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("policy", ["learned", "dynamic"])
@torch.no_grad()
def test_the_whole_model_can_be_quantised(make_vit, images, tmp_path, policy):
    vit = make_vit()
    policy = DynamicViTPolicy(32, 2, hidden=8) if policy == "dynamic" else None
    model = pruned(vit, policy)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    trace = quantised.trace(images)
    assert trace.logits.isfinite().all()
    assert trace.macs.sum() > 0
    with pytest.raises(SavedModelError, match="quantised layers can't be saved"):
        quantised.save_pretrained(tmp_path)
    again = prune(quantised.backbone.model, quantised.policy, STAGES)
    assert again.policy.macs_per_decision == model.policy.macs_per_decision
    assert torch.equal(again.trace(images).macs, trace.macs)


@torch.no_grad()
def test_hooks_of_an_actor_act(vit, images):
    model = pruned(vit)
    model.policy.actor.register_forward_hook(lambda _, __, out: out + torch.tensor([0.0, 1e3]))
    assert model(images, return_keep=True)[1].all()


GRAPHS = {
    "export": lambda model, images: torch.export.export(model, (images,), strict=False),
    "trace": torch.jit.trace,
    "script": lambda model, images: torch.jit.script(model),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_who_wants_one_graph_is_told_what_works(vit, images, make):
    with pytest.raises(Exception, match=r"another number of tokens: use prunevit\.agents\.export"):
        make(prune(vit, KeepAll(), STAGES), images)


WRAPPERS = {
    "DataParallel": (torch.nn.DataParallel, "give model.module, then wrap the pruned model"),
    "compiled": (torch.compile, "give the model before torch.compile"),
}


@pytest.mark.parametrize(("wrap", "way"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_refused_with_the_way_out(make_vit, wrap, way):
    with pytest.raises(UnsupportedBackboneError, match=re.escape(way)):
        prune(wrap(make_vit()), KeepAll(), STAGES)


def test_adapters_are_named(make_vit):
    class Adapted(torch.nn.Module):  # as PEFT's models
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def merge_and_unload(self):
            return self.base_model

    with pytest.raises(UnsupportedBackboneError, match=r"get_base_model.*merge_and_unload"):
        prune(Adapted(make_vit()), KeepAll(), STAGES)


def test_a_model_that_can_not_be_copied_is_refused_with_the_way_out(make_vit):
    vit = make_vit()
    vit.cached = vit.pos_embed * 2  # part of a graph
    with pytest.raises(UnsupportedBackboneError, match=r"can't be copied \(.*PrunedViT\(StagedViT"):
        prune(vit, KeepAll(), STAGES)


def test_what_is_cached_is_nobodys_tensor(vit):
    """A tensor that was made while an exporter ran would be a fake one for ever."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(dither_levels(3, 5, 1, torch.device("cpu")), FakeTensor)
    assert not isinstance(dither_levels(3, 5, 1, torch.device("cpu")), FakeTensor)


# --- on disk ---


@pytest.mark.parametrize(
    "policy",
    [
        None,
        KeepAll(),
        TopK((9, 4), "attention"),
        TopK((9, 4), "random", seed=3),
        AttentionThreshold((0.9, 1.1), dither=0.5),
        DynamicViTPolicy(32, 2, keep=0.6, hidden=8, dither=True),
        "among agents",
        "prior from redundancy",
    ],
    ids=[
        "learned", "keep all", "attention", "random", "threshold", "dynamic", "among agents",
        "prior from redundancy",
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_was_saved_comes_back(make_vit, images, tmp_path, policy):
    vit = make_vit(global_pool="avg", num_classes=7)
    if policy == "among agents":
        policy = random_policy(StagedViT(vit, STAGES), heads=2)
        torch.nn.init.normal_(policy.actor.among_agents.output.weight)
    elif policy == "prior from redundancy":
        policy = random_policy(StagedViT(vit, STAGES), (*DEFAULT_FIELDS, "redundancy"))
    model = pruned(vit, policy)
    model.save_pretrained(tmp_path / "mine")
    logits = model(images)
    again = PrunedViT.from_pretrained(tmp_path / "mine")
    assert not again.training
    assert torch.equal(again(images), logits)
    assert resolve_model_data_config(again) == data_config(vit)
    described = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert described["backbone"]["name"] == "vit_tiny_patch16_224"
    assert described["versions"]["timm"] == timm.__version__
    again.save_pretrained(tmp_path / "once more")
    files = [tmp_path / name / "config.json" for name in ("mine", "once more")]
    assert files[0].read_text() == files[1].read_text()


@torch.no_grad()
def test_a_model_that_prunes_inside_of_its_blocks_comes_back(vit, images, tmp_path):
    model = prune(vit, TopK((9, 4), "attention"), (0, 2), prune_at="mlp", model_kwargs=SHAPE)
    logits, alive = model(images, return_keep=True)
    # as if before the next blocks, by the same attention
    behind = prune(vit, TopK((9, 4), "attention"), (1, 3), model_kwargs=SHAPE)
    expected, survivors = behind(images, return_keep=True)
    assert torch.equal(alive, survivors)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "mine")
    again = PrunedViT.from_pretrained(tmp_path / "mine")
    assert (again.backbone.prune_at, again.backbone.prune_before) == ("mlp", (0, 2))
    assert torch.equal(again(images), logits)
    assert torch.equal(again.trace(images).macs, model.trace(images).macs)
    # models of before say nothing of it
    behind.save_pretrained(tmp_path / "older")
    file = tmp_path / "older" / "config.json"
    described = json.loads(file.read_text())
    assert described.pop("prune_at") == "block"
    file.write_text(json.dumps(described))
    older = PrunedViT.from_pretrained(tmp_path / "older")
    assert older.backbone.prune_at == "block"
    assert torch.equal(older(images), expected)
    file.write_text(json.dumps(described | {"prune_at": "head"}))
    with pytest.raises(ValueError, match="unknown prune_at 'head'"):
        PrunedViT.from_pretrained(tmp_path / "older")


@torch.no_grad()
def test_a_model_that_merges_comes_back(make_vit, images, tmp_path):
    vit = make_vit()
    policy = TopK((9, 4), "attention")
    model = prune(vit, policy, STAGES, SHAPE, on_prune="merge")
    model.save_pretrained(tmp_path)
    again = PrunedViT.from_pretrained(tmp_path)
    assert torch.equal(again(images), model(images))
    dropping = prune(vit, policy, STAGES, SHAPE)(images)
    assert (model(images) - dropping).abs().max() > 1e-3
    file = tmp_path / "config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"on_prune": "fuse"}))
    with pytest.raises(ValueError, match="unknown on_prune 'fuse'"):
        PrunedViT.from_pretrained(tmp_path)
    del described["on_prune"]  # as in models that were saved before there was a choice
    file.write_text(json.dumps(described))
    assert torch.equal(PrunedViT.from_pretrained(tmp_path)(images), dropping)


def test_a_run_that_merges_becomes_a_model_that_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (
        "--num-envs 16 --iterations 2 --eval-size 20 --hidden 4 --on-prune merge "
        "--observation token redundancy --attention-prior 0 --redundancy-prior 20"
    )
    mappo([*options.split(), "--run-name", "tiny"])
    model = PrunedViT.from_run("runs/tiny")
    assert model.backbone.on_prune == "merge"
    weight = model.policy.actor.redundancy_weight * TokenActor.PRIOR_SPEED
    assert 19 < float(weight) < 21  # it learned, from where it began
    assert float(weight) != 20
    file = Path("runs/tiny/config.json")
    older = json.loads(file.read_text())
    del older["on_prune"]
    file.write_text(json.dumps(older))
    assert PrunedViT.from_run("runs/tiny").backbone.on_prune == "drop"


def test_a_run_becomes_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--num-envs 16 --iterations 2 --eval-size 20 --prune-before 2 4 --hidden 4 --seed 3"
    monkeypatch.setattr("prunevit.envs.data.cluttered_digits.DEFAULT_SIZES", dict.fromkeys(
        ("train", "validation", "test"), 64))  # fmt: skip
    mappo([*options.split(), "--run-name", "tiny"])
    model = PrunedViT.from_run("runs/tiny")
    assert model.backbone.prune_before == (2, 4)
    trained = load_file("runs/tiny/policy.safetensors")
    assert all(torch.equal(model.policy.actor.state_dict()[key], trained[key]) for key in trained)
    dense = create_backbone()
    for key, value in dense.state_dict().items():
        assert torch.equal(model.backbone.model.state_dict()[key], value)
    model.save_pretrained("mine")
    images = torch.randn(3, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(PrunedViT.from_pretrained("mine")(images), model(images))


def test_a_run_over_many_prices_becomes_a_model_with_a_knob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prunevit.envs.data.cluttered_digits.DEFAULT_SIZES", dict.fromkeys(
        ("train", "validation", "test"), 64))  # fmt: skip
    options = "--num-envs 16 --iterations 1 --eval-size 20 --hidden 4 --alpha-range 0.01 0.25"
    fields = ("token", "cls_attention", "alpha")
    mappo([*options.split(), "--observation", *fields, "--run-name", "tiny"])
    model = PrunedViT.from_run("runs/tiny")
    assert model.policy.alpha == pytest.approx(0.05)
    with torch.no_grad():
        model.policy.actor.alpha_weight.fill_(-0.1)
        model.policy.actor.keep_bias.fill_(-0.2)
    model.policy.alpha, model.policy.threshold = 0.2, 0.4
    model.save_pretrained("mine")
    again = PrunedViT.from_pretrained("mine")
    assert (again.policy.alpha, again.policy.threshold) == (0.2, 0.4)
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        kept = again(images, return_keep=True)[1].sum()
        again.policy.alpha = 1e-3
        assert again(images, return_keep=True)[1].sum() > kept


def test_a_run_on_a_checkpoint_becomes_a_model(make_vit, tmp_path):
    """What the checkpoint knows of its model comes along."""
    vit = make_vit(in_chans=1, img_size=64)
    kwargs = SHAPE | {"in_chans": 1, "img_size": 64}
    weights = tmp_path / "backbone.safetensors"
    write_weights(weights, vit.state_dict(), "vit_tiny_patch16_224", 5, kwargs)
    policy = random_policy(StagedViT(vit, STAGES))
    run = tmp_path / "run"
    run.mkdir()
    save_file(policy.actor.state_dict(), run / "policy.safetensors")
    settings = {
        "env": "token-prune", "backbone": "vit_tiny_patch16_224", "model_kwargs": {},
        "pretrained": False, "checkpoint": str(weights), "dataset": "folder:somewhere",
        "prune_before": STAGES, "observation": DEFAULT_FIELDS, "hidden": [8],
        "attention_prior": 0.5,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(settings))
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pruned(vit, policy)(images)
        model = PrunedViT.from_run(run)
        assert torch.equal(model(images), expected)
        model.save_pretrained(tmp_path / "mine")
        assert torch.equal(PrunedViT.from_pretrained(tmp_path / "mine")(images), expected)

    without = settings | {"checkpoint": None}
    (run / "config.json").write_text(json.dumps(without))
    with pytest.raises(SavedModelError, match="random weights, which were not kept"):
        PrunedViT.from_run(run)


def test_it_goes_to_the_hub_through_huggingfaces_mixin(vit, tmp_path, monkeypatch):
    """What would be uploaded is what was saved."""
    from huggingface_hub import HfApi

    uploaded = {}
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **_: uploaded.update(
            {repo_id: sorted(path.name for path in folder_path.iterdir())}
        ),
    )
    pruned(vit).push_to_hub("me/mine")
    assert uploaded == {"me/mine": ["README.md", "config.json", "model.safetensors"]}


# --- bad input ---


def test_a_policy_of_another_backbone_is_refused(vit, make_vit):
    other = random_policy(StagedViT(make_vit(embed_dim=48), STAGES))
    with pytest.raises(ValueError, match="policy reads 99 numbers an agent, the backbone of width"):
        prune(vit, other, STAGES)
    with pytest.raises(ValueError, match="width 32 with 3 stages shows 68"):
        prune(vit, random_policy(StagedViT(vit, STAGES)), (1, 2, 3))
    with pytest.raises(ValueError, match="with 1 prefix tokens, this one has 3"):
        prune(make_vit(reg_tokens=2), random_policy(StagedViT(vit, STAGES)), STAGES)


def test_what_can_not_be_pruned_is_refused():
    with pytest.raises(UnsupportedBackboneError, match="SwinTransformer"):
        prune(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), KeepAll())


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_refused(vit, shape):
    with pytest.raises(ValueError, match=r"images of shape .*staged for \[3, 32, 32\]"):
        pruned(vit)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda view: view.alive.long(), r"must answer bool \[2, 16\]: got torch.int64 \[2, 16\]"),
        (lambda view: view.alive[:, 1:], r"must answer bool \[2, 16\]: got torch.bool \[2, 15\]"),
    ],
)
def test_a_wrong_answer_is_refused(vit, answer, message):
    answer.needs_attention, answer.macs_per_decision = False, 0
    with pytest.raises(ValueError, match=message):
        pruned(vit, answer)(torch.zeros(2, 3, 32, 32))


def test_logits_that_are_no_numbers_are_refused(vit, images):
    policy = random_policy(StagedViT(vit, STAGES))
    policy.actor.net[-1].bias.data[1] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        pruned(vit, policy)(images)
    with pytest.raises(ValueError, match="logits are not finite"):
        pruned(vit)(images * torch.nan)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(vit, tmp_path, name):
    pruned(vit).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SavedModelError, match=f"{name} is missing"):
        PrunedViT.from_pretrained(tmp_path)


def test_damaged_files_are_refused(vit, make_vit, tmp_path):
    pruned(vit).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole, described = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-100])
    with pytest.raises(SavedModelError, match=r"model.safetensors is damaged"):
        PrunedViT.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for change, message in [
        ({"format": 2}, "written in format 2, this version reads 1"),
        ({"policy": {"kind": "magic"}}, "unknown kind of policy 'magic'"),
        (
            {"policy": {"kind": "adaptive-sampling", "samples": [9, 4]}},
            "policy 'adaptive-sampling' is gone: it was not ATS as published",
        ),
        ({"backbone": {"name": "vit_tiny_patch16_224"}}, "configuration is damaged"),
        ({"backbone": described["backbone"] | {"name": "vit_none"}}, "unknown backbone 'vit_none'"),
        ({"policy": described["policy"] | {"hidden": [9]}}, "doesn't fit its configuration"),
    ]:
        config.write_text(json.dumps(described | change))
        with pytest.raises(SavedModelError, match=message):
            PrunedViT.from_pretrained(tmp_path)
    config.write_text(json.dumps(described)[:-20])
    with pytest.raises(SavedModelError, match=r"config.json can't be read"):
        PrunedViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": True}, "strict: from_pretrained has no such option"),
        ({"num_classes": 3}, "num_classes: from_pretrained has no such option"),
        ({"revision": "main"}, "revision: is of the hub, and .* is a local folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(vit, tmp_path, options, message):
    pruned(vit).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=message):
        PrunedViT.from_pretrained(tmp_path, **options)
    assert PrunedViT.from_pretrained(tmp_path, token=None, local_files_only=True)
    with pytest.raises(TypeError, match="safe_serialization"):
        pruned(vit).save_pretrained(tmp_path, safe_serialization=True)


def test_a_hub_name_without_a_network(monkeypatch):
    def no_network(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("prunevit.agents.saving.hf_hub_download", no_network)
    with pytest.raises(SavedModelError, match="'me/mine' is no local folder, and can't be fetched"):
        PrunedViT.from_pretrained("me/mine")


@timm_records
def test_arguments_are_those_that_timm_recorded(make_vit, images, tmp_path):
    for kwargs in (
        {"act_layer": "relu", "drop_path_rate": 0.1},
        {"num_heads": 8, "qk_norm": True, "norm_layer": "rmsnorm"},
        {"init_values": 0.5, "reg_tokens": 2, "global_pool": "avg"},
    ):
        model = prune(make_vit(**kwargs), KeepAll(), STAGES)
        model.save_pretrained(tmp_path)
        again = PrunedViT.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(images), model(images))
        rates = [getattr(block.drop_path1, "drop_prob", 0) for block in again.backbone.model.blocks]
        assert rates[-1] == pytest.approx(kwargs.get("drop_path_rate", 0))


def test_half_precision_is_saved(vit, images, tmp_path):
    model = pruned(vit).bfloat16()
    model.save_pretrained(tmp_path)
    again = PrunedViT.from_pretrained(tmp_path)
    assert torch.equal(again.backbone.model.head.weight, model.backbone.model.head.weight.float())


@timm_records
@torch.no_grad()
def test_a_replaced_head_is_saved(make_vit, images, tmp_path):
    vit = make_vit()
    vit.head = torch.nn.Linear(vit.embed_dim, 9)
    model = prune(vit, KeepAll(), STAGES)
    assert model.num_classes == 9
    model.save_pretrained(tmp_path)
    assert torch.equal(PrunedViT.from_pretrained(tmp_path)(images), model(images))


@torch.no_grad()
def test_a_vit_built_by_hand_is_saved(images, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = prune(VisionTransformer(**sizes, mlp_ratio=3, qkv_bias=False).eval(), KeepAll(), STAGES)
    model.save_pretrained(tmp_path)
    assert torch.equal(PrunedViT.from_pretrained(tmp_path)(images), model(images))
    strange = prune(VisionTransformer(**sizes, act_layer="relu").eval(), KeepAll(), STAGES)
    with pytest.raises(SavedModelError, match=r"outputs on one image are .* apart.*model_kwargs"):
        strange.save_pretrained(tmp_path)
    named = prune(strange.backbone.model, KeepAll(), STAGES, {"act_layer": "relu"})
    named.save_pretrained(tmp_path)
    assert torch.equal(PrunedViT.from_pretrained(tmp_path)(images), named(images))


def scaled(model):
    layer = model.blocks[1].mlp.fc1
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)


NOT_REBUILT = {
    "a forward of its own": (scaled, "outputs on one image are .* apart"),
    "a hook": (
        lambda model: model.blocks[0].register_forward_hook(lambda _, __, out: 2 * out),
        "outputs on one image are .* apart",
    ),
    "an attribute": (
        lambda model: setattr(model.blocks[0].norm1, "eps", 0.5),
        "outputs on one image are .* apart",
    ),
    "dropout": (
        lambda model: setattr(model.blocks[0].mlp.drop1, "p", 0.3),
        r"blocks\.0\.mlp\.drop1 drops 0\.3",
    ),
    "a wrapped layer": (
        lambda model: setattr(
            model.blocks[0].mlp, "fc1", torch.nn.Sequential(model.blocks[0].mlp.fc1)
        ),
        r"blocks\.0\.mlp\.fc1\.",
    ),
}


@timm_records
@pytest.mark.parametrize(("change", "message"), NOT_REBUILT.values(), ids=NOT_REBUILT)
def test_what_would_come_back_different_is_not_saved(make_vit, tmp_path, change, message):
    """And what was saved before stays."""
    vit = make_vit()
    prune(vit, KeepAll(), STAGES).save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(vit)
    with pytest.raises(SavedModelError, match=message) as raised:
        prune(vit, KeepAll(), STAGES).save_pretrained(tmp_path)
    assert "model_kwargs" in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_save_that_is_cut_short_leaves_no_mixture(vit, tmp_path, monkeypatch):
    """The old model, or none: never new weights beside an old configuration."""
    pruned(vit, TopK((9, 4))).save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prunevit.agents.saving.save_file", full)
        with pytest.raises(OSError, match="no space"):
            pruned(vit, KeepAll()).save_pretrained(tmp_path)
    assert PrunedViT.from_pretrained(tmp_path).policy.tokens == (9, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "replace",
            lambda self, to: full() if to.name == "config.json" else replace(self, to),
        )
        with pytest.raises(OSError, match="no space"):
            pruned(vit, KeepAll()).save_pretrained(tmp_path)
    with pytest.raises(SavedModelError, match=r"config\.json is missing"):
        PrunedViT.from_pretrained(tmp_path)


class OtherTensor(torch.Tensor):
    """A tensor subclass, as libraries that quantise or shard weights make them."""


def test_weights_that_are_no_plain_tensors_are_not_saved(vit, tmp_path):
    model = pruned(vit, KeepAll())
    layer = model.backbone.model.blocks[1].mlp.fc1
    weight = layer.weight.detach().as_subclass(OtherTensor)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        SavedModelError, match=r"blocks\.1\.mlp\.fc1\.weight is a OtherTensor, which"
    ):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_policy_without_a_form_on_disk_is_not_saved(vit, tmp_path):
    stranger = LearnedPolicy(torch.nn.Sequential(torch.nn.Linear(66, 2)), ("token", "cls", "stage"))
    with pytest.raises(SavedModelError, match="LearnedPolicy has no form on disk"):
        prune(vit, stranger, STAGES, SHAPE).save_pretrained(tmp_path)


class Flipped(LearnedPolicy):
    def keep(self, view, margin):
        return super().keep(view, -margin)


class FlippedActor(TokenActor):
    def forward(self, observation):
        return super().forward(observation).flip(-1)


CHANGED_POLICIES = {
    "subclass": (lambda policy: setattr(policy, "__class__", Flipped), "a Flipped has no form"),
    "subclass of the actor": (
        lambda policy: setattr(policy.actor, "__class__", FlippedActor),
        "LearnedPolicy has no form",
    ),
    "hook": (
        lambda policy: policy.register_forward_hook(lambda _, __, keep: ~keep),
        "it has hooks of its own",
    ),
    "method": (
        lambda policy: setattr(policy, "keep", lambda view, margin: margin < 0),
        "it has keep of its own",
    ),
    "hook on the actor": (
        lambda policy: policy.actor.register_forward_hook(lambda _, __, out: out.flip(-1)),
        "other outputs",
    ),
    "activation": (lambda policy: setattr(policy.actor.net, "2", nn.ReLU()), "other outputs"),
    "prior": (lambda policy: setattr(policy.actor, "attention", 0), "other outputs"),
    "layer": (
        lambda policy: setattr(policy.actor.net, "3", nn.Sequential(policy.actor.net[3])),
        r"net\.3",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"), CHANGED_POLICIES.values(), ids=CHANGED_POLICIES.keys()
)
def test_a_policy_that_would_come_back_different_is_not_saved(vit, tmp_path, change, message):
    model = pruned(vit)
    change(model.policy)
    with pytest.raises(SavedModelError, match=message):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_changed_predictor_is_not_saved(vit, tmp_path):
    model = pruned(vit, DynamicViTPolicy(32, len(STAGES)))
    model.policy.predictors[1].read[2] = nn.ReLU()
    with pytest.raises(SavedModelError, match="other outputs"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "policy.safetensors"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, missing):
    for name in {"config.json", "policy.safetensors"} - {missing}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SavedModelError, match=f"no finished run: {missing} is missing"):
        PrunedViT.from_run(tmp_path)


def test_a_run_of_another_game_is_refused(tmp_path):
    (tmp_path / "policy.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({
        "env": "pettingzoo:x", "backbone": "", "model_kwargs": {}, "pretrained": False,
        "checkpoint": None, "dataset": "digits",
    }))  # fmt: skip
    with pytest.raises(SavedModelError, match="run of pettingzoo:x, which prunes no ViT"):
        PrunedViT.from_run(tmp_path)
