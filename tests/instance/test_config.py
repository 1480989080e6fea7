"""Settings are complete and checked before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distattn.attention import DistAttention
from gmanager.wire.messages import TextAssets
from gmanager.wire.scaling import RopeScaling
from gmanager.wire.sizes import parse_disk, parse_size
from instance import needs as needs_module
from instance import start
from instance.__main__ import parse
from instance.checkpoint import CheckpointError, resolve_checkpoint
from instance.config import InstanceConfig, Launch
from instance.errors import UnsupportedModel
from instance.load import load_model
from instance.memory import MemoryBudget, TooLittleMemory
from instance.needs import Needs
from instance.start import load, make_tiers, size_pool
from kvstore.format import KVFormat
from tests.support.tiny import make_model

LAUNCH = Launch(rank=1, local_rank=1, world_size=2, run_id="x")
NEEDED = ["--gmanager", "tcp://127.0.0.1:5570", "--model", "m", "--kv-tokens", "100"]


def config(**other: Any) -> InstanceConfig:
    settings: dict[str, Any] = {
        "gmanager": "tcp://127.0.0.1:1",
        "model": "m",
        "kv_tokens": 64,
        "launch": LAUNCH,
        "device": "cpu",
        "cell_size": 2,
    }
    return InstanceConfig(**(settings | other))


def test_only_torchruns_names_are_read() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "r"}
    launch = Launch(rank=1, local_rank=0, world_size=3, run_id="r")
    assert Launch.from_environment(environment | {"MASTER_ADDR": "nowhere"}) == launch
    with pytest.raises(ValueError, match="start instances with torchrun .* WORLD_SIZE, TORCHELASTIC_RUN_ID not set"):
        Launch.from_environment({"RANK": "1", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match="got 3 of 3"):
        Launch.from_environment(environment | {"RANK": "3"})


def test_auto_is_resolved_once() -> None:
    parsed = parse([*NEEDED, "--device", "cpu"], LAUNCH)
    assert (parsed.block_size, parsed.chunk_tokens, parsed.cell_size, parsed.backend) == (16, 512, 2, "torch")
    assert parsed.num_blocks == 6  # 100 tokens, rounded down to blocks
    assert parsed.threads >= 1


def test_rotary_scaling_is_read() -> None:
    assert parse([*NEEDED, "--device", "cpu"], LAUNCH).rope_scaling is None
    assert parse([*NEEDED, "--device", "cpu", "--rope-scaling", "yarn:2.5"], LAUNCH).rope_scaling == RopeScaling("yarn", 2.5)
    with pytest.raises(ValueError, match="--rope-scaling: the factor of yarn must be more than 1 and at most 1024, got 0.5"):
        parse([*NEEDED, "--device", "cpu", "--rope-scaling", "yarn:0.5"], LAUNCH)


def test_weights_stay_as_they_are_unless_asked() -> None:
    assert parse([*NEEDED, "--device", "cpu"], LAUNCH).quantize == "none"
    assert parse([*NEEDED, "--device", "cpu", "--quantize", "fp8"], LAUNCH).quantize == "fp8"
    with pytest.raises(ValueError, match="--quantize must be one of none, fp8, int8, int8-32, got int4"):
        config(quantize="int4")


def test_one_torchrun_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU and its number are said; cores are shared by the cell. In a torchrun of several each has those of its rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    alone = Launch(rank=0, local_rank=0, world_size=1, run_id="x")
    on_gpu = [*NEEDED, "--device", "cuda"]
    parsed = parse([*on_gpu, "--gpu", "3", "--id", "5", "--cell-size", "4096"], alone)
    assert (parsed.gpu, parsed.id, parsed.cell_size, parsed.threads) == (3, 5, 4096, 1)
    assert start.device_of(parsed) == torch.device("cuda", 3)
    assert (parse(on_gpu, LAUNCH).gpu, parse(on_gpu, LAUNCH).id) == (1, None)
    with pytest.raises(ValueError, match="--gpu 4 finds no CUDA device: 4 are seen"):
        parse([*on_gpu, "--gpu", "4"], alone)
    with pytest.raises(ValueError, match="LOCAL_RANK 4 finds no CUDA device"):
        parse(on_gpu, Launch(rank=4, local_rank=4, world_size=5, run_id="x"))
    for flag in ("--gpu", "--id"):
        with pytest.raises(ValueError, match=f"{flag} 0 is one instance's, and this torchrun has several"):
            parse([*on_gpu, flag, "0"], LAUNCH)
        with pytest.raises(ValueError, match=f"{flag} must not be negative, got -1"):
            parse([*on_gpu, flag, "-1"], alone)


def test_names() -> None:
    """The first is the model's; vLLM's way to write several, and the other."""
    names = ["--served-model-name", "a", "b", "--served-model-name", "c", "--served-model-name=a"]
    for flags, first, others in (([], None, ()), (names[:2], "a", ()), (names, "a", ("b", "c"))):
        parsed = parse([*NEEDED, "--device", "cpu", *flags], LAUNCH)
        assert (parsed.served_model_name, parsed.other_names) == (first, others)
    with pytest.raises(ValueError, match="--served-model-name must not be empty"):
        parse([*NEEDED, "--device", "cpu", "--served-model-name", "a", ""], LAUNCH)


def test_the_pool_of_a_gpu_is_a_part_of_its_memory_unless_its_tokens_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_gpu = [*NEEDED[:4], "--device", "cuda"]
    for flags, tokens, memory in (
        ([], None, 0.92),
        (["--kv-memory", "0.5"], None, 0.5),
        (["--kv-tokens", "640"], 640, None),
    ):
        parsed = parse([*on_gpu, *flags], LAUNCH)
        assert (parsed.kv_tokens, parsed.kv_memory) == (tokens, memory)
        assert (parsed.block_size, parsed.chunk_tokens, parsed.backend) == (64, 8192, "triton")
    with pytest.raises(RuntimeError, match="--kv-memory 0.92 has not been sized yet"):
        _ = parse(on_gpu, LAUNCH).num_blocks


def test_tokens_and_memory_exclude_each_other_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse([*NEEDED, "--kv-memory", "0.9"], LAUNCH)
    assert end.value.code == 2
    assert "--kv-memory: not allowed with argument --kv-tokens" in capsys.readouterr().err


def test_the_pool_is_sized_once_beside_the_loaded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a GPU would say is made up here; the largest steps, and their scratch, are what it is asked about."""
    model = load_model(make_model("llama", tmp_path), None, torch.device("cpu"))
    model.device = torch.device("cuda", 1)
    asked: dict[str, Any] = {}

    def measure(model: Any, needs: Needs, *, fraction: float) -> MemoryBudget:
        asked.update(fraction=fraction, steps=needs.steps)
        sizes = {"weights": 300_000, "other": 50_000, "activations": 40_000, "reserve": 10_000}
        return MemoryBudget(
            device="cuda:1", total=5_000_000, fraction=fraction, attention=needs.attention, sampling=needs.sampling, **sizes
        )

    monkeypatch.setattr(start, "measure", measure)
    monkeypatch.setattr(needs_module, "sampler_scratch_bytes", lambda rows, vocab: rows * 10)
    monkeypatch.setattr(DistAttention, "scratch_bytes", staticmethod(lambda shape, rows, peers, *_, **__: rows * 100 * peers))
    settings: dict[str, Any] = {"device": "cuda", "chunk_tokens": 44, "kv_tokens": None}
    needs = Needs.of(model, block_size=16, chunk_tokens=44, cell_size=2, backend="triton")
    assert (needs.attention, needs.sampling) == (30_000, 3_200)
    sized = size_pool(config(**settings, kv_memory=0.5), model, needs)
    assert asked == {"fraction": 0.5, "steps": [(44, 64), (256, 256)]}
    # 2,500,000 - 433,200 = 2,066,800; a block is 16 tokens of 2 x 2 layers x 2 heads x 16 x 4 bytes
    assert (sized.kv_memory, sized.num_blocks, sized.kv_tokens) == (None, 252, 252 * 16)
    given = config(**settings | {"kv_tokens": 8000})
    assert size_pool(given, model, needs) is given
    assert asked["fraction"] == 1
    with pytest.raises(TooLittleMemory, match="--kv-tokens 9,008: .* at most 8,912 tokens fit"):
        size_pool(config(**settings | {"kv_tokens": 9010}), model, needs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_memory": 0.5}, r"give --kv-tokens or --kv-memory, not both \(got 64 and 0.5\)"),
        ({"kv_tokens": None}, "an instance on the CPU needs --kv-tokens$"),
        ({"kv_tokens": None, "kv_memory": 0.9}, r"needs --kv-tokens and takes no --kv-memory \(got 0.9\)"),
        ({"kv_tokens": None, "device": "cuda"}, "--kv-tokens or --kv-memory is needed"),
        ({"kv_tokens": None, "device": "cuda", "kv_memory": 1.0}, r"--kv-memory must be in \(0, 1\), got 1.0"),
        ({"kv_tokens": None, "device": "cuda", "kv_memory": float("nan")}, r"--kv-memory must be in \(0, 1\), got nan"),
        ({"kv_tokens": 15}, "--kv-tokens 15 is less than one block of 16 tokens"),
        ({"block_size": 0}, "--block-size must be at least 1, got 0"),
        ({"chunk_tokens": -1}, "--chunk-tokens must be at least 1, got -1"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"decode_processors": (12, 24)}, "--decode-processors must be multiples of 8, got 12 24"),
        ({"cell_size": 0}, "--cell-size must be at least 1, got 0"),
        ({"kv_dtype": "int4"}, "--kv-dtype must be one of auto, fp8, int8, got int4"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, float16, bfloat16, got int8"),
        ({"host": "0.0.0.0"}, "--host '0.0.0.0' is no address that the other instances could dial"),
        ({"cell": ""}, "--cell must not be empty"),
        ({"gmanager": "127.0.0.1:5570"}, "--gmanager: an address looks like tcp://127.0.0.1:5570, got '127.0.0.1:5570'"),
    ],
)
def test_wrong_settings_are_refused_with_their_numbers(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)


def test_a_checkpoint_is_found_or_said_to_be_missing(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "llama")
    assert resolve_checkpoint(str(path)) == path
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "weights.bin").write_bytes(b"")
    for model, message in (
        (tmp_path / "none.gguf", "there is no file .*none.gguf"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "pickled", r"has no weights in safetensors; pytorch_model.bin can't be loaded"),
        (tmp_path / "weights.bin", "is neither a directory nor a .gguf file"),
        (tmp_path / "nowhere", r"there is no directory or file .*, and it is no hub id"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve_checkpoint(str(model))


def test_a_hub_id_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network here: what can be shown is that the hub's own client is asked, and its answer is understood."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'some-org/some-model' is no local path, and could not be had from the hub: "):
        resolve_checkpoint("some-org/some-model")


@pytest.mark.parametrize("damage", ["truncated", "other shapes", "no config"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    weights = path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "other shapes":
        weights.write_bytes((make_model("qwen2", tmp_path / "other") / "model.safetensors").read_bytes()[:100] + b"junk")
    else:
        (path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load(config(model=str(path)))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": []}'),
        ("tokenizer.json", "junk"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_broken_tokenizer_is_named_by_its_file(file: str, text: str, tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    (path / file).write_text(text)
    with pytest.raises(CheckpointError, match=f"^{path / file} can't be read: [A-Za-z]+: "):
        load(config(model=str(path)))


@pytest.mark.parametrize("ends", [[7], [7, 9]])
def test_a_checkpoint_without_a_tokenizer_is_served_by_token_ids(ends: list[int], tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    for file in path.glob("*token*"):
        file.unlink()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))
    assets = load(config(model=str(path))).assets
    assert assets == TextAssets(tokenizer_json=None, chat_template=None, special_tokens={}, eos_token_ids=ends)


def test_sizes_of_what_lies_below_the_pool() -> None:
    parsed = parse([*NEEDED, "--device", "cpu", "--host-memory", "1.5G", "--disk", "/a:b:2T", "--check-cache"], LAUNCH)
    assert (parsed.host_memory, parsed.disk, parsed.disk_bytes) == (3 * 2**29, Path("/a:b"), 2**41)
    assert parsed.check_cache
    assert [parse_size(text) for text in ("7", "64K", "500MiB", "2gb")] == [7, 2**16, 500 * 2**20, 2**31]
    for wrong in ("", "-1", "G", "1P", "1e9"):
        with pytest.raises(ValueError, match="is no size, like 64G"):
            parse_size(wrong)
    for wrong in ("/scratch", ":4G", "5G"):
        with pytest.raises(ValueError, match="is no directory and size, like /scratch:500G"):
            parse_disk(wrong)
    with pytest.raises(ValueError, match="--disk /a:0 has no room"):
        parse([*NEEDED, "--device", "cpu", "--disk", "/a:0"], LAUNCH)


def test_what_the_machine_has_not_is_an_error_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(TooLittleMemory, match=r"--host-memory 1,048,576.0 GiB is more than the \S+ GiB of host memory"):
        load(config(model=str(tmp_path), host_memory=2**50))
    with pytest.raises(TooLittleMemory, match=r"--disk \S+:1,048,576.0 GiB is more than the \S+ GiB that are free there"):
        load(config(model=str(tmp_path), disk=tmp_path, disk_bytes=2**50))
    with pytest.raises(TooLittleMemory, match="nowhere can't be used: No such file or directory"):
        load(config(model=str(tmp_path), disk=tmp_path / "nowhere", disk_bytes=2**20))
    storage = start.KVStorage(
        num_layers=1,
        num_blocks=2,
        block_size=4,
        num_kv_heads=1,
        head_dim=8,
        format=KVFormat(torch.float32),
        device=torch.device("cpu"),
    )
    assert make_tiers(config(), storage) is None
    with pytest.raises(TooLittleMemory, match="--host-memory 100 bytes don't hold one block of 256 bytes"):
        make_tiers(config(host_memory=100), storage)
    tiers = make_tiers(config(host_memory=1000, disk=tmp_path, disk_bytes=10_000), storage)
    assert tiers is not None and tiers.slots == {"host": 3, "disk": 2}
    tiers.close()


def test_what_lies_below_the_pool_is_not_offered_where_layers_have_windows(tmp_path: Path) -> None:
    path = make_model("gemma2", tmp_path)
    with pytest.raises(UnsupportedModel, match="some of its layers see but a window, whose KV --host-memory, --disk and"):
        load(config(model=str(path), host_memory=2**20))
