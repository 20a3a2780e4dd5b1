"""A hub id, with a hub that is not there: config.json and headers are asked for, and nothing else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from command import invoke
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import SafetensorsRepoMetadata
from random_models import make_model

import compress
from compress.errors import ModelError
from compress.model.checkpoint import Checkpoint

ANSWER: Any = SimpleNamespace(headers={}, request=None)  # as much of an answer as the errors keep


class Hub:
    """Answers for one model by what lies in a folder, and remembers what it was asked for."""

    def __init__(self, folder: Path, cached: Path) -> None:
        self.folder, self.cached, self.asked = folder, cached, []  # type: ignore[var-annotated]

    def download(self, name: str, file: str) -> str:
        self.asked.append(file)
        self.cached.mkdir(exist_ok=True)
        return str(shutil.copy(self.folder / file, self.cached / file))

    def metadata(self, name: str) -> Any:
        self.asked.append("headers")
        files: dict[str, Any] = {}
        for tensor, info in Checkpoint(self.folder).tensors.items():
            header = files.setdefault(info.file.name, SimpleNamespace(tensors={}, parameter_count={}))
            offsets = (info.start, info.start + info.bytes)
            header.tensors[tensor] = SimpleNamespace(dtype=info.dtype, shape=list(info.shape), data_offsets=offsets)
        return SafetensorsRepoMetadata(metadata=None, sharded=False, weight_map={}, files_metadata=files)


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tiny_model, tmp_path / "cached")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", found.metadata)
    return found


def test_small_files_alone_are_asked_for(hub: Hub, tiny_model: Path) -> None:
    found, here = compress.plan("org/tiny", context=256), compress.plan(str(tiny_model), context=256)
    assert hub.asked == ["config.json", "headers"]
    assert found.model.told == "headers" and found.model.stored_bytes == here.model.stored_bytes
    sizes = [[(row.weights_bytes, row.total_bytes) for row in each.rows] for each in (found, here)]
    assert sizes[0] == sizes[1]


def test_a_mixture_with_a_tensor_for_each_expert(hub: Hub, tmp_path: Path) -> None:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    hub.folder = make_model(tmp_path / "moe", "qwen3_moe", **more)
    found, here = compress.plan("org/moe"), compress.plan(str(hub.folder / "config.json"))
    assert found.model.parameters == here.model.parameters
    assert found.model.active_parameters == here.model.active_parameters < here.model.parameters


def test_the_command_goes_by_the_hub_id(hub: Hub, tmp_path: Path) -> None:
    result = invoke("plan", "org/tiny", "--memory", "9MB", "--context", 64, "--write", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.stderr
    assert "--model org/tiny" in result.stdout and "\nmodel: org/tiny\n" in (tmp_path / "r.yaml").read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("x", response=ANSWER), "is gated; accept its licence"),
        (RepositoryNotFoundError("x", response=ANSWER), "is neither a folder here nor a public hub model"),
        (LocalEntryNotFoundError("x"), "the hub can't be reached; connect, or give a folder or a config.json"),
        (EntryNotFoundError("x"), "has no config.json"),
        (NotASafetensorsRepoError("x"), "has no safetensors whose headers can be read"),
        (HfHubHTTPError("500 x", response=ANSWER), "could not be fetched (500 x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError) as raised:
        compress.plan("org/name")
    assert str(raised.value).startswith("model: org/name ") and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_of_the_hub_that_is_none(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "broken"
    shutil.copytree(Path(__file__).parents[1] / "models" / "tiny-wiki-llama", hub.folder)
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"model_type": "llamo"}))
    with pytest.raises(ModelError, match="model_type 'llamo' is no causal language model .* did you mean llama"):
        compress.plan("org/broken")
