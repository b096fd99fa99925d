"""The language of plans: everything that can be written can be read again, and everything else is refused in one clear line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tools.calls import Call, CallError, Reference, by_reference, file_name, happened, lines_of, read_call, read_plan, write_plan

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
CALLS = st.builds(Call, NAMES, st.dictionaries(NAMES, TEXTS | st.builds(Reference, NAMES), max_size=4))


@given(st.lists(CALLS, max_size=4))
def test_every_plan_is_read_as_it_was_written(calls: list[Call]) -> None:
    text = write_plan(calls)
    assert read_plan(text) == calls
    assert len(lines_of(text)) == len(calls)


@given(st.text(st.sampled_from('draw(caption="x\\u00e9", b=<step-1>)\n'), max_size=40) | st.text(max_size=30))
def test_whatever_a_model_writes_is_calls_or_one_line_of_complaint(text: str) -> None:
    try:
        complaint, calls = "", read_plan(text)
    except CallError as error:
        complaint, calls = str(error), []
    assert "\n" not in complaint and len(complaint) < 300
    assert read_plan(write_plan(calls)) == calls


def test_spaces_around_arguments_mean_nothing() -> None:
    assert read_call(' edit(image=<image>,instruction="a, b") ') == Call("edit", {"image": Reference("image"), "instruction": "a, b"})
    assert read_call("look()") == Call("look", {})


BAD = {
    "draw a circle": 'expected TOOL(ARGUMENT=VALUE, ...), found "draw a circle"',
    "": "expected TOOL(ARGUMENT=VALUE, ...), found nothing",
    'Draw(caption="x")': r'expected TOOL(ARGUMENT=VALUE, ...), found "Draw(caption=\"x\")"',
    'draw("x")': r'draw: expected ARGUMENT=VALUE, found "\"x\")"',
    "draw(": "draw: expected ARGUMENT=VALUE, found nothing",
    'draw(caption="x", )': 'draw: expected ARGUMENT=VALUE, found ")"',
    'draw(caption="x"': "draw: expected ',' or ')' after caption, found nothing",
    'draw(caption="x" size="y")': r'''draw: expected ',' or ')' after caption, found " size=\"y\")"''',
    'draw(caption="x") -> a': "draw: expected nothing after ')', found \" -> a\"",
    'draw(caption="x", caption="y")': "draw: caption is given twice",
    "draw(caption=3)": 'draw: caption: expected a text in quotes, <image> or <step-N>, found "3)"',
    "draw(caption=)": 'draw: caption: expected a text in quotes, <image> or <step-N>, found ")"',
    "draw(caption=<step 1>)": 'draw: caption: expected a text in quotes, <image> or <step-N>, found "<step 1>)"',
    'draw(caption="a red circle)': r'draw: caption: expected a closing quote, found the end of the line after "\"a red circle)"',
    r'draw(caption="\q")': r'draw: caption: expected a text with JSON\'s escapes, found "\"\\q\""'.replace("\\'", "'"),
    r'draw(caption="\ud800")': r'draw: caption: expected a text with JSON\'s escapes, found "\"\\ud800\""'.replace("\\'", "'"),
    r'draw(caption="\u0000")': "draw: caption: expected a text, found a NUL in it",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_is_no_call_says_what_was_expected_and_what_was_found(line: str) -> None:
    with pytest.raises(CallError) as caught:
        read_call(line)
    assert str(caught.value) == BAD[line]


def test_a_plan_names_the_line_that_is_wrong() -> None:
    with pytest.raises(CallError, match=r"^line 2: draw: expected ARGUMENT=VALUE"):
        read_plan('draw(caption="x")\ndraw(x)')


def test_file_names_are_chained_and_say_which_step_they_came_from() -> None:
    first = file_name(1, "draw")
    second = file_name(2, "edit", first)
    assert (first, second, file_name(1, "edit", "image.png")) == ("1_draw.png", "2_edit_1_draw.png", "1_edit_image.png")
    call = Call("edit", {"image": second, "instruction": "a text", "other": "image.png", "told": "two"})
    expected = {"image": Reference("step-2"), "instruction": "a text", "other": Reference("image"), "told": Reference("step-3")}
    assert by_reference(call, {"two": "step-3"}) == Call("edit", expected)
    assert happened(Call("draw", {"caption": "x"}), first, picture=True) == 'draw(caption="x") -> 1_draw.png'
    assert happened(Call("count", {}), "two", picture=False) == 'count() -> "two"'
