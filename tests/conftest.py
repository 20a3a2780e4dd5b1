"""What every test shares: an offline environment, set before any library reads it, and a small trained model."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Two threads wherever the tests run: small matrices gain nothing from more, and sums are split the same way.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A trained Llama of 6M parameters in bfloat16: hidden 256, 6 layers, tied embeddings. To change it, copy it."""
    return Path(__file__).parent / "models" / "tiny-wiki-llama"
