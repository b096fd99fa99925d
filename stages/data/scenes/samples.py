"""One scene in every modality: the sample that the importer `scenes` writes.

Sample i of a split depends on (level, seed, split, i) and on nothing else, so a larger count begins with the smaller one, in any order and on
any number of machines.
"""

from stages.data.sample import Sample
from stages.data.scenes.edits import draw_edit
from stages.data.scenes.language import caption, paraphrases, partial_captions
from stages.data.scenes.plans import plan_fields
from stages.data.scenes.questions import questions
from stages.data.scenes.render import draw_nuisance, render
from stages.data.scenes.world import LEVELS, draw_scene, generator_for


def scene_sample(level: int, seed: int, split: str, index: int, *, edits: bool = True, plans: int = 0) -> Sample:
    """The sample with these coordinates.

    image.png           the picture: uint8 (pixels, pixels, 3)
    caption.txt         the full description; captions.json: it again, in other words, and partial descriptions, all true
    qa.json             [{"question", "answer", "type"}], at most one of a type
    scene.json          the scene graph; result.scene.json the one after the edit
    source.png, instruction.txt, result.png    an edit, unless not wanted: the same background, noise and placement on both sides
    request.txt, plan.txt, steps.json   something to do and the tool calls that do it, at most `plans` of them (0: none of this)
    meta.json           where the sample comes from
    """
    rng = generator_for("scenes", level, seed, split, index)
    scene = draw_scene(LEVELS[level], split, rng)
    instruction, result = draw_edit(scene, split, rng)
    nuisance = draw_nuisance([scene, result], rng)
    picture = render(scene, nuisance)
    fields = {
        "image": picture,
        "caption": caption(scene),
        "captions": list(dict.fromkeys([caption(scene), *paraphrases(scene, rng), *partial_captions(scene, rng)])),
        "qa": questions(scene, rng),
        "scene": scene.to_json(nuisance.offsets),
        "meta": {"source": "scenes", "level": level, "seed": seed, "split": split, "index": index},
    }
    if edits:
        after = {"result": render(result, nuisance), "result.scene": result.to_json(nuisance.offsets)}
        fields |= {"source": picture, "instruction": instruction, **after}
    if plans:  # by numbers of their own: everything else stays what it is without them
        fields |= plan_fields(scene, split, plans, generator_for("plans", level, seed, split, index))
    return Sample(key=f"scenes{level}-{seed}-{split}-{index:06d}", fields=fields, source="scenes")
