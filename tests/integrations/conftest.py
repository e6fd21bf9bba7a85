"""Before any stack is imported: torchvision must be importable where torch is a CPU build."""

from torchvision_on_cpu import define_schemas

define_schemas()

import pytest
from tiny_siglip import MODELS, make_batch, make_model

from fused_siglip.integrations.transformers import patch_siglip, unpatch_siglip


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name):
    return make_model(name)


@pytest.fixture
def batch(name):
    return make_batch(name, 8)


@pytest.fixture
def patched_classes():
    for model_class, _ in MODELS.values():
        patch_siglip(model_class)
    yield
    for model_class, _ in MODELS.values():
        unpatch_siglip(model_class)
