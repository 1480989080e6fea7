"""From what the user names to a directory that can be loaded: a directory, a hub id, or a GGUF file.

A GGUF file is converted once: dequantising takes 16 s for 135M parameters, and every instance would do it at every start.
Run as a program (`python -m instance.checkpoint FILE --cache-dir DIR`) it converts and prints the directory.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from gmanager.wire.logs import get_logger

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = get_logger("instance")

_VERSION = 2
"""Of the conversion: another one gets other directories."""

_HUB_SETTINGS = ["config.json"]
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]
_HUB_DUPLICATES = ["consolidated*", "*/*"]
"""The same weights in another layout, or for other programs."""

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""One of these makes a tokenizer."""

_NAMES_SHOWN = 3
"""Of weights, in a message about many."""

_CONVERSION_S = 1800
"""Longest wait for another process that converts the same file."""

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, Timeout)
"""What transformers, tokenizers, safetensors and torch raise for files that they can't take."""


class CheckpointError(ValueError):
    """The model can't be had; the message says what was looked for, and where."""


def default_cache_dir() -> Path:
    """Where conversions are kept unless told otherwise."""
    return Path.home() / ".cache" / "distattn"


def resolve_checkpoint(model: str, *, cache_dir: Path | None = None) -> Path:
    """A local directory with config.json, safetensors and mostly a tokenizer for `model`.

    Raises CheckpointError.
    """
    path = locate(model)
    if path is None:
        return _check_directory(_download(model, _HUB_FILES))
    return _check_directory(path) if path.is_dir() else convert_gguf(path, cache_dir or default_cache_dir())


def fetch_settings(model: str) -> Path:
    """A directory with config.json for a hub id, and no weights that weren't there before. Raises CheckpointError."""
    path = _download(model, _HUB_SETTINGS)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{model} has no config.json at the hub")
    return path


def locate(model: str) -> Path | None:
    """The directory or GGUF file that `model` names, or None for a hub id.

    What exists on disk is that; anything else of the form `org/name` is a hub id and is downloaded into the hub's own cache.
    Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no directory or file {model}, and it is no hub id (org/name) either")
    return None


def read_config(model: str, *, cache_dir: Path | None = None) -> "PretrainedConfig":
    """The config of `model`, as `resolve_checkpoint` would have it, without its weights: of a hub id only the config is
    downloaded, and a GGUF file isn't converted.

    Its `dtype` is that of the weights, or None if only they can tell. Raises CheckpointError.
    """
    from transformers import AutoConfig

    path = locate(model)
    if path is not None and path.is_file():
        converted = _conversion(path, cache_dir or default_cache_dir())
        if converted.is_dir():  # the file's own header takes 7 s to read, for 49K tokens of vocabulary
            path = converted
    config: PretrainedConfig
    try:
        if path is None:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        elif path.is_file():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            config.dtype = torch.float32  # as `convert_gguf` has it
        elif (path / "config.json").is_file():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            config.dtype = config.dtype or stored_dtype(path)
        else:
            raise CheckpointError(f"{path} has no config.json")
    except CheckpointError:
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(f"the config of {model} can't be had: {first_line(error)}") from error
    return config


def stored_dtype(path: Path) -> torch.dtype | None:
    """Of the first floating-point weight in a directory's safetensors, scales of others left out; None if there is none."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = (names[kind] for name, (kind, _) in stored_tensors(path).items() if kind in names and "_scale" not in name)
    return next(found, None)


def convert_gguf(file: Path, cache_dir: Path) -> Path:
    """The directory of a GGUF file's weights as safetensors, in float32: dequantised values have no exact bfloat16.

    Made once for each content; two processes at once make it once.
    """
    target = _conversion(file, cache_dir)
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{target.name}.lock", timeout=_CONVERSION_S):
        if not target.is_dir():
            log.info("converting", file=str(file))
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _convert(file, partial)
            partial.rename(target)  # complete or not there
    return target


def _conversion(file: Path, cache_dir: Path) -> Path:
    """Where the conversion of a GGUF file lies, or will."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return cache_dir / f"{file.stem}-{digest[:16]}-v{_VERSION}"


def load_whole(folder: Path | None, name: str, *, auto: Any = None, **options: Any) -> "PreTrainedModel":
    """The causal language model of a directory, with every weight from there: transformers would make up those that it lacks.

    `folder` None: weights are those of the option `state_dict`. `auto`: the model's class, if it isn't to be found.

    Weights that the model has no place for (a head for speculation, say) are left out, with a warning. Raises CheckpointError.
    """
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    module: PreTrainedModel
    if folder is not None:
        options["trust_remote_code"] = False
    module, found = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    _refuse_made_up(found, name)
    if unexpected := found["unexpected_keys"]:
        log.warning("weights that the model has no place for", model=name, weights=len(unexpected), first=some_of(unexpected))
    return module


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all weights in a directory's safetensors, by their names."""
    return {name: shape for name, (_, shape) in stored_tensors(folder).items()}


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type, as safetensors calls it, and the shape of all that lies in a directory's safetensors, by names."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            found |= {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    return found


def weight_files(folder: Path) -> list[Path]:
    """A directory's safetensors: beside them some have consolidated.safetensors, the same again."""
    return sorted(folder.glob("model*.safetensors"))


def _refuse_made_up(found: Mapping[str, Set[Any]], name: str) -> None:
    """`found`: what transformers says of a load, after tying."""
    if missing := found["missing_keys"]:
        raise CheckpointError(f"{name} lacks {len(missing)} of the weights that its config asks for: {some_of(missing)}")
    if differing := found["mismatched_keys"]:
        shown = {f"{key} ({tuple(stored)}, not {tuple(wanted)})" for key, stored, wanted in differing}
        raise CheckpointError(f"{name} has {len(shown)} weights of other shapes than its config asks for: {some_of(shown)}")


def some_of(names: Set[str]) -> str:
    """The first few, for a message."""
    return ", ".join(sorted(names)[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _convert(file: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    model = load_whole(file.parent, str(file), gguf_file=file.name, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain now
    settings.pop("_name_or_path", None)
    config = type(model.config).from_dict(settings | {"architectures": [type(model).__name__]})
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(target)
    weights: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() in seen and config.tie_word_embeddings:
            continue  # tied weights are tied again at load
        seen[weight.data_ptr()] = name
        weights[name] = weight.contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _check_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json")
    if not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"; {', '.join(others[:3])} can't be loaded as a directory's weights" if others else ""
        raise CheckpointError(f"{path} has no weights in safetensors{found}")
    return path


def has_tokenizer(path: Path) -> bool:
    """Whether the directory's texts can be read; else it is served by token ids."""
    return any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern))


def _download(model: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=files, ignore_patterns=_HUB_DUPLICATES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"'{model}' is no local path, and could not be had from the hub: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line, or its name if it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main() -> int:
    parser = argparse.ArgumentParser("instance.checkpoint", description="Print the loadable directory of a model.")
    parser.add_argument("model", help="a directory, a hub id or a GGUF file")
    parser.add_argument("--cache-dir", type=Path, help="where conversions are kept")
    args = parser.parse_args()
    try:
        print(resolve_checkpoint(args.model, cache_dir=args.cache_dir))
    except CheckpointError as error:
        print(f"instance.checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
