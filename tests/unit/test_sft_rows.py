"""Claims about rows of supervised fine-tuning: what is understood, and by what words the rest is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from workers.row_files import BadRow
from workers.sft_rows import Conversation, RowForm, check_row, conversation, picture_problem

VLM = RowForm("vlm", "question", "correct_answer", "choices", ("image", "images"))
CHAT = RowForm("chat", "messages", "answer", image_keys=("images",))
ANSWER = {"role": "assistant", "content": "yes"}


def question(**row: Any) -> Conversation:
    return conversation({"question": "What?", "image": "a.png", "correct_answer": "yes", **row}, VLM)


def said(found: Conversation) -> list[tuple[str, str]]:
    """Role and text of each turn, pictures as ``#``."""
    return [(turn.role, "".join(part.get("text", "#") for part in turn.parts)) for turn in found.messages]


def chat(*messages: Any, **row: Any) -> Conversation:
    return conversation({"messages": list(messages), **row}, CHAT)


@pytest.mark.parametrize("choices", [["cat", "dog", "4"], "['cat', 'dog', 4]", ["cat", "dog", 4], "('cat', 'dog', '4')"])
@pytest.mark.parametrize("answer", [1, "B", "dog", " B "])
def test_choices_are_lettered_and_answered_by_index_letter_or_text(choices: Any, answer: Any) -> None:
    found = question(choices=choices, correct_answer=answer)
    assert said(found) == [("user", "#What?\nChoices:\nA. cat\nB. dog\nC. 4\n"), ("assistant", "B. dog")]
    assert found.answer == "B. dog" and found.images == ("a.png",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"choices": ["a", "b"], "correct_answer": 2}, r"field 'correct_answer' is 2; 2 choices have the indices 0 to 1"),
        ({"choices": ["a", "b"], "correct_answer": -1}, "is -1; 2 choices"),
        ({"choices": ["a", "b"], "correct_answer": "C"}, "is 'C', which is none of the choices, A to B"),
        ({"choices": ["a", "b"], "correct_answer": True}, "holds true; it names a choice by index, letter or text"),
        ({"choices": ["B", "x"], "correct_answer": "B"}, "is 'B', which names more than one choice"),
        ({"choices": ["a", "a"], "correct_answer": "a"}, "names more than one choice"),
        ({"choices": ["a"], "correct_answer": 0}, "holds 1 choices; there must be 2 to 26"),
        ({"choices": "cat or dog", "correct_answer": 0}, "holds 'cat or dog', which is no list of choices"),
        ({"choices": "{[1]: 2}", "correct_answer": 0}, r"holds '\{\[1\]: 2\}', which is no list of choices"),
        ({"choices": [["a"], "b"], "correct_answer": 0}, "field 'choices' holds a list; it must be a string"),
        ({"question": None}, "no field 'question'; it has 'image', 'correct_answer'. Set data.prompt_key"),
        ({"question": " "}, "field 'question' is empty"),
        ({"image": 7}, "field 'image' holds a number for a picture"),
        ({"question": "a <image> <image> b"}, "has 2 marks '<image>', and the row has 1 pictures"),
        ({"correct_answer": "\ud800"}, "holds half of a surrogate pair"),
    ],
)
def test_questions_that_are_not_understood_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        question(**row)


def test_pictures_stand_at_their_marks_or_before_the_question() -> None:
    assert said(question(images=["b.png", "c.png"]))[0] == ("user", "###What?")
    found = question(question="first <image>, then <image>?", images=[b"x"])
    assert said(found)[0] == ("user", "first #, then #?") and found.images == ("a.png", b"x")
    assert question(image=None).images == ()


def test_an_answer_may_be_a_number_larger_than_floats_are() -> None:
    assert question(correct_answer=2**2000).answer == str(2**2000)


def test_a_question_with_an_empty_list_of_choices_has_none() -> None:
    """As columns of lists have it in tables where other questions have choices."""
    for choices in ([], "[]", None):
        assert said(question(choices=choices)) == [("user", "#What?"), ("assistant", "yes")]


def test_pictures_in_a_field_that_nobody_named_are_refused() -> None:
    """A model would be taught to answer without seeing them."""
    named = RowForm("vlm", "question", "correct_answer", image_keys=("photo",))
    row = {"question": "What?", "correct_answer": "yes", "image": "a.png"}
    with pytest.raises(BadRow, match=r"the row has 'image', and data\.image_keys names 'photo': its pictures would not be seen"):
        conversation(row, named)
    with pytest.raises(BadRow, match="the row has 'image', and"):
        picture_problem(row, named)
    # One that was chosen stands for the row, and a row may have none.
    assert conversation({**row, "photo": "b.png"}, named).images == ("b.png",)
    assert conversation({**row, "image": []}, named).images == ()
    with pytest.raises(BadRow, match=r"the row has 'image', which data\.type llm does not read: its pictures would not be seen; vlm reads"):
        conversation(row, RowForm("llm", "question", "correct_answer"))
    assert conversation({**row, "image": None}, RowForm("llm", "question", "correct_answer")).answer == "yes"
    with pytest.raises(BadRow, match=r"the row has 'images', and data\.image_keys names none"):
        conversation({"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": ["a"]}, RowForm("chat", "messages", ""))


def test_pictures_in_both_usual_fields_are_read_where_both_are_named_and_refused_where_one_is() -> None:
    """Some readers of such rows take `image`, others `images`; one field may repeat what the other has."""
    row = {"question": "What?", "correct_answer": "yes"}
    both = replace(VLM, image_keys=("image", "images"))
    assert conversation({**row, "image": "a.png", "images": ["b.png"]}, both).images == ("a.png", "b.png")
    for named, other in (("image", "images"), ("images", "image")):
        form = replace(VLM, image_keys=(named,))
        with pytest.raises(BadRow, match=rf"pictures in '{named}' and others in '{other}', which data\.image_keys does not name"):
            conversation({**row, named: ["a.png"], other: ["b.png"]}, form)
        assert conversation({**row, named: ["a.png", "b.png"], other: "b.png"}, form).images == ("a.png", "b.png")
    with pytest.raises(BadRow, match="pictures in 'images' and others in 'image'"):
        chat({"role": "user", "content": "what?"}, ANSWER, images=["a"], image="b")


def test_messages_of_ms_swift_and_of_datasets_mean_the_same() -> None:
    marks = chat({"role": "user", "content": "<image>what? <image>"}, ANSWER, images=["a", "b"])
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what? "}, {"type": "image"}]
    beside = chat({"role": "user", "content": parts}, ANSWER, images=["a", "b"])
    own = [{"type": "image", "image": "a"}, parts[1], {"type": "image_url", "image_url": {"url": "b"}}]
    inside = chat({"role": "user", "content": own}, {**ANSWER, "tool_calls": None})
    assert marks == beside == inside and marks.images == ("a", "b") and said(marks)[0] == ("user", "#what? #")
    # Datasets of transformers' examples count the row's pictures, and ms-swift and TRL put those without a mark before the first question.
    counted = [{"type": "image", "index": 0, "text": None}, {**parts[1], "index": None}, {"type": "image", "index": 1}]
    assert chat({"role": "user", "content": counted}, ANSWER, images=["a", "b"]) == marks
    twice = chat({"role": "user", "content": [*counted, counted[2], counted[0]]}, ANSWER, images=["a", "b"])
    assert twice.images == ("a", "b", "b", "a") and said(twice)[0] == ("user", "#what? ###")
    system, more = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "sure?"}
    unmarked = chat(system, {"role": "user", "content": "what?"}, ANSWER, more, ANSWER, images=["a", "b"])
    assert [text for _, text in said(unmarked)] == ["Be kind.", "##what?", "yes", "sure?", "yes"] and unmarked.images == ("a", "b")
    # Where a row has no pictures the mark is text; fields of tables that hold nothing change nothing.
    empty = {"videos": [], "audios": None, "tools": "[]", "objects": {"ref": [], "bbox": None}}
    assert said(chat({"role": "user", "content": "what is <image>?"}, ANSWER, **empty))[0] == ("user", "what is <image>?")


@pytest.mark.parametrize(
    ("messages", "row", "reason"),
    [
        ([{"role": "user", "content": "a"}], {}, "no message of the assistant is learned"),
        ([{"role": "user", "content": "a"}, {**ANSWER, "loss": False}], {}, "no message of the assistant is learned"),
        ([{"role": "human", "content": "a"}, ANSWER], {}, "message 0 has the role 'human'; it must be one of system, user"),
        ([{"role": "user", "content": "a"}, {**ANSWER, "tool_calls": [1]}], {}, "message 1 has 'tool_calls', which is not read"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}, ANSWER], {}, "message 0, part 0 is .*; parts are of type"),
        ([{"role": "user", "content": []}, ANSWER], {}, "`content` is a list; it must be a string or a list of parts"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}],
            {},
            "only be taught text",
        ),
        (
            [{"role": "user", "content": "<image>a"}, ANSWER],
            {"images": ["a", "b"]},
            "2 pictures in 'images', 1 marks '<image>' or image parts",
        ),
        ([{"role": "system", "content": "a"}, ANSWER], {"images": ["a"]}, "1 pictures in 'images', 0 marks '<image>' or image parts"),
        (
            [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "image", "index": 0}]}, ANSWER],
            {"images": ["a", "b"]},
            "2 pictures in 'images', 1 marks",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "index": 2}]}, ANSWER],
            {"images": ["a"]},
            "marks picture 2, and the row has 1 in",
        ),
        ([{"role": "user", "content": [{"type": "image", "index": -1}]}, ANSWER], {"images": ["a"]}, "an image part holds 'index'; one of"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], {}, "message 0 marks a picture, and the row has 0 in 'images'"),
        ([{"role": "user", "content": "a"}, ANSWER], {"videos": ["a"]}, "the row has 'videos', which is not read"),
        (
            [{"role": "user", "content": "<audio>"}, ANSWER],
            {"audios": ["a"], "tools": "[{}]"},
            "the row has 'audios', 'tools', which is not",
        ),
        (
            [{"role": "user", "content": "<bbox>"}, ANSWER],
            {"objects": {"bbox": [[1, 2, 3, 4]]}},
            "the row has 'objects', which is not read",
        ),
        (["hello"], {}, "message 0 is a string; it must be an object"),
    ],
)
def test_messages_that_are_not_understood_are_refused(messages: list[Any], row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        chat(*messages, **row)


def test_a_system_prompt_is_put_before_rows_without_one() -> None:
    form = RowForm("chat", "messages", "answer", system_prompt="Be kind.")
    user = {"role": "user", "content": "a"}
    own = {"role": "system", "content": "Be brief."}
    assert said(conversation({"messages": [user, ANSWER]}, form))[0] == ("system", "Be kind.")
    assert said(conversation({"messages": [own, user, ANSWER]}, form))[0] == ("system", "Be brief.")


def test_rows_of_text_are_documents() -> None:
    assert check_row({"text": "once", "url": "x"}, RowForm("text", "text", "")) == "once"
    with pytest.raises(BadRow, match="no field 'text'; it has 'content'"):
        check_row({"content": "once"}, RowForm("text", "text", ""))
    with pytest.raises(BadRow, match="expected an object, got a number"):
        check_row(7, VLM)
