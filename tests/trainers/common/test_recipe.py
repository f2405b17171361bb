"""Settings that trainings on labelled images share."""

import pytest

from prunevit.trainers.backbone import BackboneConfig
from prunevit.trainers.finetune import FinetuneConfig


@pytest.mark.parametrize("kind", [BackboneConfig, FinetuneConfig])
@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epoch_size": 0},
        {"batch_size": 0},
        {"accumulate": 129},
        {"precision": "float16"},
        {"workers": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 1.5},
        {"weight_decay": -1.0},
        {"optimizer": "sdg"},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_values_out_of_range_are_refused(kind, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        kind(**change)


@pytest.mark.parametrize("kind", [BackboneConfig, FinetuneConfig])
def test_an_empty_run_name_is_refused(kind):
    with pytest.raises(ValueError, match="run_name is empty"):
        kind(run_name="")
