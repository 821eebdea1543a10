"""Words as the PTB tokenizer finds them; what is expected came from that tokenizer itself."""

from __future__ import annotations

import pytest

from eval.captions.ptb import tokenize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The man's dog isn't here.", "the man 's dog is n't here"),
        ("don't can't won't I'm you've they'll he'd", "do n't ca n't wo n't i 'm you 've they 'll he 'd"),
        ("cannot gonna 'tis o'clock ma'am rock'n'roll", "can not gon na 't is o'clock ma'am rock 'n' roll"),
        ("mr. smith, st. john ave. in the u.s. at 5 p.m.", "mr. smith st. john ave. in the u.s. at 5 p.m."),
        ("a mon. and the no. 5, but no.", "a mon. and the no. 5 but no"),
        ("black/white, 1/2 & red* 50% $5 #5 #tag", "black/white 1/2 & red * 50 % $ 5 # 5 #tag"),
        ('(the man) [x] "quoted" “curly” it’s', "-lrb- the man -rrb- -lsb- x -rsb- quoted curly it 's"),
        ("wait... what?! -- yes - no – em… stop!!!", "wait what ?! yes no em stop !!!"),
        ("a t-shirt, a 10-year-old well-known x-ray", "a t-shirt a 10-year-old well-known x-ray"),
        ("1,000 people 3.5 12:30 2:30pm 10am 1990s '90s", "1,000 people 3.5 12:30 2:30 pm 10am 1990s '90s"),
        ("no shirt on.the dog.  Another, one", "no shirt on.the dog another one"),
        ("dogs' players' 5'10\" men's & women's", "dogs players 5 10 men 's & women 's"),
        ("the letter A. sign:red;blue 72.2/67.8", "the letter a. sign red blue 72.2 / 67.8"),
        ("café São 中文 😀 ok a_b http://x.com/a me@x.com", "café são 中文 ok a_b http://x.com/a me@x.com"),
        (" . ", ""),
        ("", ""),
    ],
)
def test_words(text, words):
    assert tokenize(text) == words.split()


def test_line_breaks_are_spaces():
    assert tokenize("A dog\non grass.\n") == ["a", "dog", "on", "grass"]
