"""transformers' own common model tests, on its SigLIP models with and without the patch.

The tests are ``ModelTesterMixin`` of its source distribution, which has the common tests and not
those of each model: the tiny models and their inputs are made here. Each test runs on the model as
transformers has it; where it passes, it must pass on the patched one. That is done twice, with the
inputs as they are and with ``return_loss=True`` forced, which is where the fused loss runs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import unittest
from types import ModuleType

import pytest
import tiny_siglip
import torch
from sources import fetched_tests

from fused_siglip.integrations.transformers import patch_siglip, unpatch_siglip

TESTS = fetched_tests("transformers")
PACKAGE = "their_transformers_tests"
# They need a GPU, the network or several devices, or outputs that a model of two towers lacks.
NOT_RUN = (
    *("flash", "deepspeed", "offload", "parallelism", "kernels", "flex_attention"),
    *("test_hidden_states_output", "test_retain_grad_hidden_states_attentions"),
)


def load_common_tests() -> ModuleType:
    """Their test_modeling_common.py; what it imports and the distribution lacks is left empty."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(TESTS)]
    sys.modules[PACKAGE] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        folder, _, _ = name.partition(".")
        for path in (folder, name):
            sys.modules[f"{PACKAGE}.{path}"] = ModuleType(f"{PACKAGE}.{path}")
            sys.modules[f"{PACKAGE}.{path}"].__path__ = []
        setattr(sys.modules[f"{PACKAGE}.{name}"], mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


COMMON = load_common_tests()


class TinyModels:
    """What their tests ask of a model's tester: a tiny config, inputs, and its sizes."""

    is_training = True
    batch_size = 5
    num_hidden_layers = 2
    hidden_size = 32

    def __init__(self, kind: str, return_loss: bool):
        self.kind = kind
        self.return_loss = return_loss

    def prepare_config_and_inputs_for_common(self):
        config = tiny_siglip.make_model(self.kind).config
        inputs = tiny_siglip.make_batch(self.kind, self.batch_size)
        if self.return_loss:
            inputs["return_loss"] = True
        return config, inputs


def case_of(kind: str, return_loss: bool) -> type[unittest.TestCase]:
    model_class, _ = tiny_siglip.MODELS[kind]

    def set_up(self):
        torch.manual_seed(0)
        self.model_tester = TinyModels(kind, return_loss)

    body = {
        "setUp": set_up,
        "all_model_classes": (model_class,),
        "test_resize_embeddings": False,
        "_is_composite": True,
        "has_attentions": False,  # leaves out the towers' attention, which no patch touches
    }
    return type(f"{model_class.__name__}Case", (COMMON.ModelTesterMixin, unittest.TestCase), body)


CASES = {
    (kind, forced): case_of(kind, forced) for kind in tiny_siglip.MODELS for forced in (False, True)
}
NAMES = [
    name
    for name in unittest.defaultTestLoader.getTestCaseNames(CASES["siglip", False])
    if not any(word in name for word in NOT_RUN)
]


@contextlib.contextmanager
def patched(kind: str):
    model_class, _ = tiny_siglip.MODELS[kind]
    patch_siglip(model_class)
    try:
        yield
    finally:
        unpatch_siglip(model_class)


def outcome(case: type[unittest.TestCase], name: str) -> str:
    """The word "passed", or the last line of why not."""
    result = unittest.TestResult()
    case(name).run(result)
    for _, text in result.skipped:
        return f"skipped: {text}"
    for _, text in result.errors + result.failures:
        return f"failed: {text.strip().splitlines()[-1]}"
    return "passed"


@pytest.mark.parametrize("forced", [False, True], ids=["as it is", "return_loss"])
@pytest.mark.parametrize("kind", tiny_siglip.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_patched_model_passes_what_the_model_passes(name, kind, forced):
    plain = outcome(CASES[kind, forced], name)
    if plain.startswith("skipped"):
        pytest.skip(plain.removeprefix("skipped: "))
    assert plain == "passed", "without the patch"
    with patched(kind):
        assert outcome(CASES[kind, forced], name) == "passed"
