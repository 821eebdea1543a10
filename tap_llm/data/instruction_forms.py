"""How questions about regions are worded: {0} and {1} stand for regions, {list} for all of them, {v} for a value."""

from __future__ import annotations

_IS_RELATED = ("Is {0} {v} {1}?", "Does {0} lie {v} {1}?", "Is it true that {0} is {v} {1}?")

FORMS: dict[str, tuple[str, ...]] = {
    "name": (
        "What is {0}?",
        "What does {0} show?",
        "Name {0}.",
        "What do you see in {0}?",
        "What can be seen in {0}?",
        "Tell me what {0} is.",
    ),
    "describe": ("Describe {0} in detail.", "Describe {0} in full.", "What is {0}, what does it look like, and where?"),
    "caption": ("Describe {0} briefly.", "Give {0} a short caption.", "Describe {0} in a few words."),
    "colour": ("What colour is {0}?", "Which colour does {0} have?", "What is the main colour of {0}?"),
    "shape": ("What shape is {0}?", "Which shape does {0} have?", "Name the shape of {0}."),
    "texture": ("What texture does {0} have?", "What is the texture of {0}?", "How is {0} patterned?"),
    "size": ("Is {0} small, medium or large?", "What size is {0}: small, medium or large?"),
    "place": (
        "Where is {0}?",
        "Where in the picture is {0}?",
        "In which part of the picture is {0}?",
        "Where does {0} lie?",
    ),
    "kind": ("Which kind of thing is {0}?", "What kind of thing does {0} show?", "To which kind does {0} belong?"),
    "left_right": (
        "Is {0} to the left or to the right of {1}?",
        "Is {0} left or right of {1}?",
        "On which side of {1} is {0}, left or right?",
    ),
    "above_below": ("Is {0} above or below {1}?", "Is {0} higher or lower than {1}: above or below?"),
    "further": ("Which is further to the {v}, {0} or {1}?", "Which one lies more to the {v}: {0} or {1}?"),
    "higher": ("Which is {v} in the picture, {0} or {1}?", "Which one lies {v}: {0} or {1}?"),
    "larger": (
        "Which covers more of the picture, {0} or {1}?",
        "Which is larger, {0} or {1}?",
        "Which of {0} and {1} is bigger?",
    ),
    "smaller": (
        "Which covers less of the picture, {0} or {1}?",
        "Which is smaller, {0} or {1}?",
        "Which of {0} and {1} takes up less room?",
    ),
    "count": ("How many of {list} {v}?", "Of {list}, how many {v}?", "Count those of {list} that {v}."),
    "is_name": ("Is {0} {v}?", "Does {0} show {v}?", "Can {v} be seen in {0}?", "Would you call {0} {v}?"),
    "is_colour": ("Is {0} {v}?", "Is the main colour of {0} {v}?", "Does {0} look mostly {v}?"),
    "is_texture": ("Is {0} {v}?", "Is the texture of {0} {v}?", "Would you call {0} {v}?"),
    "is_place": ("Is {0} {v}?", "Does {0} lie {v}?", "Is it true that {0} is {v}?"),
    "is_left_right": _IS_RELATED,
    "is_above_below": _IS_RELATED,
    "is_larger": ("Is {0} {v} than {1}?", "Is it true that {0} is {v} than {1}?", "Does {0} look {v} than {1}?"),
    "same_kind": ("Are {0} and {1} the same kind of thing?", "Do {0} and {1} show things of one kind?"),
    "same_colour": ("Are {0} and {1} of the same colour?", "Do {0} and {1} have the same colour?"),
}
