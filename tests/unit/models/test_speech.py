"""Speech models that leave layers out at random do not, as each worker would leave out others."""

from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from hone.recipe import parse_recipe
from hone.storage import Home
from tests.samples import write_sample
from tests.zero_matrix import prepared
from training.model import build_model


def test_no_layer_is_dropped(tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "base")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Wav2Vec2Config(**sizes, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), layerdrop=0.5, num_conv_pos_embeddings=16)
    Wav2Vec2Model(config).save_pretrained(tmp_path / "base")
    tree = {
        "name": "speech",
        "task": "audio-classification",
        "base": str(tmp_path / "base"),
        "data": {"train": str(write_sample(tmp_path, "audio-classification", rows=12)), "validation_fraction": 0, "stop_on": []},
    }
    job = prepared(parse_recipe(tree, where="test"), tmp_path / "run", home=Home(tmp_path / "home"))
    model, heads = build_model(job, dtype=torch.float32)
    assert model.config.layerdrop == 0
    assert heads == ["projector", "classifier"]
    run = [0]
    for layer in model.get_base_model().wav2vec2.encoder.layers:
        layer.register_forward_hook(lambda *_: run.__setitem__(0, run[0] + 1))
    for _ in range(4):
        model.train()(torch.randn(1, 1600))
    assert run[0] == 12
