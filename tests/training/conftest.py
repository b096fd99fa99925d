"""One small world for all training tests: eight samples with captions, questions, codes and latents."""

import pytest
from worlds import World, make_world, mixed_recipe, sample_of

NUM_SAMPLES = 8


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), mixed_recipe(), [sample_of(number) for number in range(NUM_SAMPLES)])
