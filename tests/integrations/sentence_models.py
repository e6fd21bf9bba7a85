"""Small sentence-transformers models, data and runs, built here: nothing is downloaded."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision_on_cpu import define_schemas

define_schemas()  # also in the processes that have no conftest.py

from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    TrainerCallback,
)

from benchmarks.common.memory import peak_bytes
from fused_siglip.integrations.sentence_transformers import CachedSigLipLoss, SigLipLoss
from fused_siglip.testing import eager_siglip_loss

WORDS = 300
HERE = Path(__file__).parent

logging.getLogger("transformers").setLevel(logging.ERROR)


class EagerSigLipLoss(nn.Module):
    """The eager loss in the library's convention, with parameters of its own: the peer."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)).to(model.dtype))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0).to(model.dtype))

    def forward(self, sentence_features, labels=None) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        images, texts = (nn.functional.normalize(e, dim=-1) for e in embeddings)
        return eager_siglip_loss(images, texts, self.logit_scale.exp(), self.logit_bias)


def tiny_model(dropout: float = 0.0, width: int = 32) -> SentenceTransformer:
    """A BERT of two layers with random weights, the same in every call, and mean pooling."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
        Path(folder, "vocab.txt").write_text("\n".join(words))
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        BertTokenizerFast(vocab_file=str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu")


def tiny_towers() -> SentenceTransformer:
    """A SigLIP model of two small towers, for columns of images and of texts."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": WORDS + 5, "max_position_embeddings": 16, "projection_size": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = SiglipConfig(
        text_config=tower | text | tokens,
        vision_config=tower | {"image_size": 32, "patch_size": 16},
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_model().tokenizer
        tokenizer.model_max_length = 16
        images = SiglipImageProcessor(size={"height": 32, "width": 32})
        SiglipProcessor(images, tokenizer).save_pretrained(folder)
        torch.manual_seed(0)
        SiglipModel(config).save_pretrained(folder)
        return SentenceTransformer(folder, device="cpu")


def images(count: int) -> list[Image.Image]:
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return [Image.fromarray(image.numpy()) for image in pixels]


def sentences(count: int, columns: int = 2) -> dict[str, list[str]]:
    """Rows of sentences of 2 to 5 words; those of a row share their first word."""
    draw = torch.Generator().manual_seed(1)
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(columns - 2))]
    table = {name: [] for name in names}
    for row in range(count):
        for name in names:
            length = int(torch.randint(1, 5, (), generator=draw))
            rest = torch.randint(0, WORDS, (length,), generator=draw).tolist()
            table[name].append(" ".join(f"w{i}" for i in [row % WORDS, *rest]))
    return table


def features(model: SentenceTransformer, count: int, columns: int = 2) -> list[dict[str, Tensor]]:
    return [model.preprocess(column) for column in sentences(count, columns).values()]


def part(column: dict, begin: int, end: int, length: int | None = None) -> dict:
    """Rows begin to end of a column's features, cut off after ``length`` tokens."""
    return {k: v[begin:end, :length] if isinstance(v, Tensor) else v for k, v in column.items()}


class ZeroGradients(TrainerCallback):
    """For the eager loss's own parameters, which the library's trainer forgets before 6.2."""

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        optimizer.zero_grad()


def trainer(
    folder, model, loss, steps: int = 6, dataset=None, eval_dataset=None, model_init=None, **options
):
    """The library's trainer: SGD, whose steps carry a rounding error on without enlarging it."""
    dataset = Dataset.from_dict(sentences(192)) if dataset is None else dataset
    defaults = {"per_device_train_batch_size": 16, "save_strategy": "no", "optim": "sgd"}
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        use_cpu=True,
        learning_rate=5e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        **(defaults | options),
    )
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        loss=loss,
        model_init=model_init,
        callbacks=[ZeroGradients()] if isinstance(loss, EagerSigLipLoss) else None,
    )


LOSSES = {
    "SigLipLoss": SigLipLoss,
    "CachedSigLipLoss": CachedSigLipLoss,
    "EagerSigLipLoss": EagerSigLipLoss,
    "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
}


def peak_extra_bytes(loss: str, batch_size: int, *, dim: int = 256, **options) -> int:
    """Peak memory of a loss's forward and backward on a CPU, in a process of its own.

    loss: a key of LOSSES; options: what its constructor takes. The model only normalises
    embeddings it is given, two columns of (batch_size, dim), so what is measured is the loss.
    Without the embeddings and their gradients, as in benchmarks/common/memory.py.
    """
    return _in_a_process("_peak_of_loss", loss, batch_size, dim, options)


def peak_step_bytes(loss: str, batch_size: int, *, dim: int = 64, **options) -> int:
    """Likewise with an encoder (two layers of width ``dim``, 32 tokens a row) in the step."""
    return _in_a_process("_peak_of_step", loss, batch_size, dim, options)


def _in_a_process(*case) -> int:
    server = _server()
    server.stdin.write(json.dumps(case) + "\n")
    server.stdin.flush()
    reply = json.loads(server.stdout.readline() or '"the process ended"')
    if not isinstance(reply, int):
        raise RuntimeError(f"{case} failed:\n{reply}")
    return reply


@functools.cache
def _server() -> subprocess.Popen:
    """Has imported the stack, which takes seconds, and nothing more: it forks for each case."""
    command = [sys.executable, __file__]
    path = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=os.environ | path, **pipes)
    atexit.register(server.communicate)  # closes its stdin, which ends it
    return server


def _peak_of_loss(name: str, batch_size: int, dim: int, options: dict) -> int:
    loss = LOSSES[name](SentenceTransformer(modules=[Normalize()], device="cpu"), **options)

    def step(rows: int):
        columns = [torch.randn(rows, dim, requires_grad=True) for _ in range(2)]

        def run() -> tuple[Tensor, ...]:
            # each call its own dicts: the model writes its embeddings into them
            value = loss([{"sentence_embedding": column} for column in columns], None)
            value.backward()
            return (value.detach(), *(c.grad for c in columns if c.grad is not None))

        return run

    step(256)()
    extra, (_, *gradients) = peak_bytes(step(batch_size))
    return extra - sum(gradient.nbytes for gradient in gradients)


def _peak_of_step(name: str, batch_size: int, dim: int, options: dict) -> int:
    loss = LOSSES[name](tiny_model(width=dim), **options)

    def step(rows: int):
        tokens = [torch.randint(5, WORDS, (rows, 32)) for _ in range(2)]

        def run() -> tuple[Tensor, ...]:
            columns = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
            value = loss(columns, None)
            value.backward()
            return (value.detach(),)

        return run

    step(64)()
    return peak_bytes(step(batch_size))[0]


def _serve() -> None:
    """Answers each case on stdin with bytes, or with what was raised."""
    for line in sys.stdin:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                print(json.dumps(f"ended with status {status}"), flush=True)
            continue
        try:
            function, *arguments = json.loads(line)
            reply = globals()[function](*arguments)
        except Exception:
            reply = traceback.format_exc()[-2000:]
        print(json.dumps(reply), flush=True)
        os._exit(0)


if __name__ == "__main__":
    _serve()
