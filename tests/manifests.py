"""What a run is told of and leaves behind, for tests without one: data of a row, weights of a few bytes, the manifest of an adapter."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hone.manifest import AdapterManifest, BaseModelId, FileEntry, Lineage
from training.job import PreparedData


def weights(folder: Path, value: float = 1.0) -> Path:
    """A folder with an adapter's files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full((2, 2), value, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


class Describe:
    """For `Registry.publish`."""

    def __init__(self, name: str, **changes: Any) -> None:
        """`changes` are fields of the manifest; `data_digest` is its lineage's."""
        self.name, self.changes = name, changes

    def __call__(self, version: int, files: dict[str, FileEntry]) -> AdapterManifest:
        changes = dict(self.changes)
        lineage = Lineage(run_id=f"{self.name}-run-{version}", data_digest=changes.pop("data_digest", "d" * 64), hone_version="0.1.0")
        fields: dict[str, Any] = {
            "kind": "adapter",
            "method": "lora",
            "served": "mixed",
            "task": "chat",
            "base": BaseModelId(name="tiny", fingerprint="f" * 64),
            "dtype": "float32",
            "metrics": {"loss": 1.0},
            "lineage": lineage,
            "created_at": "2026-01-01T00:00:00+00:00",
        }
        return AdapterManifest(name=self.name, version=version, files=files, **(fields | changes))


def prepared_data(**changes: Any) -> PreparedData:
    """One training row and one to validate on; `changes` are fields."""
    fields: dict[str, Any] = {
        "digest": "d",
        "train_rows": 1,
        "validation_rows": 1,
        "cut_rows": 0,
        "dropped_rows": 0,
        "formats": [],
        "bad_rows": 0,
        "findings": {},
        "pad_token_id": 0,
        "max_length": 8,
    }
    return PreparedData(**(fields | changes))
