"""From what the user names to a directory that can be loaded: a directory, a hub id, or a GGUF file.

A GGUF file is converted once: dequantising takes 16 s for 135M parameters, and every instance would do it at every start.
Run as a program (`python -m instance.checkpoint FILE --cache-dir DIR`) it converts and prints the directory.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import torch
from filelock import FileLock

_VERSION = 1
"""Of the conversion: another one gets other directories."""

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]
_HUB_DUPLICATES = ["consolidated*", "*/*"]
"""The same weights in another layout, or for other programs."""

_CONVERSION_S = 1800
"""Longest wait for another process that converts the same file."""


class CheckpointError(ValueError):
    """The model can't be had; the message says what was looked for, and where."""


def default_cache_dir() -> Path:
    """Where conversions are kept unless told otherwise."""
    return Path.home() / ".cache" / "distattn"


def resolve_checkpoint(model: str, *, cache_dir: Path | None = None) -> Path:
    """A local directory with config.json, safetensors and a tokenizer for `model`.

    What exists on disk is that; anything else of the form `org/name` is a hub id and is downloaded into the hub's own cache.
    Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _check_directory(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return convert_gguf(path, cache_dir or default_cache_dir())
    if path.is_file():
        raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no directory or file {model}, and it is no hub id (org/name) either")
    return _check_directory(_download(model))


def convert_gguf(file: Path, cache_dir: Path) -> Path:
    """The directory of a GGUF file's weights as safetensors, in float32: dequantised values have no exact bfloat16.

    Made once for each content; two processes at once make it once.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir / f"{file.stem}-{digest[:16]}-v{_VERSION}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{target.name}.lock", timeout=_CONVERSION_S):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _convert(file, partial)
            partial.rename(target)  # complete or not there
    return target


def _convert(file: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False)
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


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"'{model}' is no local path, and could not be had from the hub: {summary}") from error


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
