"""Is the caption what the picture shows? Parsed back into objects by the grammar of the world, and compared with the true scene.

A sentence outside the grammar describes nothing and counts as wrong; the share that parses, and the share that is true of the
picture (it may leave something open), are reported beside the objects named.
"""

from stages.data.scenes import Scene, described_scene, parse_caption, satisfied
from stages.data.scenes.language import Meaning
from stages.metrics.object_scores import object_scores, share
from stages.metrics.score import Fields, Score, Setting


class CaptionCorrectness:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return {"sample.caption", "scene"} <= sample.keys()

    def look(self, sample: Fields) -> Meaning | None:
        return parse_caption(sample["sample.caption"])

    def expect(self, sample: Fields) -> Scene:
        return Scene.from_json(sample["scene"])

    def scores(self, seen: list[Meaning | None], expected: list[Scene]) -> list[Score]:
        pairs = list(zip(seen, expected, strict=True))
        protocol = {"parser": "scenes", "levels": sorted({scene.level for scene in expected})}
        described = [described_scene(meaning, scene.level) or Scene(scene.level) for meaning, scene in pairs]
        return [
            *object_scores(expected, described, self.seed, protocol),
            share("true", [satisfied(meaning, scene) for meaning, scene in pairs], protocol),
            share("parsed", [meaning is not None for meaning in seen], protocol),
        ]
