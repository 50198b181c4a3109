"""Runs of a few steps that many tests only read: each is trained once a session."""

import shutil

import torch

from helpers.recipes import tiny_recipe

BLOCKS_OF_8 = {"objective__name": "block", "objective__block_tokens": 8, "objective__shift": False}
RECIPES = {
    "ar": {"objective__name": "autoregressive"},
    "untied": {"objective__name": "autoregressive", "model__architecture__tie_embeddings": False},
    "whole": {},
    "sedd": {"objective__name": "sedd"},
    "genmd4": {"objective__name": "genmd4"},
    "ssd_lm": {"objective__name": "ssd_lm"},
    "block8": BLOCKS_OF_8,
    "causal4": {
        "objective__name": "block",
        "objective__block_tokens": 4,
        "objective__context": "clean_causal",
        "objective__autoregressive_weight": 0.5,
        "curriculum__annealing": {},
    },
    "block32": {**BLOCKS_OF_8, "objective__block_tokens": 32},
    "longer": {**BLOCKS_OF_8, "training__steps": 60},
}


class Runs:
    """`runs / name` is the folder of a run of RECIPES, trained when it is first used.

    `exported` is the Hugging Face folder of `untied`, and `damaged` is `longer` with empty data files.
    """

    def __init__(self, data_folder, folder):
        self.data_folder, self.folder = data_folder, folder

    def __truediv__(self, name):
        from dlm_ray.checkpoint.export import export  # with transformers, which not every test needs
        from dlm_ray.training import loop

        path = self.folder / name
        if not path.exists():
            if name == "exported":
                export(str(self / "untied"), str(path))
            elif name == "damaged":
                shutil.copytree(self / "longer", path)
                for file in path.rglob("step_*/*/d/*"):
                    file.write_bytes(b"")
            elif name in RECIPES:
                recipe = tiny_recipe(self.data_folder, name, **{"training__steps": 15, **RECIPES[name]})
                with torch.enable_grad():  # the test that asks first may be without gradients
                    loop.fit(recipe, path)
        return path
