"""Base models: found, checked and fingerprinted before anything heavy loads them.

A base is a Hugging Face folder: config.json, a tokenizer, safetensors weights. A hub name is downloaded to such a folder first (never
its pickle weights), and everything after that sees only the folder. A published whole model (`name@version`) is a base as well.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.errors import BaseModelError, RegistryError
from hone.ids import AdapterRef
from hone.manifest import BaseModelId
from hone.registry import Registry
from hone.storage import Home, digest_of, sha256_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_SETTINGS = (
    "config.json",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILE = "preprocessor_config.json"
"""How pictures or sounds become what the model reads, where it reads those."""
POSITIONS_AFTER_PADDING = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet"}
"""Encoders whose first token has the position after the padding token's id."""
SAMPLED_ABOVE_BYTES = 64 * 2**20
SAMPLES = 64
SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine's disk."""

    folder: Path
    id: BaseModelId
    config: dict[str, Any]

    @property
    def max_context(self) -> int:
        """Tokens that the model's position embeddings reach."""
        text_config = self.config.get("text_config", self.config)
        positions = int(text_config.get("max_position_embeddings") or text_config.get("n_positions") or 4096)
        if self.config.get("model_type") not in POSITIONS_AFTER_PADDING:
            return positions
        return positions - int(self.config.get("pad_token_id", 1)) - 1

    @property
    def is_decoder(self) -> bool:
        """Whether the folder is a causal language model (chat) and not an encoder (classification)."""
        return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in self.config.get("architectures") or [])


def find_base_model(name: str, *, home: Home, revision: str | None = None) -> BaseModel:
    """Locate a base by folder, by published `name@version`, or by hub name (downloaded), and check it.

    Raises:
        BaseModelError: not there, no config, tokenizer or safetensors weights, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve(), name)
    if name.startswith((".", "/", "~")) or folder.exists():
        raise BaseModelError(f"{name}: no such base model folder; give a Hugging Face model folder or a hub name")
    published = _published(name, home)
    return _checked(published, name) if published else _from_hub(name, revision)


def fingerprint(folder: Path) -> str:
    """Digest of config, tokenizer and weights.

    Weight files above 64 MiB are sampled (their size, their first MiB and 64 MiB spread evenly), so that fingerprinting a 140 GB base
    takes seconds; everything else is read whole. The safetensors header, with every tensor's name, type and shape, is in the first MiB.
    """
    names = ["config.json", *TOKENIZER_FILES, PROCESSOR_FILE, *sorted(p.name for p in folder.glob("*.safetensors"))]
    return digest_of({name: _file_digest(folder / name) for name in names if (folder / name).is_file()})


def tokenizer_fingerprint(folder: Path) -> str:
    """Digest of everything that decides what a model reads of a row: which tokens, by which chat template; which pixels or samples."""
    names = [
        *TOKENIZER_FILES,
        *TOKENIZER_SETTINGS,
        PROCESSOR_FILE,
        *sorted(f"additional_chat_templates/{p.name}" for p in folder.glob("additional_chat_templates/*")),
    ]
    return digest_of({name: sha256_file(folder / name) for name in names if (folder / name).is_file()})


def _checked(folder: Path, name: str) -> BaseModel:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise BaseModelError(f"{folder}: no config.json, so this is not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{folder / 'config.json'}: not valid JSON ({error})") from None
    if not any((folder / file).is_file() for file in (*TOKENIZER_FILES, PROCESSOR_FILE)):
        needed = f"neither a tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ...) nor {PROCESSOR_FILE}"
        raise BaseModelError(f"{folder}: {needed}; save the model's own into the folder")
    if not any(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
        raise BaseModelError(
            f"{folder}: only pickled weights ({pickled[0]}), which run code when loaded; convert them with save_pretrained of transformers"
            if pickled
            else f"{folder}: no .safetensors weights"
        )
    if config.get("auto_map"):
        raise BaseModelError(f"{folder}: needs code of its own (auto_map in config.json), and hone never runs code from a model folder")
    return BaseModel(folder, BaseModelId(name=name, revision=_revision(folder), fingerprint=fingerprint(folder)), config)


def _published(name: str, home: Home) -> Path | None:
    """Folder of a published whole model."""
    registry = Registry(home)
    try:
        manifest = registry.resolve(name)
    except RegistryError:
        return None
    if manifest.kind != "full":
        raise BaseModelError(
            f"{name}: is an adapter of {manifest.base.name}, not a whole model; serve that base and call the adapter by name"
        )
    registry.verify(manifest.ref)
    return registry.path(AdapterRef(manifest.name, manifest.version))


def _from_hub(name: str, revision: str | None) -> BaseModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, HFValidationError):
        raise BaseModelError(f"{name}: neither a folder here nor a model on the hub; check the spelling") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseModelError(
            f"{name}: no such folder here, and the hub cannot be reached to fetch it ({type(error).__name__}); give a local model folder"
        ) from None
    return _checked(folder, name)


def _revision(folder: Path) -> str | None:
    """The commit, where the folder is a hub snapshot (`.../snapshots/<commit>`)."""
    return folder.name if folder.parent.name == "snapshots" else None


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= SAMPLED_ABOVE_BYTES:
        return sha256_file(path)
    return digest_of([size, *_samples(path, size)])


def _samples(path: Path, size: int) -> Iterator[str]:
    with path.open("rb") as file:
        for n in range(SAMPLES + 1):
            file.seek(n * (size - SAMPLE_BYTES) // SAMPLES)
            yield hashlib.sha256(file.read(SAMPLE_BYTES)).hexdigest()
