"""The reader reads what was drawn, says so when it cannot, and is fast enough to score generated pictures."""

import time
from itertools import pairwise

import numpy as np
import pytest

from stages.data.scenes import LEVELS, Reading, Scene, SceneObject, read_scene, render
from stages.data.scenes.reader import box_blur
from stages.data.scenes.render import Nuisance, draw_nuisance
from stages.data.scenes.world import SPLITS, draw_scene, generator_for

Picture = np.ndarray


def pictures(level: int, count: int, name: str = "reader") -> list[tuple[Scene, Picture]]:
    drawn = []
    for i in range(count):
        rng = generator_for(name, level, i)
        scene = draw_scene(LEVELS[level], SPLITS[i % 3], rng)
        drawn.append((scene, render(scene, draw_nuisance([scene], rng))))
    return drawn


def to_bytes(values: Picture) -> Picture:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def blurred(picture: Picture, times: int) -> Picture:
    values = picture / 255
    for _ in range(times):
        values = box_blur(values)
    return to_bytes(values)


def noisy(picture: Picture, sigma: float, seed: int) -> Picture:
    return to_bytes(picture / 255 + sigma * np.random.default_rng(seed).standard_normal(picture.shape))


def cells(truth: Scene, reading: Reading) -> list[tuple[bool, bool]]:
    """(right, valid) of every cell."""
    return [(truth.by_place.get(cell.place) == reading.scene.by_place.get(cell.place), cell.valid) for cell in reading.cells]


def assert_all_read(level: int, count: int) -> None:
    for scene, picture in pictures(level, count):
        reading = read_scene(picture, level)
        assert reading.scene == scene
        assert reading.valid
        assert reading.believed == scene


@pytest.mark.parametrize(("level", "count"), [(0, 500), (1, 500), (2, 500), (3, 500), (4, 30)])
def test_clean_pictures_are_read_exactly(level: int, count: int) -> None:
    assert_all_read(level, count)


@pytest.mark.slow
def test_clean_pictures_of_overlapping_objects_are_read_exactly() -> None:
    assert_all_read(4, 500)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_an_empty_picture_is_an_empty_scene(level: int) -> None:
    reading = read_scene(render(Scene(level), Nuisance(0.9)), level)
    assert reading.scene == Scene(level)
    assert reading.valid


# What the reader's docstring states: per level, percent of cells read right / accepted, for each damage in turn; even cross-fades accepted.
DAMAGES = ("blur 1", "blur 2", "noise 0.1", "noise 0.2", "noise 0.3", "noise 0.5")
MEASURED: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    0: (((100, 100), (100, 100), (100, 100), (100, 100), (100, 81), (98, 0)), 1.5),
    1: (((100, 100), (100, 100), (100, 100), (100, 89), (99, 38), (63, 0)), 0.3),
    2: (((100, 100), (100, 100), (100, 100), (100, 92), (99, 36), (50, 0)), 0.2),
    3: (((100, 98), (98, 88), (100, 99), (100, 71), (98, 2), (29, 0)), 0.2),
    4: (((99, 66), (87, 57), (100, 54), (100, 0), (100, 0), (99, 0)), 0.0),
}


def damage_table(level: int, count: int) -> tuple[list[tuple[float, float, float]], float]:
    """For each damage the percentage of cells read right, accepted, and right among the accepted; percentage of cross-fades accepted."""
    drawn, rows = pictures(level, count), []
    for kind, amount in (damage.split() for damage in DAMAGES):
        results = []
        for seed, (scene, picture) in enumerate(drawn):
            image = blurred(picture, int(amount)) if kind == "blur" else noisy(picture, float(amount), seed)
            results += cells(scene, read_scene(image, level))
        right, valid = np.array(results).T
        rows.append((100 * right.mean(), 100 * valid.mean(), 100 * right[valid].mean() if valid.any() else 100.0))
    faded = []
    for (first, a), (second, b) in pairwise(drawn):
        reading = read_scene(to_bytes((a / 255 + b / 255) / 2), level)
        faded += [cell.valid for cell in reading.cells if first.by_place.get(cell.place) != second.by_place.get(cell.place)]
    return rows, 100 * float(np.mean(faded))


@pytest.mark.parametrize(("level", "count"), [(0, 100), (1, 100), (2, 60), (3, 40), pytest.param(4, 25, marks=pytest.mark.slow)])
def test_damaged_pictures_are_read_as_stated_and_what_is_accepted_is_right(level: int, count: int) -> None:
    rows, faded = damage_table(level, count)
    expected, stated_faded = MEASURED[level]
    for (right, accepted, right_if_accepted), (stated_right, stated_accepted) in zip(rows, expected, strict=True):
        assert right == pytest.approx(stated_right, abs=5)
        assert accepted == pytest.approx(stated_accepted, abs=8)
        assert right_if_accepted > 99.8
    assert faded == pytest.approx(stated_faded, abs=2)


@pytest.mark.parametrize("level", [0, 1])
def test_noise_alone_is_rejected(level: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert not read_scene(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), level).valid


def test_an_object_one_pixel_off_is_still_read_at_level_0() -> None:
    scene = Scene(0, (SceneObject("large", "plain", "cyan", "triangle", "top right"),))
    reading = read_scene(render(scene, Nuisance(0.95, {"top right": (-1, 1)})), 0)
    assert reading.scene == scene
    assert reading.valid


def test_one_damaged_cell_leaves_the_others_believed() -> None:
    scene, picture = pictures(1, 9)[4]
    spoilt = picture.copy()
    spoilt[:16, :16] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    reading = read_scene(spoilt, 1)
    assert not reading.valid
    assert [cell.place for cell in reading.cells if not cell.valid] == ["top left"]
    assert reading.believed == scene.without("top left")


@pytest.mark.parametrize("image", [np.zeros((32, 31, 3), np.uint8), np.zeros((32, 32, 3), np.float32), np.zeros((3, 32, 32), np.uint8)])
def test_pictures_of_another_size_or_type_are_refused(image: Picture) -> None:
    with pytest.raises(ValueError, match=r"level 1 pictures are uint8 \(32, 32, 3\)"):
        read_scene(image, 1)


@pytest.mark.parametrize("level", [0, 1])
def test_the_reader_reads_two_hundred_pictures_a_second(level: int) -> None:
    drawn = [picture for _, picture in pictures(level, 50)]
    read_scene(drawn[0], level)
    begun = time.process_time()
    for picture in drawn:
        read_scene(picture, level)
    assert len(drawn) / (time.process_time() - begun) > 200
