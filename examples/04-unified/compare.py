"""What the runs of this study say: `python compare.py WORK --out DIR`, which `make` calls when they are done.

    DIR/results.json    every number of every run        DIR/README.md    its tables, between the marks

u is question accuracy beyond chance, (accuracy - chance) / (1 - chance) for each type of question and not below 0, averaged over types. g is the
share of the objects of a caption that are in the drawn picture with the right attributes and place, by the scene reader; a
picture that it does not believe has none. b = sqrt(u · g). A number of a table is the mean over seeds, ± half the width of its
95 % interval (Student's t). Differences are paired by seed, their p-values corrected by Holm within a table.

`--plan` says what a study takes; `--steps ARM` how many steps the FLOPs of a run pay for, from the dry run beside it.
"""

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.metrics.paired import Difference, holm, paired, t_quantile

Run = dict[str, Any]
RATE = 2e10  # operations a second of one thread, until a finished run says better
PART = {"reads-part": "answer", "draws-part": "draw"}  # of the steps of `base`, the share that this task has there


class Axis(NamedTuple):
    """One question: its arms, the first of which the others are held against, and which scores are compared."""

    title: str
    arms: tuple[str, ...]
    scores: tuple[str, ...] = ("u", "g")


AXES = {
    "objective": Axis("How a picture is drawn", ("base", "masked", "diffusion", "next-scale"), ("u", "g", "b")),
    "trunk": Axis("Which weights a token passes", ("base", "moe", "modality", "role"), ("u", "g", "b")),
    "encoders": Axis("What is read", ("base", "decoupled", "concatenated"), ("u", "g", "b")),
}
PROMOTION = {  # protocol → what `base` is held against, and for which score
    "E1: the same FLOPs": {"u": "reads", "g": "draws"},
    "E2: the same samples of the task": {"u": "reads-part", "g": "draws-part"},
    "placebo: the other half is noise": {"u": "placebo-draw", "g": "placebo-read"},
}
CEILINGS = {"vqgan": "codes", "kl-autoencoder": "latents", "var-tokenizer": "codes of several scales"}


# --- the runs ---------------------------------------------------------------------------------------------------------------------


def read_runs(work: Path) -> list[Run]:
    """Every finished run below runs/ARM/SEED."""
    return [read_run(path.parent.parent) for path in sorted(work.glob("runs/*/*/scores/results.json"))]


def read_run(folder: Path) -> Run:
    config = json.loads((folder / "model" / "config.json").read_text())
    rows = json.loads((folder / "scores" / "results.json").read_text())["results"]
    own = [row for row in rows if row["control"] is None]
    run: Run = {
        "arm": folder.parts[-2],
        "seed": int(folder.parts[-1]),
        **{key: config[key] for key in ("parameters", "steps", "samples", "tokens", "flops")},
        "minutes": minutes(folder / "model" / "metrics.jsonl"),
    }
    answered = {row["category"]: row for row in own if row["metric"] == "question-accuracy" and row["category"] != "all"}
    if answered:
        run["questions"] = {kind: {"accuracy": row["value"], "chance": row["chance"]} for kind, row in answered.items()}
        run["u"] = statistics.mean(beyond_chance(row["value"], row["chance"]) for row in answered.values())
    drawn = {row["category"]: row["value"] for row in own if row["metric"] == "scene-accuracy"}
    if drawn:
        run |= {"drawn": drawn, "g": drawn["objects"]}
    if {"u", "g"} <= run.keys():
        run["b"] = math.sqrt(run["u"] * run["g"])
    return run


def beyond_chance(accuracy: float, chance: float) -> float:
    return max(0.0, (accuracy - chance) / (1 - chance))


def minutes(log: Path) -> float:
    """Of training alone, from the log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return max(line["seconds"] for line in lines if "seconds" in line) / 60


def by_arm(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """arm → seed → run."""
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        groups[run["arm"]][run["seed"]] = run
    return groups


# --- tables -----------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def difference(groups: Mapping[str, Mapping[int, Run]], one: str, other: str, score: str) -> Difference | None:
    """one - other over the seeds that both have; None for fewer than two."""
    seeds = sorted(seed for seed in groups.get(one, {}).keys() & groups.get(other, {}).keys())
    pairs = [(groups[one][seed], groups[other][seed]) for seed in seeds]
    pairs = [(a, b) for a, b in pairs if score in a and score in b]
    return paired([a[score] for a, _ in pairs], [b[score] for _, b in pairs]) if len(pairs) > 1 else None


def said(found: Difference | None, p: float | None) -> str:
    """ "+0.041 ± 0.020 (p 0.013)", in bold where the corrected p-value is below 0.05."""
    if found is None or p is None:
        return "–"
    words = f"{found.mean:+.3f} ± {found.half:.3f} (p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"
    return f"**{words}**" if p < 0.05 else words


def corrected(found: Sequence[Difference | None]) -> list[float | None]:
    """Holm over those that are there."""
    adjusted = iter(holm([one.p for one in found if one is not None]))
    return [None if one is None else next(adjusted) for one in found]


def score_table(groups: Mapping[str, Mapping[int, Run]], axis: Axis) -> str:
    """An arm a line: its scores, what it took, and how far its scores are from those of the first arm."""
    arms = [arm for arm in axis.arms if arm in groups]
    found = [difference(groups, arm, axis.arms[0], score) for arm in arms[1:] for score in axis.scores]
    ps = corrected(found)
    heads = ["arm", "u", "g", "b", "min(u, g)", "scenes", "readable", "steps", "TFLOP", "parameters", "minutes", "seeds"]
    lines = [row([*heads, *(f"Δ{score}" for score in axis.scores)]), row(["---", *["--:"] * (len(heads) - 1 + len(axis.scores))])]
    for number, arm in enumerate(arms):
        runs = list(groups[arm].values())
        first = runs[0]
        cells = [f"`{arm}`", *(spread([run[s] for run in runs if s in run]) for s in ("u", "g", "b"))]
        cells.append(spread([min(run["u"], run["g"]) for run in runs if "b" in run]))
        cells += [spread([run["drawn"][key] for run in runs if "drawn" in run]) for key in ("scenes", "readable")]
        cells += [
            f"{first['steps']:,}",
            f"{statistics.mean(run['flops'] for run in runs) / 1e12:.2f}",
            f"{first['parameters'] / 1e6:.2f} M",
        ]
        cells += [f"{min(run['minutes'] for run in runs):.1f}", str(len(runs))]
        start = (number - 1) * len(axis.scores)
        deltas = [said(found[start + k], ps[start + k]) for k in range(len(axis.scores))] if number else [""] * len(axis.scores)
        lines.append(row([*cells, *deltas]))
    return "\n".join(lines)


def promotion_table(groups: Mapping[str, Mapping[int, Run]]) -> str:
    """What learning both does for each ability, protocol by protocol."""
    found = [difference(groups, "base", against[score], score) for against in PROMOTION.values() for score in ("u", "g")]
    ps = corrected(found)
    lines = [row(["protocol", "held against", "their u, g", "Δu", "Δg", "verdict"]), row(["---", "---", "--:", "--:", "--:", "---"])]
    for number, (protocol, against) in enumerate(PROMOTION.items()):
        own, own_ps = found[2 * number : 2 * number + 2], ps[2 * number : 2 * number + 2]
        theirs = ", ".join(spread([run[score] for run in groups.get(arm, {}).values() if score in run]) for score, arm in against.items())
        lines.append(
            row([protocol, " and ".join(f"`{arm}`" for arm in against.values()), theirs, *map(said, own, own_ps), verdict(own, own_ps)])
        )
    return "\n".join(lines)


def verdict(found: Sequence[Difference | None], ps: Sequence[float | None]) -> str:
    """mutual: both gain. trade: one gains what the other loses. one-way: one gains. interference: a loss and no gain."""
    known = [(one, p) for one, p in zip(found, ps, strict=True) if one is not None and p is not None]
    if len(known) < len(found):
        return "–"
    signs = [math.copysign(1, one.mean) if p < 0.05 else 0 for one, p in known]
    gains, losses = signs.count(1), signs.count(-1)
    if gains == 2:
        return "mutual"
    if gains and losses:
        return "trade"
    return "one-way" if gains else "interference" if losses else "undecided"


def question_table(groups: Mapping[str, Mapping[int, Run]]) -> str:
    """Accuracy by type of question, beside what the most frequent answer reaches."""
    arms = [arm for arm in groups if any("questions" in run for run in groups[arm].values())]
    kinds = next(run["questions"] for run in groups[arms[0]].values()) if arms else {}
    lines = [row(["arm", *kinds]), row(["---", *["--:"] * len(kinds)])]
    lines.append(row(["chance", *(f"{numbers['chance']:.2f}" for numbers in kinds.values())]))
    for arm in arms:
        runs = [run for run in groups[arm].values() if "questions" in run]
        lines.append(
            row(
                [
                    f"`{arm}`",
                    *(spread([run["questions"][kind]["accuracy"] for run in runs if kind in run["questions"]], 2) for kind in kinds),
                ]
            )
        )
    return "\n".join(lines)


def ceiling_table(work: Path) -> str:
    """What each tokenizer keeps of a scene: no arm can draw better."""
    lines = [row(["tokenizer", "gives", "objects", "scenes", "PSNR, dB"]), row(["---", "---", "--:", "--:", "--:"])]
    for name, gives in CEILINGS.items():
        path = work / "ceilings" / name / "results.json"
        if path.is_file():
            rows = {(r["metric"], r["category"]): r["value"] for r in json.loads(path.read_text())["results"] if r["control"] is None}
            kept = [rows["reconstructed-scenes", key] for key in ("objects", "scenes")]
            lines.append(row([f"`{name}`", gives, *(f"{value:.3f}" for value in kept), f"{rows['psnr', 'all']:.1f}"]))
    return "\n".join(lines)


def edit_table(work: Path) -> str:
    """What instructions did, for each pair of scales it was sampled with; each number with its interval over pictures, for it is one training."""
    columns = {"changed": "did what was said", "kept": "kept the rest", "scenes": "whole scene right", "readable": "readable"}
    lines = []
    for path in sorted(work.glob("edits/scores-*/results.json")):
        picture, words = path.parent.name.removeprefix("scores-").split("-")
        found = {
            (entry["category"], entry["control"]): entry
            for entry in json.loads(path.read_text())["results"]
            if entry["metric"] == "edit-accuracy" and entry["split"] == "val"
        }
        for control, name in ((None, f"{picture} and {words}"), ("shuffled", f"{picture} and {words}, other pictures' edits")):
            own = [found.get((category, control)) for category in columns]
            if any(entry and entry["value"] is not None for entry in own):
                lines.append([name, *(interval_words(entry) for entry in own)])
    if not lines:
        return "Not run."
    heads = ["scale of the picture and of the words", *columns.values()]
    return "\n".join([row(heads), row(["---", *["--:"] * len(columns)]), *map(row, lines)])


def interval_words(entry: Run | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    low, high = entry["interval"]
    return f"{entry['value']:.2f} ({low:.2f}–{high:.2f})"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_tables(readme: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its marks."""
    text = readme.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"(?s){re.escape(start)}.*?{re.escape(end)}", lambda _, c=content, a=start, b=end: f"{a}\n\n{c}\n\n{b}", text)
    readme.write_text(text, encoding="utf-8")


# --- what a study takes -----------------------------------------------------------------------------------------------------------


def phase_of(work: Path, arm: str) -> dict[str, Any]:
    """The one phase of an arm, as its dry run tells it."""
    (phase,) = json.loads((work / "steps" / f"{arm}.json").read_text())["phases"]
    return phase


def steps(work: Path, arm: str, tflop: float) -> int:
    """How many steps these operations pay for; an arm of one ability that is a part of `base` gets that share of its steps."""
    if arm in PART:
        tasks = phase_of(work, "base")["tasks"]
        return round(steps(work, "base", tflop) * tasks[PART[arm]] / sum(tasks.values()))
    return max(1, round(tflop * 1e12 / phase_of(work, arm)["flops_per_step"]))


def plan(work: Path, arms: Sequence[str], seeds: int) -> str:
    """A line an arm, and the hours of the whole; speeds are those of finished runs, or a guess."""
    done = by_arm(read_runs(work))
    speeds = {arm: statistics.mean(r["flops"] / r["minutes"] / 60 for r in runs.values()) for arm, runs in done.items()}
    usual = statistics.mean(speeds.values()) if speeds else RATE
    lines, total = [f"{'arm':<14} {'GFLOP a step':>12} {'steps':>7} {'TFLOP':>6} {'minutes':>8}  runs done"], 0.0
    for arm in arms:
        each, count = phase_of(work, arm)["flops_per_step"], int((work / "steps" / arm).read_text())
        spent = each * count / speeds.get(arm, usual) / 60
        total += spent * seeds
        lines.append(
            f"{arm:<14} {each / 1e9:>12.2f} {count:>7,} {each * count / 1e12:>6.2f} {spent:>8.1f}  {len(done.get(arm, {}))} of {seeds}"
        )
    runs = len(arms) * seeds
    known = "measured" if speeds else "guessed: no run is finished"
    lines.append(
        f"{runs} runs: {total / 60:.1f} hours of training on one core, {total / 120:.1f} on two (speed {known}: {usual / 1e9:.0f} GFLOP/s)"
    )
    lines.append("drawing, answering and scoring come on top: about half a minute a run")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--steps", metavar="ARM")
    parser.add_argument("--tflop", type=float)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--arms", default="")
    parser.add_argument("--seeds", default="")
    arguments = parser.parse_args()
    if arguments.steps:
        print(steps(arguments.work, arguments.steps, arguments.tflop))
        return
    if arguments.plan:
        print(plan(arguments.work, arguments.arms.split(), len(arguments.seeds.split())))
        return
    runs = read_runs(arguments.work)
    if not runs:
        parser.error(f"{arguments.work}: no finished runs; `make` makes them")
    groups = by_arm(runs)
    tables = {name: score_table(groups, axis) for name, axis in AXES.items()}
    tables |= {"promotion": promotion_table(groups), "questions": question_table(groups), "ceilings": ceiling_table(arguments.work)}
    tables["edits"] = edit_table(arguments.work)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if (arguments.out / "README.md").is_file():
        write_tables(arguments.out / "README.md", tables)
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main()
