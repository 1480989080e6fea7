"""What `python -m instance.size` says is what an instance says when it starts."""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV2Config, DeepseekV3Config, Gemma3TextConfig, LlamaConfig, MistralConfig

from gmanager.wire import footprint
from instance.checkpoint import resolve_checkpoint
from instance.load import load_model, random_model
from instance.memory import activation_bytes, run_step
from instance.needs import Needs
from instance.rmanager import RManager
from instance.size import Question, answer, fewest_instances, instance_size, main, parse_count
from kvstore.sight import Sight
from tests.support.processes import processes
from tests.support.tiny import make_model

CACHE = Path(__file__).resolve().parents[2] / ".cache"
META = torch.device("meta")

SHAPE_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 2_097_152,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GEMMA_3_27B = {
    "hidden_size": 5376,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 21504,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
}
# docs/performance.md, "Memory of a GPU": one of two H200s, the 8B shape, --kv-memory 0.92, --chunk-tokens 8192
H200_GIB = 139.8
H200_TOKENS = 875_648
H200_PARTS_GIB = {
    "weights": 15.0,
    "other use of the device": 1.0,
    "activations": 1.8,
    "attention": 1.0,
    "sampling": 1.7,
    "CUDA graphs and NCCL": 2.4,
}


@pytest.fixture
def shape_8b(tmp_path: Path) -> str:
    """A directory that has nothing but a config."""
    LlamaConfig(**SHAPE_8B).save_pretrained(tmp_path)
    return str(tmp_path)


def ask(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_8b_shape_on_two_h200s_has_the_room_that_was_measured(shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(shape_8b, "--context", "1M", "--gpus", "2", "--gpu-memory", str(H200_GIB), capsys=capsys)
    assert (found["parameters"], found["weights"], found["kv_per_token"]) == (8_030_261_248, 16_060_522_496, 131_072)
    one = found["instance"]
    assert one["tokens"] == pytest.approx(H200_TOKENS, rel=0.03)
    assert found["cell_tokens"] == 2 * one["tokens"] == 2 * 64 * one["blocks"]
    assert {name: part / 2**30 for name, part in one["parts"].items()} == pytest.approx(H200_PARTS_GIB, abs=0.1)
    assert sum(one["parts"].values()) + one["kv"] <= one["limit"] == int(int(H200_GIB * 2**30) * 0.92)
    assert (found["fits"], found["fewest"], found["context"]) == (True, 2, 2**20)


def test_an_instance_of_two_ranks_has_the_room_that_was_measured(shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On two H200s, `--tp 2`: 1,853,632 tokens. The first rank has half of all but embeddings and norms."""
    found = ask(shape_8b, "--tp", "2", "--gpus", "2", "--gpu-memory", str(H200_GIB), capsys=capsys)
    assert (found["instances"], found["tp"], found["kv_per_token"]) == (1, 2, 131_072 // 2)
    assert found["instance"]["tokens"] == found["cell_tokens"] == pytest.approx(1_853_632, rel=0.03)
    embeddings = 128_256 * 4096 * 2
    assert found["weights"] == pytest.approx((16_060_522_496 - embeddings) / 2 + embeddings, rel=1e-3)


def test_seventy_billion_parameters_fit_two_h200s_and_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPE_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**shape).save_pretrained(tmp_path)
    given = [str(tmp_path), "--context", "64K", "--gpu-memory", str(H200_GIB)]
    found = ask(*given, "--tp", "2", capsys=capsys)
    assert (found["instances"], found["fits"]) == (1, True)
    assert main(given) == 2
    assert "a GPU needs 141.0 GiB (weights 131.4 GiB" in capsys.readouterr().err
    assert main([*given, "--tp", "2", "--gpus", "3"]) == 2
    assert "--gpus 3 are no multiple of --tp 2" in capsys.readouterr().err


def test_stages_are_sized_by_the_one_with_least_room(tmp_path: Path, shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has embeddings and head; where it has but few layers, another has less room."""
    memory = ("--gpu-memory", str(H200_GIB))
    found = ask(shape_8b, "--pp", "2", "--gpus", "2", *memory, capsys=capsys)
    assert (found["instances"], found["tp"], found["pp"], found["kv_per_token"]) == (1, 1, 2, 131_072 // 2)
    ends = 2 * 128_256 * 4096 * 2
    assert found["weights"] == pytest.approx((16_060_522_496 - ends) / 2 + ends, rel=1e-3)
    uneven = ask(shape_8b, "--pp", "2", "--pp-layers", "4,28", *memory, capsys=capsys)
    assert uneven["kv_per_token"] == 131_072 * 28 // 32
    assert uneven["weights"] == pytest.approx((16_060_522_496 - ends) * 28 / 32, rel=2e-3)
    large = SHAPE_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**large).save_pretrained(tmp_path / "large")
    both = ask(str(tmp_path / "large"), "--context", "64K", "--tp", "2", "--pp", "2", "--gpus", "4", *memory, capsys=capsys)
    assert (both["instances"], both["tp"], both["pp"], both["fits"]) == (1, 2, 2, True)
    for wrong, sentence in (
        (("--pp", "3", "--pp-layers", "20,12"), "--pp-layers 20,12 are not the layers of 3 stages (--pp)"),
        (("--pp", "2", "--pp-layers", "20,11"), "it has 32 layers, and --pp-layers 20,11 are 31"),
        (("--pp", "33"), "it has 32 layers, which 33 stages can't share (--pp)"),
        (("--pp", "2", "--gpus", "3"), "--gpus 3 are no multiple of --tp 1 times --pp 2"),
        (("--pp", "2", "--pp-layers", "a"), "'a' are no numbers of layers with commas between, like 20,12"),
    ):
        assert main([shape_8b, *memory, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_weights_of_8_bits_are_counted_as_such(shape_8b: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ask(shape_8b, "--gpu-memory", "80", "--context", "64K", capsys=capsys)
    found = ask(shape_8b, "--gpu-memory", "80", "--context", "64K", "--quantize", "fp8", capsys=capsys)
    features = 32 * (4096 + 2 * 1024 + 4096 + 3 * 14336) - 32 * 14336 + 32 * 4096  # each with a scale; down's are hidden
    embeddings = 128_256 * 4096
    layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    norms = (2 * 32 + 1) * 4096 * 2
    assert found["weights"] == layers + 4 * features + 2 * embeddings + (embeddings + 4 * 128_256) + norms
    assert plain["weights"] == 2 * (layers + 2 * embeddings) + norms
    assert found["kv_per_token"] == plain["kv_per_token"] and found["cell_tokens"] > plain["cell_tokens"]
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**SHAPE_8B | large).save_pretrained(tmp_path / "70b")
    arguments = (str(tmp_path / "70b"), "--gpu-memory", "139.8", "--context", "64K")
    assert main(list(arguments)) == 2  # in bf16 131 GiB of weights
    assert "short by" in capsys.readouterr().err
    whole = ask(*arguments, "--quantize", "fp8", capsys=capsys)
    assert whole["fits"] and whole["fewest"] == 1 and 66 < whole["weights"] / 2**30 < 67


def test_layers_with_windows_take_what_their_rows_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of Gemma 3 27B: of 62 layers ten see all, the others 1,024 tokens. A prompt of 128K takes what is said."""
    Gemma3TextConfig(**GEMMA_3_27B).save_pretrained(tmp_path)
    context, chunk, size = 2**17, 2048, 64
    found = ask(
        str(tmp_path),
        *("--gpu-memory", "139.8", "--context", "128K", "--kv-tokens", "128K", "--chunk-tokens", str(chunk)),
        capsys=capsys,
    )
    assert found["kv_per_token"] == 10 * 2 * 16 * 128 * 2
    blocks = found["instance"]["blocks"]
    rmanager = RManager(blocks, size, windows=[Sight(window=1024)] * 6, chunk_tokens=chunk)
    assert rmanager.reserve(1, footprint.taken(context // size, [(1024 + chunk) // size + 1] * 6))
    rmanager.wake(1, context - 1)
    most = 0
    for start in range(0, context, chunk):
        rmanager.trim(1, start)
        rmanager.append(1, start, start + chunk)
        shard = rmanager.shards[1]
        most = max(most, len(shard.block_ids) - len(shard.spare))
    assert most <= blocks <= 1.03 * most
    rmanager.end_prompt(1)
    for position in range(context - 1, context + 99):  # of the last row's token its KV comes with the next step
        rmanager.trim(1, position)
    rmanager.validate()
    in_use = (blocks - rmanager.free_blocks) * found["instance"]["kv"] / blocks
    all_full, as_config = context * 62 * 8192, (10 * context + 52 * 1024) * 8192
    assert as_config <= in_use <= 1.05 * as_config
    assert 0.16 < in_use / all_full < 0.18


def test_where_all_layers_have_windows_an_eighth_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of Mistral 7B v0.1: 32 layers with windows of 4,096 tokens, of which four keep what they see no more."""
    MistralConfig(max_position_embeddings=32768, dtype="bfloat16").save_pretrained(tmp_path)
    found = ask(str(tmp_path), *("--gpu-memory", "79.1", "--kv-tokens", "32K", "--chunk-tokens", "2048"), capsys=capsys)
    assert found["kv_per_token"] == 4 * 2 * 8 * 128 * 2
    assert found["kv_windows"] == 7 * ((4096 + 2048) // 64 + 1) * 64 * found["kv_per_token"]
    assert found["instance"]["kv"] == 32768 * found["kv_per_token"] + found["kv_windows"]
    assert 0.28 < found["instance"]["kv"] / (32768 * 32 * 2 * 8 * 128 * 2) < 0.3
    below = ask(str(tmp_path), *("--gpu-memory", "79.1", "--max-context", "4K", "--kv-tokens", "4K"), capsys=capsys)
    assert (below["kv_per_token"], below["kv_windows"]) == (32 * 2 * 8 * 128 * 2, 0)


def test_tokens_that_are_given_need_not_leave_anything_free(shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu = [shape_8b, "--gpus", "2", "--gpu-memory", str(H200_GIB)]
    assert ask(*on_gpu, "--kv-tokens", "900_001", capsys=capsys)["instance"]["tokens"] == 900_032 - 64
    assert main([*on_gpu, "--kv-tokens", "1M"]) == 2
    assert "--kv-tokens 1,048,576: a GPU needs " in capsys.readouterr().err


def test_the_table_reads_at_a_glance(shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([shape_8b, "--context", "1M", "--gpus", "1", "--gpu-memory", "79.1"]) == 0
    said = capsys.readouterr().out
    for line in (
        r"parameters +8,030,261,248 in bfloat16, 14.958 GiB",
        r"KV of a token +131,072 bytes",
        r"one instance +on a GPU, 1 in the cell",
        r"  KV +\d\d\.\d{3} GiB   411,\d{3} tokens, 6,4\d\d blocks",
        r"KV of the cell +411,\d{3} tokens",
        r"1,048,576 tokens +do not fit in 1 instance",
        r"fewest instances +3",
        r"Assumed: --kv-memory 0.92 of a GPU of 79.1 GiB that nobody else uses, --chunk-tokens 8192.",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), f"{line}\n{said}"


def test_more_than_the_model_takes_has_one_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**SHAPE_8B | {"max_position_embeddings": 131_072}).save_pretrained(tmp_path)
    assert main([str(tmp_path), "--context", "1M", "--gpus", "2", "--gpu-memory", str(H200_GIB)]) == 0
    said = capsys.readouterr().out
    (verdict,) = [line for line in said.splitlines() if "1,048,576" in line]
    assert re.fullmatch(
        "1,048,576 tokens +do not fit: the model takes at most 131,072, on any number of instances; ask for a shorter context",
        verdict,
    )
    assert re.search(r"^longest sequence +131,072 tokens, the model's most$", said, re.MULTILINE)
    assert "fewest instances" not in said


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "auto"), ("qwen2", "bfloat16"), ("qwen3", "float16")])
async def test_a_tiny_instance_prints_the_same(
    kind: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_model(kind, tmp_path / kind)
    await _compare(path, tmp_path, capsys, "--kv-tokens", "1000", "--dtype", dtype, "--chunk-tokens", "64")


async def test_the_default_model_prints_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = list((CACHE / "model").glob("*.gguf"))
    if not files:
        pytest.skip("the default model is missing: run scripts/quickstart --fetch-only")
    cache = CACHE / "converted"
    resolve_checkpoint(str(files[0]), cache_dir=cache)
    await _compare(files[0], tmp_path, capsys, "--kv-tokens", "3072", "--cache-dir", str(cache))


async def _compare(model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> None:
    """An instance of a cell of two logs what it takes before it looks for a gManager; here it never finds one."""
    found = ask(str(model), "--gpus", "2", "--device", "cpu", *flags, capsys=capsys)
    one, parts = found["instance"], found["instance"]["parts"]
    async with processes(folder) as started:
        nowhere = ["--gmanager", "tcp://127.0.0.1:9", "--cell-size", "2", "--device", "cpu"]
        instance = started.instance(*nowhere, "--model", str(model), *flags)
        pool = await instance.says(
            r"tokens=(\d+) cell_tokens=(\d+) cell_size=2 blocks=(\d+) block_bytes=(\d+) memory=\"(\S+) MiB\""
        )
        taken = await instance.says(r"weights=\"(\S+) MiB\" attention_scratch=\"(\S+) MiB\" sampling_scratch=\"(\S+) MiB\"")
    block = found["kv_per_token"] * 16
    counts = (one["tokens"], found["cell_tokens"], one["blocks"], block)
    assert pool.groups() == (*map(str, counts), _mib(one["kv"]))
    assert taken.groups() == (_mib(parts["weights"]), _mib(parts["attention"]), _mib(parts["sampling"]))
    assert found["weights"] == parts["weights"] and one["kv"] == one["blocks"] * block


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def test_a_model_on_meta_is_shaped_as_the_loaded_one(tmp_path: Path) -> None:
    for kind in ("llama", "qwen2", "qwen3", "mistral"):
        loaded = load_model(make_model(kind, tmp_path / kind), None, torch.device("cpu"))
        shaped = random_model(loaded.module.config, torch.float32, META, seed=0)
        assert (shaped.shape, shaped.num_layers, shaped.max_context) == (loaded.shape, loaded.num_layers, loaded.max_context)
        settings: dict[str, Any] = {"block_size": 16, "chunk_tokens": 512, "cell_size": 3, "backend": "torch"}
        assert Needs.of(shaped, **settings) == Needs.of(loaded, **settings)


def test_a_scaled_model_takes_longer_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make_model("qwen2", tmp_path))
    found = ask(path, "--device", "cpu", "--rope-scaling", "yarn:4", capsys=capsys)
    assert (found["max_context"], found["context"]) == (2048, 2048)
    assert main([path, "--device", "cpu", "--rope-scaling", "linear:2", "--max-context", "2K"]) == 2
    assert "is more than the 1,024 tokens that qwen2 takes with --rope-scaling linear:2" in capsys.readouterr().err


def test_on_the_cpu_it_says_what_each_instance_is_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make_model("llama", tmp_path))
    found = ask(path, "--device", "cpu", "--context", "1K", "--gpus", "3", capsys=capsys)
    assert found["instance"]["tokens"] == 16 * (22 + 1)  # 64 blocks over three, and one spare on each
    assert (found["fits"], found["longest"], found["fewest"]) == (False, 3 * 22 * 16, 3), "the model takes 512"
    notes = " ".join(found["notes"])
    assert "--kv-tokens 368 on each instance" in notes
    assert ask(path, "--device", "cpu", capsys=capsys)["context"] == 512


def test_the_fewest_instances_hold_the_context_and_one_less_does_not(shape_8b: str) -> None:
    question = Question(
        model=shape_8b, device="cuda", gpu_bytes=int(79.1 * 2**30), block_size=64, chunk_tokens=8192, context=2**20, instances=2
    )
    found = answer(question)
    assert (found.fewest, found.fits) == (3, False)
    model = random_model(LlamaConfig(**SHAPE_8B), torch.bfloat16, META, seed=0)

    def blocks(count: int) -> int:
        return count * (instance_size(question, model, count).blocks - 1)

    for count in (1, 2, 5, 30):
        assert fewest_instances(question, model, blocks(count)) == count
        assert fewest_instances(question, model, blocks(count) + 1) == count + 1
    assert fewest_instances(question, model, 10**9) is None


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._count(storage._cdata, storage.nbytes(), 1)
                weakref.finalize(tensor, self._count, storage._cdata, storage.nbytes(), -1)
        return out

    def _count(self, storage: int, num_bytes: int, tensors: int) -> None:
        before = self._held.get(storage, 0)
        self._held[storage] = after = before + tensors
        self._now += num_bytes * ((after > 0) - (before > 0))
        self.most = max(self.most, self._now)


@pytest.mark.parametrize("chunk_tokens", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_predicted_never_too_few(chunk_tokens: int, dtype: torch.dtype) -> None:
    """With transformers' own layers, which hold a little less; fused ones need a GPU."""
    for changed in ({}, {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}):
        config = LlamaConfig(**SHAPE_8B | {"num_hidden_layers": 2, "dtype": dtype} | changed)
        model = random_model(config, dtype, META, seed=0)
        needs = Needs.of(model, block_size=64, chunk_tokens=chunk_tokens, cell_size=1, backend="torch")
        most = 0
        for rows, sampled in needs.steps:
            with _Live() as live:
                run_step(model, rows, sampled)
            most += live.most
        assert most <= activation_bytes(model, needs) <= 1.25 * most


def test_numbers_of_tokens_are_read_as_they_are_written() -> None:
    written = ("1", "128K", "128k", "1M", "1.5M", "0.5K", "1_000_000", "1,000,000")
    assert [parse_count(text) for text in written] == [1, 131_072, 131_072, 2**20, 3 * 2**19, 512, 10**6, 10**6]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "1T"], "argument --context: '1T' is no number of tokens, like 128K, 1M or 1_000_000"),
        (["--context", "1.5"], "argument --context: '1.5' is no whole number of tokens but 1.5"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--gpus", "two"], "argument --gpus: invalid int value: 'two'"),
        (["--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--chunk-tokens", "0"], "--chunk-tokens must be at least 1, got 0"),
        (["--gpu-memory", "nan"], "--gpu-memory must be the GiB of one GPU, got nan"),
        (["--gpu-memory", "80", "--device", "cpu"], "--gpu-memory 80 says nothing of an instance on the CPU"),
        (["--gpu-memory", "80", "--kv-memory", "1"], "--kv-memory must be in (0, 1), got 1.0"),
        (["--kv-tokens", "8", "--device", "cpu"], "--kv-tokens 8 is less than one block of 16 tokens"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--gpu-memory", "20"], "--kv-memory: a GPU needs 22.6 GiB (weights 15.0 GiB, "),
        (["--gpu-memory", "80", "--context", "1000000M"], "no number of such instances holds a context of 1,048,576,000,000"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(
    flags: list[str], message: str, shape_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused([shape_8b, *flags], message, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_must_be_described(shape_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    _refused([shape_8b, "--device", "cuda"], "there is no GPU here: say --gpu-memory, the GiB of one", capsys)
    found = ask(shape_8b, "--gpus", "2", capsys=capsys)
    assert found["device"] == "cpu"
    assert "No GPU is seen here: for instances on GPUs, say --gpu-memory." in found["notes"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "the config of "),
        (SHAPE_8B | {"model_type": "diffllama"}, "layer 0 calls attention 2 times"),
        (
            SHAPE_8B | {"model_type": "llama", "head_dim": 80},
            "the triton backend takes float32, float16 and bfloat16, head_dim a power of two from 16 to 256",
        ),
        (SHAPE_8B | {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "a form that isn't read"),
        (
            {name: value for name, value in SHAPE_8B.items() if name != "dtype"} | {"model_type": "llama"},
            "doesn't say of which type its weights are: give --dtype",
        ),
    ],
)
def test_what_an_instance_would_refuse_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    _refused([str(tmp_path), "--gpu-memory", "80"], message, capsys)


def test_a_model_that_is_not_there_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused([str(tmp_path)], "has no config.json", capsys)
    _refused([str(tmp_path / "none.gguf")], "there is no file ", capsys)
    _refused([str(tmp_path / "none")], "it is no hub id (org/name) either", capsys)


def _refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert said.err.startswith("instance.size: ") and message in said.err and said.err.count("\n") == 1


def test_what_has_room_below_the_pool_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make_model("llama", tmp_path))
    tiers = ["--host-memory", "1M", "--disk", "/scratch:1M"]
    found = ask(path, "--device", "cpu", "--context", "512", *tiers, capsys=capsys)
    block = found["kv_per_token"] * 16
    one = found["instance"]
    assert one["host_tokens"] == 2**20 // block * 16
    assert one["disk_tokens"] == 2**20 // (-(-(block + 32) // 4096) * 4096) * 16
    assert main([path, "--device", "cpu", "--context", "512", *tiers]) == 0
    assert f"cached, host memory  {one['host_tokens']:13,} tokens" in capsys.readouterr().out


V2_LITE: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "max_position_embeddings": 163840,
}


@pytest.mark.parametrize(
    ("config", "latents", "heads"),
    [
        (DeepseekV2Config(**V2_LITE), 27 * 576 * 2, 27 * 2 * 16 * 192 * 2),
        (DeepseekV3Config(), 61 * 576 * 2, 61 * 2 * 128 * 192 * 2),
    ],
    ids=["DeepSeek-V2-Lite", "DeepSeek-V3"],
)
def test_a_token_costs_its_latents(
    config: DeepseekV2Config | DeepseekV3Config, latents: int, heads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 and 69 KiB, as docs/models.md says; with plain heads 324 and 5,856, for which a GPU has no kernels."""
    config.save_pretrained(tmp_path)
    asked = [str(tmp_path), "--dtype", "bfloat16", "--context", "32K", "--device"]
    for device in (["cpu"], ["cuda", "--gpu-memory", "1500", "--gpus", "1"]):
        assert ask(*asked, *device, capsys=capsys)["kv_per_token"] == latents
    assert ask(*asked, "cpu", "--kv-format", "plain", capsys=capsys)["kv_per_token"] == heads
    assert main([*asked, "cuda", "--gpu-memory", "1500", "--kv-format", "plain"]) == 2
    assert "head_dim a power of two from 16 to 256" in capsys.readouterr().err


@pytest.mark.parametrize(("kv_dtype", "stored"), [("fp8", "float8_e4m3fn"), ("int8", "int8")])
def test_kv_of_8_bits_holds_nearly_twice_the_tokens(
    kv_dtype: str, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what is left of a GPU; a token's bytes are half, and a scale for each block or token and head."""
    DeepseekV2Config(**V2_LITE).save_pretrained(tmp_path / "latents")
    LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32, max_position_embeddings=2**21
    ).save_pretrained(tmp_path / "heads")
    asked_of_latents, asked = (
        [str(tmp_path / kind), "--dtype", "bfloat16", "--device", "cuda", "--gpu-memory", "139.8", "--gpus", "1"]
        for kind in ("latents", "heads")
    )
    for arguments in (asked_of_latents, asked) if kv_dtype == "fp8" else (asked,):
        plain, small = (ask(*arguments, "--context", "32K", *more, capsys=capsys) for more in ([], ["--kv-dtype", kv_dtype]))
        assert (plain["kv_dtype"], small["kv_dtype"]) == ("bfloat16", stored)
        assert small["instance"]["tokens"] >= 1.95 * plain["instance"]["tokens"]
        assert plain["kv_per_token"] / 2 < small["kv_per_token"] < plain["kv_per_token"] / 1.95
    assert main([*asked, "--kv-dtype", kv_dtype]) == 0
    assert f"in {stored}, with scales" in capsys.readouterr().out
    if kv_dtype == "int8":
        assert main([*asked_of_latents, "--kv-dtype", "int8"]) == 2
        assert (
            "--kv-dtype int8: the kernels of latent KV know no scales of tokens, which int8 has: fp8, or --kv-format plain"
            in capsys.readouterr().err
        )


def test_heads_too_narrow_for_fp8_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=1024).save_pretrained(tmp_path)
    asked = [str(tmp_path), "--dtype", "bfloat16", "--gpu-memory", "80", "--kv-dtype", "fp8"]
    assert main(asked) == 2
    assert "--kv-dtype fp8: of KV of 8 bits the triton backend takes head_dim from 32 on, got 16" in capsys.readouterr().err
