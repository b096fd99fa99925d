"""The order of samples: every one once an epoch, a function of (index, seed, epoch), continued anywhere without replay."""

import io
import os
import signal
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from worlds import World, make_world, mixed_recipe, planner_of, sample_of

from stages import stop
from stages.data.sample import Sample, encode_field
from stages.data.shards import Shards, ShardWriter, open_shards
from stages.errors import DataError, GuardError, UsageError
from stages.recipe import Phase, Recipe
from stages.sequence.plan import MissingField
from stages.sequence.segment import Batch
from stages.training.seeds import stream_seed
from stages.training.stream import Stream, feasible_tasks, unused_tasks

RECIPE = mixed_recipe()


def phase_of(**keys: object) -> Phase:
    tables = {"name": "joint", "stage": "train-unified", "tasks": {"draw": 1.0, "paint": 1.0, "answer": 1.0}, "steps": 9, "batch_size": 3}
    return Phase(**{**tables, **keys})  # type: ignore[arg-type]


@pytest.fixture
def shards(world: World) -> Shards:
    return open_shards(str(world.shards), split="train")


def stream_of(shards: Shards, *, seed: int = 0, limit: int | None = None, recipe: Recipe = RECIPE, **keys: object) -> Stream:
    return Stream(shards, planner_of(recipe), phase_of(**keys), seed=seed, limit=limit)


def keys_of(stream: Stream, count: int) -> list[str]:
    """The next `count` samples, or as many as the last batch needed brings."""
    keys: list[str] = []
    while len(keys) < count:
        keys += stream.next_batch().keys
    return keys


def same(first: Batch, second: Batch) -> bool:
    if first.keys != second.keys or first.tasks != second.tasks or set(first.ports) != set(second.ports):
        return False
    pairs = [(rows.values, second.ports[name].values) for name, rows in first.ports.items()]
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("size", [{"batch_size": 3}, {"batch_size": None, "batch_tokens": 90}], ids=["samples", "tokens"])
def test_every_sample_comes_exactly_once_an_epoch(shards: Shards, size: dict[str, int | None]) -> None:
    keys = keys_of(stream_of(shards, **size), 32)
    everyone = {f"{number:04d}" for number in range(8)}
    for epoch in range(4):
        own = keys[8 * epoch : 8 * epoch + 8]
        assert len(own) == 8
        assert set(own) == everyone


def test_epochs_have_orders_of_their_own_that_depend_on_the_seed(shards: Shards) -> None:
    keys = keys_of(stream_of(shards, batch_size=8), 24)
    assert keys[:8] != keys[8:16] != keys[16:24]
    assert keys_of(stream_of(shards, batch_size=8), 8) == keys[:8]
    assert keys_of(stream_of(shards, batch_size=8, seed=1), 8) != keys[:8]
    assert keys_of(stream_of(shards, batch_size=8, name="second"), 8) != keys[:8]


def test_the_order_does_not_depend_on_the_size_of_batches(shards: Shards) -> None:
    expected = keys_of(stream_of(shards, batch_size=1), 24)
    for size in ({"batch_size": 5}, {"batch_size": None, "batch_tokens": 70}, {"batch_size": None, "batch_tokens": 200}):
        assert keys_of(stream_of(shards, **size), 24)[:24] == expected


@pytest.mark.parametrize("size", [{"batch_size": 3}, {"batch_size": None, "batch_tokens": 90}], ids=["samples", "tokens"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resuming_mid_epoch_neither_repeats_nor_skips(shards: Shards, size: dict[str, int | None], stop: int) -> None:
    straight = stream_of(shards, **size)
    for _ in range(stop):
        straight.next_batch()
    resumed = stream_of(shards, **size)
    resumed.position = straight.position
    for _ in range(4):
        assert same(straight.next_batch(), resumed.next_batch())
        assert straight.position == resumed.position


def test_position_counts_the_samples_consumed(shards: Shards) -> None:
    stream = stream_of(shards, batch_size=None, batch_tokens=90)
    consumed = 0
    for _ in range(5):
        consumed += len(stream.next_batch().keys)
        assert stream.position == consumed


def test_a_limit_takes_the_first_samples_of_the_index(shards: Shards) -> None:
    assert Counter(keys_of(stream_of(shards, limit=3, batch_size=3), 9)) == {"0000": 3, "0001": 3, "0002": 3}


def test_a_batch_never_holds_more_tokens_than_its_budget_and_is_filled_as_far_as_it_goes(shards: Shards) -> None:
    stream = stream_of(shards, batch_size=None, batch_tokens=90)
    for _ in range(6):
        batch = stream.next_batch()
        following = stream_of(shards, batch_size=1)
        following.position = stream.position
        assert batch.num_tokens <= 90
        assert batch.num_tokens + following.next_batch().num_tokens > 90


def test_samples_longer_than_a_batch_are_left_out_and_counted(shards: Shards) -> None:
    lengths = Counter()
    single = stream_of(shards, batch_size=1, tasks={"draw": 1.0})
    for _ in range(8):
        batch = single.next_batch()
        lengths[batch.keys[0]] = batch.num_tokens
    budget = sorted(lengths.values())[3]
    stream = stream_of(shards, batch_size=None, batch_tokens=budget, tasks={"draw": 1.0})
    fitting = {key for key, length in lengths.items() if length <= budget}
    keys = keys_of(stream, 3 * len(fitting))
    assert set(keys) == fitting
    assert stream.too_long >= 2 * (8 - len(fitting))


def test_samples_that_are_all_too_long_are_an_error_and_not_an_endless_loop(shards: Shards) -> None:
    with pytest.raises(DataError, match="every sample is longer than a batch of 5 tokens"):
        stream_of(shards, batch_size=None, batch_tokens=5).next_batch()


def test_samples_without_any_token_are_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    empty = make_world(tmp_path, RECIPE, [sample_of(number, caption="") for number in range(3)])
    recipe = mixed_recipe('tasks.read.segments=[{port="text", text="{caption}", role="target"}]')
    stream = stream_of(open_shards(str(empty.shards), split="train"), recipe=recipe, tasks={"read": 1.0}, batch_size=None, batch_tokens=50)
    with pytest.raises(DataError, match="have no token"):
        stream.next_batch()


def test_a_batch_without_a_supervised_token_is_an_error_that_names_samples(shards: Shards) -> None:
    recipe = mixed_recipe('tasks.read.segments=[{port="text", text="{caption}"}]')
    with pytest.raises(GuardError, match="without any supervised token: 000") as caught:
        stream_of(shards, recipe=recipe, tasks={"read": 1.0}).next_batch()
    assert caught.value.exit_code == 4


# tasks


def test_tasks_come_as_often_as_their_weights_say(shards: Shards) -> None:
    stream = stream_of(shards, batch_size=8, tasks={"draw": 3.0, "answer": 1.0})
    tasks = Counter(task for _ in range(60) for task in stream.next_batch().tasks)
    assert tasks["draw"] / 480 == pytest.approx(0.75, abs=0.06)
    assert set(tasks) == {"draw", "answer"}


def test_every_step_takes_the_tasks_in_turn_and_weighs_their_losses(shards: Shards) -> None:
    stream = stream_of(shards, batch_size=4, mix="every-step", tasks={"draw": 3.0, "answer": 0.5})
    batch = stream.next_batch()
    assert batch.tasks == ("draw", "answer", "draw", "answer")
    weights = {
        (batch.tasks[int(batch.ports[port].sample[int(s)])], float(w))
        for port in batch.ports
        for s, w in zip(batch.ports[port].segment, batch.ports[port].weight, strict=True)
    }
    assert weights == {("draw", 3.0), ("answer", 0.5)}


def test_tasks_whose_fields_are_missing_are_left_out_and_named(shards: Shards) -> None:
    recipe = mixed_recipe('tasks.edit.segments=[{port="text", text="{instruction}"}, {port="codes", field="result", role="target"}]')
    planner, tasks = planner_of(recipe), {"draw": 1.0, "edit": 1.0}
    assert feasible_tasks(planner, tasks, shards) == {"draw": 1.0}
    assert unused_tasks(planner, tasks, shards) == ["edit"]
    with pytest.raises(MissingField, match=r"task 'edit' lacks .*instruction.*result\.codes.*they have .*caption") as caught:
        feasible_tasks(planner, {"edit": 1.0}, shards)
    assert "`mmgen tokenize` writes" in caught.value.hint
    assert "result.codes" in caught.value.hint


def test_list_fields_give_every_entry_once_in_as_many_epochs(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lists")
    with ShardWriter(folder) as writer:
        for number in range(3):
            writer.write(Sample(f"{number:04d}", {"captions": [f"{number}-{entry}" for entry in "abc"], "caption": "x"}))
    recipe = mixed_recipe('tasks.tell.segments=[{port="text", text="<sot>"}, {port="text", text="{captions}", role="target"}]')
    stream = stream_of(open_shards(str(folder)), recipe=recipe, batch_size=3, tasks={"tell": 1.0})
    seen = Counter()
    for _ in range(3):
        rows = stream.next_batch().ports["text"]
        for sample in range(3):
            own = rows.values[torch.isin(rows.segment, (rows.sample == sample).nonzero().flatten()) & rows.target]
            seen[stream.planner.tokenizers["bpe"].decode(own.tolist())] += 1
    assert seen == {f"{number}-{entry}": 1 for number in range(3) for entry in "abc"}


# seeds


def test_streams_of_different_names_have_different_seeds_of_63_bits() -> None:
    seeds = {stream_seed(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), ("0a",), (0, "a", "noise", 3)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, "a") == stream_seed(0, "a")


def test_conditions_are_dropped_anew_in_every_epoch(shards: Shards) -> None:
    recipe = mixed_recipe(
        'tasks.half.segments=[{port="text", text="<t2i>{caption}", cond_dropout_prob=0.5}, {port="codes", field="image", role="target"}]'
    )
    stream = stream_of(shards, recipe=recipe, batch_size=1, tasks={"half": 1.0})
    dropped: dict[str, set[bool]] = {sample_of(number).key: set() for number in range(8)}
    for _ in range(80):
        batch = stream.next_batch()
        dropped[batch.keys[0]].add(batch.num_tokens == 8)  # only <soi> 2×3 <eoi> is left
    assert all(kinds == {True, False} for kinds in dropped.values())


def cut_one(world: World, folder: Path) -> Path:
    """The world's samples in a tar of somebody else, where the codes of sample 0003 are no array any more."""
    folder.mkdir()
    with tarfile.open(folder / "data.tar", "w") as tar:
        for number, sample in enumerate(world.samples):
            for name, value in sample.fields.items():
                suffix, data = encode_field(name, value)
                data = b"no array" if (number, name) == (3, "image.codes") else data
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing_but_who_reads(shards: Shards, workers: int) -> None:
    """Also from the middle, also after it was set back."""
    alone, helped = stream_of(shards, batch_size=None, batch_tokens=90), stream_of(shards, batch_size=None, batch_tokens=90)
    helped.workers = workers
    for _ in range(3):
        assert same(alone.next_batch(), helped.next_batch())
    alone.position = helped.position = 5
    for _ in range(3):
        assert same(alone.next_batch(), helped.next_batch())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_never_fills_hears_a_stop(shards: Shards, workers: int) -> None:
    stream = stream_of(shards, batch_size=2**20)
    stream.workers = workers
    with stop.listening(), stop.deferred(then_stop=False):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(stop.Asked):
            stream.next_batch()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_left_out_and_counted_once(world: World, tmp_path: Path, workers: int) -> None:
    damaged = open_shards(str(cut_one(world, tmp_path / "cut")), max_bad_fraction=0.2)
    stream = stream_of(damaged, batch_size=2)
    stream.workers = workers
    keys = [key for _ in range(8) for key in stream.next_batch().keys]
    assert set(keys) == {f"{number:04d}" for number in range(8)} - {"0003"}
    assert [bad.key for bad in damaged.bad] == ["0003"]
    assert damaged.write_bad_samples(tmp_path) == "kept 7, skipped 1 (bad_samples.jsonl)"
    strict = open_shards(str(tmp_path / "cut"), on_bad_sample="fail")
    with pytest.raises(DataError, match="0003"):
        keys_of(stream_of(strict, batch_size=2), 8)


def test_data_sets_are_mixed_by_their_weights(world: World, tmp_path: Path) -> None:
    plain = open_shards(str(world.shards))
    written = {name: entry["tokenizer"] for name, entry in plain.fields.items() if entry["tokenizer"]}
    with ShardWriter(tmp_path / "other", split="train", field_tokenizers=written) as writer:
        for number in range(3):
            writer.write(Sample(f"other-{number}", world.samples[number].fields))
    mixed = open_shards(f"1*{world.shards}::3*{tmp_path / 'other'}", split="train", mixing=True)
    assert [len(numbers) for numbers, _ in mixed.mixture] == [8, 3]
    keys = keys_of(stream_of(mixed, batch_size=8), 1024)
    assert sum(key.startswith("other") for key in keys) == 768
    assert mixed.fingerprint != open_shards(f"{world.shards}::{tmp_path / 'other'}", split="train").fingerprint
    with pytest.raises(UsageError, match="nothing is mixed here"):
        open_shards(f"1*{world.shards}::3*{tmp_path / 'other'}", split="train")
    with pytest.raises(UsageError, match="give every part a weight"):
        open_shards(f"{world.shards}::3*{tmp_path / 'other'}", split="train", mixing=True)
