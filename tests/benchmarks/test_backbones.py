"""The table of backbones."""

import sys

import pytest
import timm

from prunevit.benchmarks import backbones
from prunevit.benchmarks.backbones import Answer, ask, table

NAMES = (
    "beit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_tiny_patch16_224",
    "resnet18",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_resnet26d_224",
    "vit_tiny_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
)


def test_models_are_asked():
    answers = {answer.name: answer for answer in ask(NAMES)}
    refused = {name for name, answer in answers.items() if answer.reason is not None}
    assert refused == {"beit_base_patch16_224", "resnet18", "vit_pwee_patch16_reg1_gap_256"}
    assert "ParallelScalingBlock" in answers["vit_pwee_patch16_reg1_gap_256"].reason
    assert answers["vit_small_patch16_dinov3"].model == "Eva"
    bare = {name for name, answer in answers.items() if not answer.has_head}
    assert bare == {"vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"}
    assert {name: answer.title for name, answer in answers.items()} == dict(
        zip(
            NAMES,
            [
                "all else",
                "DeiT, distilled",
                "DeiT",
                "all else",
                "DINOv2, with and without registers",
                "DINOv3",
                "ViT behind a convolutional stem",
                *["ViT, AugReg and others"] * 3,
            ],
            strict=True,
        )
    )


def test_every_answer_is_counted_in_one_row():
    answers = [
        Answer("deit_a", "VisionTransformer", None),
        Answer("deit_b", "VisionTransformer", None),
        Answer("deit_c", "VisionTransformer", None, has_head=False),
        Answer("vit_a", "VisionTransformer", "odd blocks"),
        Answer("vit_b", "VisionTransformer", "odd blocks"),
        Answer("vit_c", "VisionTransformer", None),
        Answer("beit_a", "Beit", "biased"),
        Answer("deit_d", "Other", "other"),
        *(Answer(f"net_{i}", f"Net{i}", "other") for i in range(9)),
    ]
    rows = table(answers).splitlines()
    assert rows[2:6] == [
        "| DeiT | `VisionTransformer` | `deit_a`, `deit_b` | 3 | 0 |",
        "| ViT, AugReg and others | `VisionTransformer` | `vit_c` | 1 | 2: odd blocks |",
        "| all else | `Beit` | `beit_a` | 0 | 1: biased |",
        "| all else | `Other`, `Net0`, `Net1`, `Net2`, `Net3`, `Net4`, `Net5`, `Net6` and 2 other "
        "classes | `deit_d`, `net_4` | 0 | 10: other |",
    ]
    assert rows[-1].startswith(
        f"4 of timm {timm.__version__}'s 17 models are supported. 1 of them "
    )


def test_the_command_prints_the_models_that_fit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["backbones", "deit_tiny*", "deit3_small*_224"])
    backbones.main()
    out = capsys.readouterr().out
    assert "| DeiT-3 |" in out
    assert "3 of timm" in out
    monkeypatch.setattr(sys, "argv", ["backbones", "no_such_*"])
    with pytest.raises(SystemExit, match="no model like no_such_"):
        backbones.main()
