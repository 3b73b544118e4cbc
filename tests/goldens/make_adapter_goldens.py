"""Writes tests/goldens/<name>/ (an adapter, as PEFT writes it) and <name>.npz (its numbers), with
peft and torch, for two of the models that make_goldens.py has made.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    python tests/goldens/make_adapter_goldens.py
    python tests/goldens/make_adapter_goldens.py --check

Not imported by any test: tests compare with the files, so they need no torch. float32 throughout.
B is random too, for with the zeros that it begins with an adapter changes nothing.

--check writes nothing. It loads <name>_written/, which ssp_jax has written from <name>/ and which
tests/model/test_hf_adapter.py writes again, by peft, and compares the config and the logits.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> its base, and what is not PEFT's default
ADAPTERS: dict[str, tuple[str, dict]] = {
    "qwen2_lora": ("qwen2", dict(r=4, lora_alpha=8, target_modules=ALL)),
    "qwen3_rslora": (
        "qwen3",
        dict(r=3, lora_alpha=2.5, target_modules=["q_proj", "v_proj"], use_rslora=True),
    ),
}
FOLDER = Path(__file__).parent


def config_of(name: str) -> LoraConfig:
    base, changes = ADAPTERS[name]
    return LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=base, **changes)


@torch.no_grad()
def write(name: str) -> None:
    base, _ = ADAPTERS[name]
    config = config_of(name)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER / base), config)
    config.base_model_name_or_path = base  # no path of this machine
    for parameter_name, x in model.named_parameters():
        if "lora_B" in parameter_name:
            # As large as the base's weights: a wrong scale shows.
            x.normal_(std=1.0)
    model.save_pretrained(FOLDER / name, save_embedding_layers=False)
    (FOLDER / name / "README.md").unlink()
    tokens = torch.randint(0, model.config.vocab_size, (1, 24))
    logits = model.eval()(tokens).logits[0]
    arrays = {"tokens": tokens[0].numpy().astype(np.int32), "logits": logits.numpy()}
    np.savez(FOLDER / f"{name}.npz", **arrays)


@torch.no_grad()
def check(name: str) -> None:
    """What ssp_jax has written is the same adapter to peft, which reads it without a warning."""
    base, _ = ADAPTERS[name]
    numbers = np.load(FOLDER / f"{name}.npz")
    written = FOLDER / f"{name}_written"
    model = AutoModelForCausalLM.from_pretrained(FOLDER / base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as for tensors that are missing
        model = PeftModel.from_pretrained(model, written).eval()
    found = model.peft_config["default"].to_dict() | {"inference_mode": False}
    assert found == config_of(name).to_dict(), found
    logits = model(torch.tensor(numbers["tokens"])[None]).logits[0].numpy()
    np.testing.assert_array_equal(logits, numbers["logits"])
    # Its keys are a part of those that peft writes.
    keys = [json.loads((FOLDER / of / "adapter_config.json").read_text()) for of in (name, written)]
    assert keys[1].keys() <= keys[0].keys() and list(keys[1]) == sorted(keys[1])
    print(f"{written.name}: peft has the same logits")


def main() -> None:
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        if "--check" in sys.argv:
            check(name)
        else:
            write(name)


if __name__ == "__main__":
    main()
