"""The small recipe of most tests."""

import json

from dlm_ray.config.load import set_key, validate


def tiny_recipe(data, name="tiny", **changes):
    """Return a recipe whose network trains in a second; `changes` are recipe keys with `__` for the dot."""
    tree = {
        "name": name,
        "model": {
            "architecture": {
                "family": "llama",
                "width": 32,
                "num_layers": 2,
                "num_heads": 2,
                "max_positions": 64,
                "tie_embeddings": True,
            }
        },
        "data": {"sources": [{"path": data}], "window_shards": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "training": {"steps": 8, "global_batch_size": 12, "micro_batch_size": 6},
        "validation": {"every_steps": 4, "sequences": 6},
        "checkpoint": {"every_steps": 4},
        "tracking": {"log_every_steps": 1},
    }
    for key, value in changes.items():
        assert not set_key(tree, f"{key.replace('__', '.')}={json.dumps(value)}")
    return validate(tree, name)
