"""The built-in world: small scenes of coloured shapes, with one exact truth in every modality.

world      what a scene is, the levels of difficulty, the splits
render     scene -> picture                reader     picture -> scene
language   captions and their meanings     questions  questions and their answers     edits  instructions and what they do
plans      requests and the tool calls that fulfil them
samples    all of it as one sample         scoring    how far a drawn scene is the meant one
"""

from stages.data.scenes.edits import apply_instruction
from stages.data.scenes.language import caption, described_scene, parse_caption, satisfied
from stages.data.scenes.questions import answer, answer_vocabulary
from stages.data.scenes.reader import Reading, read_scene
from stages.data.scenes.render import render
from stages.data.scenes.samples import scene_sample
from stages.data.scenes.scoring import CATEGORIES, categories, compare, judge
from stages.data.scenes.world import LEVELS, Level, Scene, SceneObject, split_of

__all__ = [
    "CATEGORIES",
    "LEVELS",
    "Level",
    "Reading",
    "Scene",
    "SceneObject",
    "answer",
    "answer_vocabulary",
    "apply_instruction",
    "caption",
    "categories",
    "compare",
    "described_scene",
    "judge",
    "parse_caption",
    "read_scene",
    "render",
    "satisfied",
    "scene_sample",
    "split_of",
]
