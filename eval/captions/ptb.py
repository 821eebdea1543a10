"""Words of captions in plain Python, close to what the Penn Treebank tokenizer of CoreNLP 3.4.1 gives.

Close, not equal: scores from these words are not official numbers. Everything is lower-case, contractions are split
("is n't", "dog 's"), brackets become "-lrb-" and the like, and the punctuation that COCO's caption evaluation leaves
out is left out. Telephone numbers and smileys, for example, come out otherwise than there.
"""

from __future__ import annotations

import re

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_LEFT_OUT = frozenset("'`\"“”«»‹›.?!,:;-–—")
_SPELLINGS = str.maketrans({
    "’": "'", "‘": "'", "´": "´", "…": "...", "½": "1/2", "¼": "1/4", "¾": "3/4", "¢": "cents", "£": "#", "€": "$",
})  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " "}
_SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me",
    "'tis": "'t is", "'twas": "'t was", "more'n": "more 'n",
}  # fmt: skip

# Written with a full stop that belongs to them, wherever they stand.
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|drs|prof|rev|hon|pres|gov|gen|sen|capt|col|sgt|lt|jr|sr|st|rd|ave|blvd|ct|mt|ft|inc|co|corp|ltd|"
    "bros|dept|univ|est|vs|etc|jan|feb|aug|sept|oct|nov|dec|mon|tue|wed|thu|fri"
)
_WORD = r"[^\W_](?:\w*[^\W_])?(?:[.!?][^\W\d_]+)*"  # "shirt on.the" stays together
_NUMBER = r"\d+(?:[.,:]\d+)+"
_PATTERNS = {
    "tag": r"</?[^\W\d_]\w*>",
    "address": r"(?:https?://|www\.)[^\s\"<>]*[\w/]|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|[@#][^\W\d]\w*",
    "initials": r"(?:[^\W\d_]\.)+(?![^\W\d_]{2})(?:[^\W\d_](?!\w))?",
    "abbreviation": rf"(?:{_ABBREVIATIONS})\.(?!\w)|no\.(?=\s*\d)",
    "decade": r"'\d0s\b",
    "time": r"\d+:\d+(?=[^\W\d_])",
    "word": rf"(?:(?<![\w-])[-+](?=\d))?(?:{_NUMBER}|{_WORD}(?:/{_WORD})*)(?:-(?:{_NUMBER}|{_WORD}))*(?:'[^\W_]+)*",
    "short": r"'(?:tis|twas|em|cause|n|s|t|d|m|ll|re|ve)\b",
    "run": r"[!?]{2,}|_+",
    "sign": r"[^\s\w]",
}
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_CLITIC = re.compile(r"(.*[^\W\d_])(n't)|(.+)('(?:s|d|m|ll|re|ve))")
_WITH_APOSTROPHE = re.compile(r"(?:o|d|l|s|ma|ne)'[^\W_]+")
_AND = re.compile(r"(.+)'n'(.+)")


def tokenize(caption: str) -> list[str]:
    """Words of one caption; see the module's head.

    Args:
        caption: any text; line breaks count as spaces.
    """
    text = caption.translate(_SPELLINGS).lower()
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    text = "".join(letter for letter in text if ord(letter) < 0x10000)
    return [word for match in _TOKEN.finditer(text) for word in _words(match.lastgroup or "", match.group())]


def _words(kind: str, text: str) -> list[str]:
    if kind == "sign":
        return [] if text in _LEFT_OUT else [_BRACKETS.get(text, text)]
    if kind in ("word", "short"):
        return _split(text)
    return [text]


def _split(word: str) -> list[str]:
    """A word with its contractions apart."""
    if word in _SPLIT_WORDS:
        return _SPLIT_WORDS[word].split()
    if word.startswith("'") or "'" not in word:
        return [word]
    joined = _AND.fullmatch(word)
    if joined:
        return [joined[1], "'n'", joined[2]]
    clitic = _CLITIC.fullmatch(word)
    if clitic:
        stem, ending = (part for part in clitic.groups() if part)
        return [*_split(stem), ending]
    return [word] if _WITH_APOSTROPHE.fullmatch(word) else word.split("'")
