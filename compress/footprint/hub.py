"""What the Hugging Face hub says of a model in a few small requests: config.json and the headers of its weights."""

from pathlib import Path

from compress.errors import ModelError
from compress.footprint.subject import Headers, read_config
from compress.model.checkpoint import TensorInfo
from compress.model.source import hub_reason


def fetch_headers(name: str) -> Headers:
    """A hub model's config and tensors. Weights are not fetched: of each file, its first bytes alone.

    Args:
        name: hub id, org/name.

    Raises:
        ModelError: no such model, no access, no safetensors, or no connection.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    try:
        file = Path(hf_hub_download(name, "config.json"))
        found = get_safetensors_metadata(name)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "can't be asked about, since the hub can't be reached; connect, or give a folder or a config.json"
    except EntryNotFoundError:
        reason = "has no config.json; give a transformers model"
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        reason = "has no safetensors whose headers can be read; give its config.json instead"
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = hub_reason(error)
    else:
        tensors, total = {}, 0
        for path, header in found.files_metadata.items():
            for tensor, info in header.tensors.items():
                begin, end = info.data_offsets
                tensors[tensor] = TensorInfo(Path(path), tensor, info.dtype, tuple(info.shape), end - begin, begin)
                total += end - begin
        return Headers(file.parent, read_config(file), tensors, total)
    raise ModelError(f"model: {name} {reason}")
