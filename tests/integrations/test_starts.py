"""What docs/scale_and_bias.md says of the stacks' own starts of t and b."""

import importlib.util
import math
import re
from pathlib import Path

from tiny_siglip import make_model
from transformers import SiglipModel

PAGE = (Path(__file__).resolve().parents[2] / "docs/scale_and_bias.md").read_text()


def test_a_new_model_of_transformers_starts_at_t_1_and_b_0():
    model = SiglipModel(make_model().config)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (0.0, 0.0)
    assert "| transformers, `SiglipModel(config)` made anew | 1 (t' = 0) | 0 | none |" in PAGE
    (line,) = re.findall(r"`(model\.logit_scale.+)`", PAGE)
    exec(line, {"model": model, "math": math})
    assert (round(model.logit_scale.exp().item(), 4), model.logit_bias.item()) == (10.0, -10.0)


def test_open_clips_trainer_bounds_t_by_100():
    packages = map(importlib.util.find_spec, ("open_clip", "open_clip_train"))
    folders = [Path(package.origin).parent for package in packages]
    text = "\n".join(f.read_text() for folder in folders for f in folder.rglob("*.py"))
    assert "logit_scale.clamp_(0, math.log(100))" in text or "clamp_(0, max_val)" in text
    assert "model_kwargs['init_logit_scale'] = np.log(10)" in text
    assert "model_kwargs['init_logit_bias'] = -10" in text
