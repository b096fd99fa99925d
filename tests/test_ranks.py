"""Several ranks train what one would: the same batches, the same weights, stopped and continued by any number of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_networks import recipe_of
from test_next_scale import hybrid
from test_next_scale import sample_of as hybrid_sample
from torch import Tensor
from worlds import CAPTIONS, make_world, mixed_recipe, sample_of

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.recipe import Recipe, load_recipe
from stages.training.checkpoint import read_weights

PROGRAM = Path(__file__).parent / "ranks_program.py"
NUM_SAMPLES = 11  # not a multiple of anything
NUM_PROMPTS = 70  # more than are answered together
STEPS = 6
# next-token prediction draws no noise, so that nothing but the order of sums may differ between numbers of ranks
PLAIN = (
    'ports.codes.objective={ kind = "next-token" }',
    'sample.codes={ sampler = "autoregressive" }',
    "phases.joint.tasks={ draw = 1.0, answer = 1.0, paint = 0.0 }",
)
FILLED = ("phases=[{ name='joint', stage='train-unified', tasks={ draw = 1.0, answer = 1.0 }, steps=6, batch_tokens=62, lr=1e-3 }]",)
ROUTED = ('backbones.lm.mlp={kind="moe", experts=3, top_k=2, shared=1, balance_weight=2.0}',)
# two networks, the second with learned experts; where only words are read, and are not learned, the first one's input has no gradient
TWO_NETWORKS = (
    "autoencoders={vq={kind='cnn', downsample=4, multipliers=[1, 1, 1], channels=8, latent_channels=4,"
    " quantizer={kind='vq', codebook_size=11, codebook_dim=4}}}",
    "ports.draw={backbone='denoiser', content='codes', autoencoder='vq', expert='picture',"
    " connector={kind='embedding'}, head={kind='linear'}, objective={kind='next-token'}}",
    "sample.draw={sampler='autoregressive'}",
    "backbones.denoiser.mlp={kind='moe', experts=3, top_k=2, balance_weight=0.5}",
    "phases=[{name='all', stage='train-unified', tasks={draw=1.0, text=2.0}, steps=3, batch_size=2, lr=1e-3},"
    " {name='rest', stage='train-unified', tasks={draw=1.0, text=1.0}, frozen=['ports.text'], steps=4, batch_size=2, lr=1e-3}]",
)
PHASES = """phases=[
  {name="first", stage="train-unified", tasks={draw=1.0}, steps=3, batch_size=4, lr=1e-3, ema_decay=0.5},
  {name="second", stage="train-unified", tasks={answer=1.0, paint=1.0}, steps=3, batch_size=4, lr=1e-3, frozen=["backbones.lm.experts.words"]},
]""".replace("\n", "")


@dataclass
class Jobs:
    """A list of things for ranks to do, each in a folder of its own."""

    folder: Path
    shards: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def train(self, name: str, *sets: str, **options: Any) -> None:
        recipe = mixed_recipe(f"phases.joint.steps={STEPS}", "phases.joint.batch_size=4", *sets)
        self.add(name, recipe, self.shards, **options)

    def add(self, name: str, recipe: Recipe, shards: Path, stage: str = "train-unified", **options: Any) -> None:
        out = self.folder / name / "out"
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.parent / "tests" / "test.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(recipe.to_toml())
        self.jobs.append({"recipe": str(file), "shards": str(shards), "out": str(out), "stage": stage, "options": options})

    def call(self, name: str, stage: str, target: Path, shards: Path, **options: Any) -> None:
        """A stage that writes shards or scores: `target` is its tokenizer or its model."""
        out = self.folder / name / "out"
        self.jobs.append({"stage": stage, "target": str(target), "shards": str(shards), "out": str(out), "options": options})

    def command(self, ranks: int) -> list[str]:
        """What does all jobs added so far, by that many ranks."""
        plan = self.folder / f"jobs-{ranks}.json"
        plan.write_text(json.dumps(self.jobs))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        return [sys.executable, *launcher, str(PROGRAM), str(plan)]

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(PROGRAM.parent), str(PROGRAM.parent.parent)])
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def run(self, ranks: int) -> None:
        """All jobs added so far, by that many ranks."""
        done = subprocess.run(self.command(ranks), env=self.environment(), capture_output=True, text=True, timeout=300)
        self.jobs = []
        assert done.returncode == 0, done.stderr[-4000:]

    def weights(self, name: str) -> dict[str, Tensor]:
        return read_weights(self.folder / name / "out" / "model.safetensors")

    def batches(self, name: str) -> list[list[str]]:
        """The keys of each batch in the order of the stream, those of all ranks together; a batch that was made again counts once."""
        found: dict[int, dict[int, list[str]]] = {}
        for file in sorted((self.folder / name).glob("batches-*.jsonl")):
            for line in file.read_text().splitlines():
                start, keys, _ = json.loads(line)
                found.setdefault(start, {})[int(file.stem.split("-")[1])] = keys
        return [sorted(chain.from_iterable(parts.values())) for _, parts in sorted(found.items())]

    def ports(self, name: str) -> list[list[set[str]]]:
        """The ports that each rank's part of each batch holds: [step][rank]."""
        files = sorted((self.folder / name).glob("batches-*.jsonl"))
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[set(ports) for _, _, ports in step] for step in zip(*lines, strict=True)]

    def losses(self, name: str) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (self.folder / name / "out" / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name], atol=2e-5, rtol=1e-4) for name in first)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pictures(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    with ShardWriter(folder, split="train", samples_per_shard=7) as writer:
        for number in range(24):
            writer.write(Sample(f"{number:03d}", {"image": rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)}))
    return folder


def asked(number: int) -> dict[str, str]:
    return {"question": "how many?", "answer": str(number), "type": "count"}


def captioned(folder: Path) -> Path:
    """Pictures with captions, and the checkpoint of the tokenizer that reads them."""
    rng = np.random.default_rng(1)
    pixels = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(24)]
    samples = [Sample(f"{n:03d}", {"image": picture, "caption": CAPTIONS[n % 8]}) for n, picture in enumerate(pixels)]
    return make_world(folder, clip_recipe(), samples).shards


def clip_recipe() -> Recipe:
    return load_recipe("clip", size="tiny", sets=["phases.contrast.steps=4", "phases.contrast.batch_size=8"])


def codebook_recipe() -> Recipe:
    sets = [
        "phases.train.steps=5",
        "phases.train.batch_size=8",
        "phases.train.warmup_steps=0",
        "autoencoders.vq.quantizer.codebook_size=16",
    ]
    return load_recipe("vqgan", size="tiny", sets=sets)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Everything the tests below look at, made by one rank, by two, and by one again."""
    folder = tmp_path_factory.mktemp("ranks with ünicode")
    world = make_world(folder / "world", mixed_recipe(), [sample_of(number) for number in range(NUM_SAMPLES)])
    jobs = Jobs(folder, world.shards)
    images = pictures(folder / "pictures")
    pairs = captioned(folder / "pairs")
    prompts = make_world(
        folder / "prompts", mixed_recipe(), [sample_of(number, qa=[asked(number)]) for number in range(NUM_PROMPTS)]
    ).shards
    networks = recipe_of(False, *TWO_NETWORKS)
    mixtures = {
        "networks": (networks, make_world(folder / "networks", networks, [sample_of(number) for number in range(8)]).shards),
        "hybrid": (hybrid(), make_world(folder / "hybrid", hybrid(), [hybrid_sample(number) for number in range(8)]).shards),
    }
    jobs.train("alone", *PLAIN)
    for name, mixture in mixtures.items():
        jobs.add(f"alone {name}", *mixture)
    jobs.train("alone filled", *FILLED, *PLAIN[:2])
    jobs.train("alone routed", *FILLED, *PLAIN[:2], *ROUTED)
    jobs.train("alone phases", PHASES)
    jobs.train("one then two", *PLAIN, max_steps=2)
    jobs.add("alone towers", clip_recipe(), pairs, "align")
    jobs.add("alone codebook", codebook_recipe(), images, "pretrain-tokenizer")
    jobs.call("alone tokens", "tokenize", folder / "alone codebook" / "out", images)
    jobs.call("alone samples", "sample", folder / "alone phases" / "out", prompts)
    jobs.call("alone scores", "eval", folder / "alone phases" / "out", prompts)
    jobs.run(1)
    jobs.train("ddp", *PLAIN)
    for name, mixture in mixtures.items():
        jobs.add(f"ddp {name}", *mixture)
        jobs.add(f"fsdp {name}", *mixture, parallel="fsdp")
    jobs.train("fsdp", *PLAIN, parallel="fsdp")
    jobs.train("ddp filled", *FILLED, *PLAIN[:2])
    jobs.train("ddp routed", *FILLED, *PLAIN[:2], *ROUTED)
    jobs.train("fsdp routed", *FILLED, *PLAIN[:2], *ROUTED, parallel="fsdp")
    jobs.train("ddp phases", PHASES)
    jobs.train("fsdp phases", PHASES, parallel="fsdp")
    jobs.train("fsdp then ddp phases", PHASES, parallel="fsdp", max_steps=4)
    jobs.train("fsdp then ddp phases", PHASES)
    jobs.train("one then two", *PLAIN, max_steps=4)
    jobs.train("two workers", *PLAIN, workers=1)
    jobs.train("everything", "phases.joint.ema_decay=0.8")
    jobs.train("everything twice", "phases.joint.ema_decay=0.8", max_steps=2)
    jobs.train("everything twice", "phases.joint.ema_decay=0.8", max_steps=3)
    jobs.train("everything twice", "phases.joint.ema_decay=0.8")
    jobs.add("two towers", clip_recipe(), pairs, "align", workers=1)
    jobs.add("two codebook", codebook_recipe(), images, "pretrain-tokenizer")
    jobs.call("two tokens", "tokenize", folder / "alone codebook" / "out", images)
    jobs.call("two samples", "sample", folder / "alone phases" / "out", prompts)
    jobs.call("two scores", "eval", folder / "alone phases" / "out", prompts)
    jobs.run(2)
    jobs.train("one then two", *PLAIN)
    jobs.run(1)
    return jobs


@pytest.mark.parametrize("name", ["ddp", "fsdp", "two workers"])
def test_two_ranks_see_the_batches_of_one_and_learn_its_weights(done: Jobs, name: str) -> None:
    assert done.batches(name) == done.batches("alone")
    assert len(done.batches(name)) == STEPS
    assert close(done.weights(name), done.weights("alone"))
    assert done.losses(name)[-1] == pytest.approx(done.losses("alone")[-1], abs=1e-4)


def test_batches_are_filled_as_one_rank_would_fill_them(done: Jobs) -> None:
    """Also where a batch holds fewer samples than there are ranks."""
    assert {len(keys) for keys in done.batches("alone filled")} >= {1, 2}
    found, expected = done.batches("ddp filled"), done.batches("alone filled")
    # a rank without a sample of a batch looks on at its first one, which is then named twice
    assert [sorted(set(keys)) for keys in found] == expected
    assert close(done.weights("ddp filled"), done.weights("alone filled"))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_learned_routing_is_balanced_over_the_batch_of_all_ranks(done: Jobs, name: str) -> None:
    """Balancing each rank's part by itself would be another loss, and a rank that only looks on has nothing to balance."""
    assert close(done.weights(f"{name} routed"), done.weights("alone routed"))
    last = json.loads((done.folder / f"{name} routed" / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 1.9 < last["loss/lm.balance"] < 2.5  # two of three experts a token: 2 is even


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["networks", "hybrid"])
def test_ranks_whose_batches_need_other_parts_learn_the_weights_of_one(done: Jobs, name: str, parallel: str) -> None:
    """A network, an encoder or a port that one rank has no token for, or that none has: then an optimizer must pass its weights over."""
    held = done.ports(f"{parallel} {name}")
    everything = set().union(*chain.from_iterable(held))
    some = {"networks": "draw", "hybrid": "see"}[name]
    assert any(some in first ^ second for first, second in held)
    assert any(everything - first - second for first, second in held[1:])
    found, expected = done.weights(f"{parallel} {name}"), done.weights(f"alone {name}")
    assert found.keys() == expected.keys()
    for address, value in expected.items():
        if value.dim() > 1:  # single numbers, and biases of keys, have no gradient but rounding, which Adam makes large
            assert float((found[address] - value).square().mean().sqrt()) < 1e-5, address  # they moved by up to 7e-3


def test_phases_freeze_and_average_in_shards_as_they_do_whole(done: Jobs) -> None:
    assert done.batches("ddp phases") == done.batches("fsdp phases") == done.batches("alone phases")
    assert close(done.weights("fsdp phases"), done.weights("ddp phases"))


def test_a_run_in_shards_goes_on_whole(done: Jobs) -> None:
    assert close(done.weights("fsdp then ddp phases"), done.weights("ddp phases"))


def test_a_run_continued_by_another_number_of_ranks_keeps_its_order(done: Jobs) -> None:
    """Two steps by one rank, two by two, two by one."""
    assert done.batches("one then two") == done.batches("alone")
    assert close(done.weights("one then two"), done.weights("alone"))


def test_stopped_twice_two_ranks_go_on_to_the_same_bits(done: Jobs) -> None:
    """Noise, dropped conditions, moving average and all."""
    assert same(done.weights("everything twice"), done.weights("everything"))
    assert done.batches("everything twice") == done.batches("everything")


def test_contrastive_pairs_are_held_against_those_of_all_ranks(done: Jobs) -> None:
    """Halves of a batch contrasted by themselves would be another loss."""
    assert done.batches("two towers") == done.batches("alone towers")
    assert done.losses("two towers")[-1] == pytest.approx(done.losses("alone towers")[-1], abs=1e-4)
    matrices = [{name: value for name, value in done.weights(f"{who} towers").items() if value.dim() > 1} for who in ("two", "alone")]
    assert close(*matrices)  # biases of keys have no gradient but rounding, which Adam makes large


def test_the_codebook_of_two_ranks_is_that_of_one(done: Jobs) -> None:
    one, two = done.weights("alone codebook"), done.weights("two codebook")
    codebook = next(name for name in one if name.endswith("codebook"))
    assert len(one[codebook].unique(dim=0)) > 8  # it follows the latents, and moves dead codes
    torch.testing.assert_close(two[codebook], one[codebook], atol=2e-4, rtol=1e-3)
    assert done.batches("two codebook") == done.batches("alone codebook")


@pytest.mark.parametrize("what", ["tokens", "samples"])
def test_two_ranks_write_the_tars_of_one(done: Jobs, what: str) -> None:
    """Byte by byte, with the index."""

    def written(name: str) -> dict[str, bytes]:
        out = done.folder / name / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in [*out.rglob("*.tar"), *out.rglob("shardindex.json")]}

    one, two = written(f"alone {what}"), written(f"two {what}")
    assert len(one) >= 3  # several tars: there was work to share
    assert two == one


def test_two_ranks_score_as_one(done: Jobs) -> None:
    one, two = (json.loads((done.folder / f"{who} scores" / "out" / "results.json").read_text()) for who in ("alone", "two"))
    assert len(one["results"]) > 4
    assert two["results"] == one["results"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_ranks_and_workers_stopped_twice_anywhere_keep_the_order(done: Jobs, seed: int) -> None:
    """Three launches of one to four ranks with zero to two workers, whole or in shards."""
    rng = random.Random(seed)
    stops = [*sorted(rng.sample(range(1, STEPS), 2)), STEPS]
    name = f"property {seed}"
    for stop in stops:
        done.train(name, *FILLED, *PLAIN[:2], max_steps=stop, workers=rng.randrange(3), parallel=rng.choice(["ddp", "fsdp"]))
        done.run(rng.randrange(1, 5))
    assert [sorted(set(keys)) for keys in done.batches(name)] == done.batches("alone filled")
    assert close(done.weights(name), done.weights("alone filled"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ending", "workers"),
    [
        (signal.SIGTERM, ("preempted", 75), 0),
        (signal.SIGTERM, ("preempted", 75), 2),
        (signal.SIGHUP, ("preempted", 75), 2),
        (signal.SIGINT, ("stopped", 130), 2),
    ],
)
def test_a_signal_saves_the_state_of_all_ranks_and_the_same_command_goes_on(
    done: Jobs, number: signal.Signals, ending: tuple[str, int], workers: int
) -> None:
    name, steps = f"{number.name} {workers}", 400
    out = done.folder / name / "out"
    done.train(f"{name} straight", *PLAIN, f"phases.joint.steps={steps}", max_steps=40)
    done.run(2)
    done.train(name, *PLAIN, f"phases.joint.steps={steps}", workers=workers)
    launch = subprocess.Popen(done.command(2), env=done.environment(), stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file():
        time.sleep(0.05)
    launch.send_signal(number)
    launch.wait(60)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ending
    assert number.name in status["message"]
    assert 0 < status["step"] < steps
    done.jobs = []
    done.train(name, *PLAIN, f"phases.joint.steps={steps}", max_steps=max(40, status["step"] + 1))
    done.run(2)
    assert done.batches(name)[:40] == done.batches(f"{name} straight")


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_same_command_goes_on(done: Jobs) -> None:
    steps = 400
    out = done.folder / "bereft" / "out"
    done.train("bereft straight", *PLAIN, f"phases.joint.steps={steps}", max_steps=40)
    done.run(2)
    done.train("bereft", *PLAIN, f"phases.joint.steps={steps}", workers=1)
    launch = subprocess.Popen(done.command(2), env=done.environment(), stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file():
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()]
    second = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    launch.wait(60)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    done.jobs = []
    done.train("bereft", *PLAIN, f"phases.joint.steps={steps}", max_steps=max(40, status["step"] + 1))
    done.run(2)
    assert done.batches("bereft")[:40] == done.batches("bereft straight")
