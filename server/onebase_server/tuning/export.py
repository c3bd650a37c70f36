"""A trained adapter to disk: PEFT's directory format with a model card, whole or not at all."""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel

from onebase_server.errors import ConfigurationError
from onebase_server.tuning.recipe import Recipe
from onebase_server.tuning.trainer import Losses


def check_output(output: Path) -> None:
    """Refuse, before any training, a directory that is already there.

    Raises:
        ConfigurationError: `output` exists.
    """
    if output.exists():
        raise ConfigurationError(f"{output} already exists; choose another --output or remove it first.")


def save_adapter(model: PeftModel, output: Path, *, base_name: str, card: str) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` (bfloat16) and `README.md` into a new directory.

    All of it is written beside `output` and renamed into place, so that an interrupted run leaves nothing behind.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name  # PEFT puts the path on this machine
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order changes from run to run
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if "lora_" in name}
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(unfinished, state_dict=weights, save_embedding_layers=False)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def model_card(*, base_name: str, data: Path, num_examples: int, recipe: Recipe, losses: Losses) -> str:
    """The adapter's README: what it was trained on, from what, how, and the losses it ended with."""
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    parameters = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    parameters["targets"] = "all-linear" if recipe.targets is None else ", ".join(recipe.targets)
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in parameters.items())
    return f"""---
base_model: {base_name}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# LoRA adapter for {base_name}

Trained by `onebase tune` on {num_examples} examples, `{data.name}` (sha256 `{digest}`).

After the last epoch: {losses} (nats per answer token).

| hyper-parameter | value |
|---|---|
{rows}
"""
