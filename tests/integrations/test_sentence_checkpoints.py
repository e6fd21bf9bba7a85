"""Evaluation, checkpoints, copies and saved models of sentence-transformers with our losses."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_models import (
    HERE,
    EagerSigLipLoss,
    features,
    sentences,
    tiny_model,
    trainer,
)
from sentence_runs import (
    KINDS,
    both,
    scale_and_bias,
    weights,
)
from sentence_transformers import SentenceTransformer

from fused_siglip.integrations.sentence_transformers import (
    SCALE_AND_BIAS_FILE,
    SigLipLoss,
)

torch.set_num_threads(1)


@both
def test_evaluate(tmp_path, kind):
    model = tiny_model()
    loss = KINDS[kind](model)
    held_out = Dataset.from_dict(sentences(16))
    run = trainer(tmp_path, model, loss, steps=1, per_device_eval_batch_size=16)
    logged = run.evaluate(held_out)["eval_loss"]
    with torch.no_grad():
        expected = EagerSigLipLoss(tiny_model())(features(model, 16))
    assert logged == pytest.approx(expected.item(), rel=1e-5)
    # and the trained model still encodes as any other
    assert model.encode(["w1 w2"], output_value=None)[0].keys() == (
        tiny_model().encode(["w1 w2"], output_value=None)[0].keys()
    )


@both
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, kind):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    model = tiny_model()
    loss = KINDS[kind](model)
    trainer(tmp_path, model, loss, **options).train()

    again = tiny_model()
    loss_again = KINDS[kind](again)
    run = trainer(tmp_path, again, loss_again, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(scale_and_bias(loss_again), scale_and_bias(loss))
    assert torch.equal(weights(again), weights(model))

    saved = json.loads((tmp_path / "checkpoint-3" / SCALE_AND_BIAS_FILE).read_text())
    assert saved["logit_scale"] != loss.init_logit_scale
    assert saved["logit_bias"] != pytest.approx(model.logit_scale_and_bias[1].item(), abs=1e-6)


def test_best_model_has_its_own_scale_and_bias(tmp_path):
    model = tiny_model()
    run = trainer(
        tmp_path,
        model,
        SigLipLoss(model),
        steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint is the best
        eval_dataset=Dataset.from_dict(sentences(16)),
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    saved = json.loads(Path(best, SCALE_AND_BIAS_FILE).read_text())
    assert model.logit_scale_and_bias.tolist() == [saved["logit_scale"], saved["logit_bias"]]


def test_resuming_without_saved_scale_and_bias_is_refused(tmp_path):
    model = tiny_model()
    trainer(
        tmp_path, model, SigLipLoss(model), steps=1, save_strategy="steps", save_steps=1
    ).train()
    (tmp_path / "checkpoint-1" / SCALE_AND_BIAS_FILE).unlink()
    run = trainer(tmp_path, model, SigLipLoss(model))
    with pytest.raises(RuntimeError, match="logit_scale_and_bias"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


PLAIN_LOAD = """
import sys
sys.modules["fused_siglip"] = None  # as if it were not installed
sys.path.insert(0, {here!r})
import torch
from torchvision_on_cpu import define_schemas
define_schemas()
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({folder!r}, device="cpu")
assert type(model) is SentenceTransformer and not hasattr(model, "logit_scale_and_bias")
torch.save(model.encode(["w1 w2", "w3"], convert_to_tensor=True), {folder!r} + "/encoded.pt")
"""


def test_saved_model_loads_without_this_package(tmp_path):
    model = tiny_model()
    trainer(tmp_path / "run", model, SigLipLoss(model), steps=2).train()
    folder = str(tmp_path / "saved")
    model.save_pretrained(folder)
    program = PLAIN_LOAD.format(here=str(HERE), folder=folder)
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    encoded = model.encode(["w1 w2", "w3"], convert_to_tensor=True)
    assert torch.equal(torch.load(f"{folder}/encoded.pt"), encoded)
    assert "_Trained" not in Path(folder, "README.md").read_text()


def test_copies_and_pickles():
    model = tiny_model()
    loss = SigLipLoss(model, init_logit_bias=-7)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other.logit_scale_and_bias, model.logit_scale_and_bias)
    pickle.dumps(type(model)._multi_process_worker)  # what encode's pool of processes starts
    assert isinstance(model, SentenceTransformer) and type(model).__name__ == "SentenceTransformer"
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert loss.model.logit_scale_and_bias.dtype == torch.float32


def test_model_init_starts_each_model_anew(tmp_path):
    made = []

    def make():
        made.append(tiny_model())
        return made[-1]

    run = trainer(tmp_path, None, lambda model: SigLipLoss(model, 2.0, -5.0), model_init=make)
    run.train()
    assert len(made) > 1 and run.model is made[-1]
    assert run.model.logit_scale_and_bias.tolist() != [2.0, -5.0]
    assert run.model.logit_scale_and_bias.detach().sub(torch.tensor([2.0, -5.0])).abs().max() < 1
