"""Names of prefixes, and the index of who begins with which: beside a model that compares tokens."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.beginnings import Beginnings
from gmanager.cluster.chain import DIGEST_BYTES, Chain, num_common, seed_of
from gmanager.cluster.prefixes import Held, Prefixes, are_ranges, whole_blocks
from gmanager.wire.messages import pack_tokens
from kvstore import ranges as of_instances

SEED = seed_of("model", "dtype", "")
SIZE = 2

ranges = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=7).map(
    lambda steps: [
        (sum(g + n for g, n in steps[:i]) + g, sum(g + n for g, n in steps[: i + 1])) for i, (g, n) in enumerate(steps)
    ]
)


@given(ranges, st.integers(0, 90), st.sampled_from([1, 3, 16]))
def test_instances_and_gmanager_mean_the_same_whole_blocks(runs: list[tuple[int, int]], end: int, size: int) -> None:
    assert whole_blocks(runs, end, size) == of_instances.whole_blocks(runs, end, size)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 40), st.sampled_from([1, 4, 16]))
def test_a_chain_grows_as_if_it_had_been_whole_from_the_start(tokens: list[int], cut: int, size: int) -> None:
    whole = Chain(SEED, size, pack_tokens(tokens))
    grown = Chain(SEED, size, pack_tokens(tokens[:cut]))
    before = grown.digests
    other = grown.copy()
    grown.extend(pack_tokens(tokens[cut:]))
    assert grown.digests == whole.digests
    assert (grown.num_tokens, grown.num_blocks) == (len(tokens), len(tokens) // size)
    assert other.digests == before == whole.digests[: len(before)]
    other.extend(pack_tokens([1] * size))
    assert grown.digests == whole.digests


def test_names_differ_by_model_salt_and_all_that_comes_before() -> None:
    tokens = pack_tokens([1, 2, 3, 4])
    seeds = [SEED, seed_of("model", "dtype", "salt"), seed_of("model", "dtypes", "alt"), seed_of("modeldtype", "", "")]
    assert len({Chain(seed, 4, tokens).digests for seed in seeds}) == 4
    one, two = Chain(SEED, 2, tokens), Chain(SEED, 2, pack_tokens([9, 9, 3, 4]))
    assert one.digests[-DIGEST_BYTES:] != two.digests[-DIGEST_BYTES:]
    assert seed_of("half of a pair: \ud800")


bits = st.lists(st.integers(0, 1), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 9), bits, st.integers(0, 12), bits), max_size=25))
def test_the_tree_finds_who_begins_alike(steps: list[tuple[int, list[int], int, list[int]]]) -> None:
    """Beside one that compares all: sequences are listed with more and fewer of their blocks, and grow."""
    tree = Beginnings()
    chains: dict[int, Chain] = {}
    for seq, tokens, count, wanted in steps:
        chains.setdefault(seq, Chain(SEED, 1)).extend(pack_tokens(tokens[: 12 - chains[seq].num_blocks]))
        tree.note(seq, chains[seq].digests, min(count, chains[seq].num_blocks))
        tree.validate(chains)
        digests = Chain(SEED, 1, pack_tokens(wanted)).digests
        alike = {seq: min(listed, num_common(chains[seq].digests, digests)) for seq, listed in tree.num_listed.items()}
        most, found = tree.longest(digests)
        assert most == max(alike.values(), default=0)
        assert not most or sorted(found) == sorted(seq for seq, common in alike.items() if common == most)


def test_a_sequence_that_begins_as_no_other_takes_few_bytes() -> None:
    """131,072 tokens in blocks of 16: a dictionary's entry for each took 577 bytes a block."""
    index = Prefixes(16)
    index.add(1, Chain(SEED, 16, pack_tokens([5])))
    index.tell(1, 0, [[(0, 16)]])
    tracemalloc.start()
    index.add(2, Chain(SEED, 16, pack_tokens(range(131_072))))
    index.tell(2, 0, [[(0, 131_072)]])
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 24 * 8192


@given(st.data())
def test_the_index_finds_the_longest_beginning(data: st.DataObject) -> None:
    """Whatever is said in whatever order; and it forgets all of which nothing is left."""
    index = Prefixes(SIZE)
    prompts: dict[int, list[int]] = {}
    live: set[int] = set()
    told: dict[int, dict[int, list[list[tuple[int, int]]]]] = {}
    tokens = st.lists(st.integers(0, 1), max_size=14)
    for seq in range(1, data.draw(st.integers(1, 25))):
        known = sorted(prompts)
        match data.draw(
            st.sampled_from(["add", "add", "tell", "tell", "tell", "end", "contradict", "suspend", "find", "find"])
        ):
            case "add":
                prompts[seq] = data.draw(tokens)
                live.add(seq)
                told[seq] = {}
                index.add(seq, Chain(SEED, SIZE, pack_tokens(prompts[seq])))
            case "tell" if known:
                which = data.draw(st.sampled_from(known))
                member = data.draw(st.integers(0, 2))
                runs = [
                    (member, data.draw(st.integers(0, len(prompts[which]) // SIZE)))
                ]  # each has blocks from its own number on
                pieces = [[(first * SIZE, last * SIZE)] for first, last in runs if first < last]
                is_known = which in index
                assert index.tell(which, member, pieces) == (not pieces or which in index)
                if is_known:
                    told[which][member] = pieces
            case "end" if live:
                which = data.draw(st.sampled_from(sorted(live)))
                live.discard(which)
                generated = data.draw(tokens)
                vain = index.end(which, pack_tokens(generated))
                prompts[which] += generated
                assert (not vain) or which not in index
            case "contradict" if known:
                which = data.draw(st.sampled_from(known))
                asked = told[which].get(0, [])
                index.contradict(which, 0, asked)
                told[which][0] = []
            case "suspend":
                index.suspend()
                index.inherit({0: {which: Held.of(told[which].get(0, [])) for which in known}})
                live.clear()
                told = {which: {0: its[0]} if 0 in its else {} for which, its in told.items()}
            case "find":
                wanted = data.draw(tokens)
                found = index.find(Chain(SEED, SIZE, pack_tokens(wanted)), len(wanted) - 1, without=[2])
                assert [match.tokens for match in found] == sorted((match.tokens for match in found), reverse=True)
                for match in found:
                    pieces = [piece for runs in match.parts.values() for run in runs for piece in run]
                    assert pieces and 2 not in match.parts
                    assert sorted(pieces) == sorted(set(pieces))
                    for start, end in pieces:
                        assert prompts[match.source][start:end] == wanted[start:end]
                        assert end <= len(wanted) - 1
        index.validate()
        for which in [which for which in prompts if which not in index]:
            assert which not in live or not told[which]
            del prompts[which], told[which]
            live.discard(which)
    index.suspend()
    index.inherit({})
    assert not len(index)
    index.validate()


def of(tokens: int, value: int = 7) -> Chain:
    return Chain(SEED, SIZE, pack_tokens([value] * tokens))


def test_most_held_goes_first_then_the_newest_and_one_for_each_place() -> None:
    index = Prefixes(SIZE)
    for seq in (1, 2, 3, 4, 5):
        index.add(seq, of(8))
    index.tell(1, 0, [[(0, 8)]])
    index.tell(2, 0, [[(0, 8)]])
    index.tell(3, 1, [[(0, 8)]])
    index.tell(4, 0, [[(0, 4)]])
    index.tell(4, 1, [[(4, 8)]])
    index.tell(5, 1, [[(6, 8)]])
    found = index.find(of(12), 11)
    assert [(match.source, match.tokens) for match in found] == [(4, 8), (3, 8), (2, 8)]
    assert index.find(of(12), 7)[0].parts == {0: [[(0, 4)]], 1: [[(4, 6)]]}
    assert [match.source for match in index.find(of(12), 11, without=[0])] == [3]
    assert index.find(of(12, value=8), 11) == []


def test_what_was_evicted_everywhere_is_found_no_more() -> None:
    index = Prefixes(SIZE)
    index.add(1, of(8))
    assert index.end(1, pack_tokens([7, 7])) == []
    assert 1 not in index, "it has left nothing"
    index.add(2, of(8))
    index.tell(2, 0, [[(0, 8)]])
    assert index.end(2, pack_tokens([7, 7])) == []
    index.tell(2, 0, [[(0, 10)]])
    index.tell(2, 1, [[(10, 12)]])
    assert index.find(of(12), 11)[0].tokens == 10
    index.tell(2, 0, [[(0, 4)]])
    index.tell(2, 1, [])
    assert index.find(of(12), 11)[0].tokens == 4
    index.contradict(2, 0, [[(0, 2)]])
    assert not len(index)
    assert not index.tell(2, 0, [[(0, 4)]]), "who says so has it for nothing"
    assert index.tell(2, 0, [])


def test_who_has_said_something_else_since_is_not_contradicted() -> None:
    index = Prefixes(SIZE)
    index.add(1, of(8))
    index.tell(1, 0, [[(0, 4)]])
    index.contradict(1, 0, [[(0, 8)]])
    assert index.find(of(12), 11)[0].tokens == 4
    index.contradict(1, 0, [[(0, 4)]])
    assert index.find(of(12), 11) == []


def test_a_sequence_without_a_full_block_is_kept_for_nothing() -> None:
    index = Prefixes(SIZE)
    index.add(1, of(1))
    index.tell(1, 3, [[(0, 2)]])
    assert index.end(1, b"") == [3], "its token at position 1 is nobody's"
    assert not len(index)


@pytest.mark.parametrize(
    "runs",
    [[[]], [[(3, 2)]], [[(-1, 2)]], [[(0, 2), (1, 3)]], [[(2, 2)]], [[(0, 9)]], [[(0, 5)], [(10, 15)]], [[(0, 2), (5, 4)]]],
    ids=str,
)
def test_runs_that_can_not_be(runs: list[list[tuple[int, int]]]) -> None:
    assert not are_ranges(runs, 8)
    assert are_ranges([[(0, 2), (2, 3)], [(7, 9)]], 8)
