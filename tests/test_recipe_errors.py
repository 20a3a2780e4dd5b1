"""The exact line that each mistake in a recipe gets."""

from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.recipe_yaml import load_calibration_spec, load_recipe

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: quantize\n"
RECIPES = "(bundled: 8b_int4_gptq, quickstart)"
SPECS = "(bundled: general_en, general_en_small, wikitext2)"
