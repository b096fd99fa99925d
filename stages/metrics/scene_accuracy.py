"""Is the picture what the prompt said? Read back by the exact reader and compared object by object, as GenEval does by detectors.

Beside the objects and whole scenes: GenEval's six categories (arXiv:2310.11513), each over the prompts it is about. A picture the
reader does not believe (blurred, mixed) counts as empty, hence wrong, and the share it does believe is reported.
"""

from typing import Any

from stages.data.scenes import CATEGORIES, Scene, categories, judge, read_scene
from stages.data.scenes.reader import MAX_RATIO, MAX_RESIDUAL
from stages.errors import DataError
from stages.metrics.object_scores import object_scores, share
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import Fields, Score, Setting


def drawn_scene(sample: Fields, field: str = "sample.image") -> tuple[Scene, bool]:
    """What the reader finds in a drawn picture, empty where it does not believe what it sees; and whether it does."""
    level = Scene.from_json(sample["scene"]).level
    try:
        reading = read_scene(sample[field], level)
    except ValueError as error:
        raise DataError(f"{sample['__key__']}: {field}: {error}") from None
    return (reading.scene if reading.valid else Scene(level), reading.valid)


class SceneAccuracy:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return {"sample.image", "scene"} <= sample.keys() and not is_reconstruction(sample)

    def look(self, sample: Fields) -> tuple[Scene, bool]:
        return drawn_scene(sample)

    def expect(self, sample: Fields) -> Scene:
        return Scene.from_json(sample["scene"])

    def scores(self, seen: list[tuple[Scene, bool]], expected: list[Scene]) -> list[Score]:
        drawn = [scene for scene, _ in seen]
        protocol = reader_protocol(expected)
        scores = object_scores(expected, drawn, self.seed, protocol)
        for name in CATEGORIES:
            about = [judge(name, meant, made) for meant, made in zip(expected, drawn, strict=True) if name in categories(meant)]
            if about:
                scores.append(share(name, about, protocol))
        return [*scores, share("readable", [valid for _, valid in seen], protocol)]


class ReconstructedScenes(SceneAccuracy):
    """The same reader on pictures that went through an image tokenizer and back: does it keep what a scene says?"""

    paired = False

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return "scene" in sample and is_reconstruction(sample)

    def scores(self, seen: list[tuple[Scene, bool]], expected: list[Scene]) -> list[Score]:
        protocol = reader_protocol(expected)
        scores = object_scores(expected, [scene for scene, _ in seen], self.seed, protocol)
        return [*scores, share("readable", [valid for _, valid in seen], protocol)]


def reader_protocol(expected: list[Scene]) -> dict[str, Any]:
    levels = sorted({scene.level for scene in expected})
    return {"reader": "scenes", "levels": levels, "max_residual": MAX_RESIDUAL, "max_ratio": MAX_RATIO}
