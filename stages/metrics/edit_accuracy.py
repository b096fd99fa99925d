"""Did an edit do what its instruction says, and nothing else? The exact reader on the edited picture, against the scene before and after.

`changed`: everything at the places that the edit touches is as it should be. `kept`: of the objects it does not touch, those still as
they were. Both are needed: copying the source keeps all and changes nothing. A picture the reader does not believe has done and kept
nothing, not even where something was to be removed.
"""

from typing import Any

import numpy as np

from stages.data.scenes import Scene
from stages.metrics.intervals import bootstrap_share
from stages.metrics.object_scores import object_scores, share
from stages.metrics.scene_accuracy import drawn_scene, reader_protocol
from stages.metrics.score import Fields, Score, Setting

Edit = tuple[Scene, Scene]  # before and after


class EditAccuracy:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return {"sample.result", "scene", "result.scene"} <= sample.keys()

    def look(self, sample: Fields) -> tuple[Scene, bool]:
        return drawn_scene(sample, "sample.result")

    def expect(self, sample: Fields) -> Edit:
        return Scene.from_json(sample["scene"]), Scene.from_json(sample["result.scene"])

    def scores(self, seen: list[tuple[Scene, bool]], expected: list[Edit]) -> list[Score]:
        drawn, afters = [scene for scene, _ in seen], [after for _, after in expected]
        protocol: dict[str, Any] = reader_protocol(afters)
        done = [
            valid and all(made.by_place.get(place) == after.by_place.get(place) for place in touched(before, after))
            for (before, after), (made, valid) in zip(expected, seen, strict=True)
        ]
        untouched = [[entry for entry in before.objects if after.by_place.get(entry.place) == entry] for before, after in expected]
        kept = [sum(made.by_place.get(e.place) == e for e in entries) for entries, made in zip(untouched, drawn, strict=True)]
        there = [len(entries) for entries in untouched]
        scores = [share("changed", done, protocol)]
        if sum(there):
            interval = bootstrap_share(np.array(kept), np.array(there), self.seed)
            scores.append(Score("kept", sum(kept) / sum(there), sum(there), len(seen), interval, protocol=protocol))
        scores += object_scores(afters, drawn, self.seed, protocol)
        return [*scores, share("readable", [valid for _, valid in seen], protocol)]


def touched(before: Scene, after: Scene) -> list[str]:
    """The places where two scenes differ."""
    return [place for place in before.row.places if before.by_place.get(place) != after.by_place.get(place)]
