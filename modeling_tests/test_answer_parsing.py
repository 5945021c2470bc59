"""What answers in a model's words are taken to say."""

import pytest

from linvt_hf.evaluation.parsing import choice_in, contains, exact_match, letters_in, normalised, number_in, token_f1

OPTIONS = ["a red ball", "the dark red ball", "Nothing.", "He opens the door", "blue"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # a letter and nothing else
        ("B", "B"),
        ("b", "B"),
        (" (b) \n", "B"),
        ("**C**", "C"),
        ("**C.**", "C"),
        ('"D"', "D"),
        ("[E]", "E"),
        ("A.", "A"),
        # a letter that is marked, and more
        ("B. the dark red ball", "B"),
        ("(B) a red ball", "B"),  # the letter goes before the text
        ("c) nothing happens", "C"),
        ("D: because he opens it", "D"),
        ("A.\nThe video shows B and C.", "A"),
        # named
        ("The answer is D.", "D"),
        ("The correct answer is: (D)", "D"),
        ("Answer: b", "B"),
        ("the correct option would be **C**", "C"),
        ("First I thought the answer is A, but the answer is C.", "C"),
        ("I choose option E because of its colour", "E"),
        ("The best choice is A", "A"),
        ("The answer is A because it is red", "A"),
        ("Answer: A man walks", None),
        ("The answer is not A, it is B", None),
        ("The answer is a red ball", "A"),  # an article, and the option's text
        ("The answer is a blue one", "E"),
        ("The answer is A or B", None),
        ("The answer is either A or B", None),
        ("Answer: A and C", None),
        ("(A) or (B)", None),
        ("B and C are alike. The answer is B.", "B"),
        # in brackets
        ("It must be (D)", "D"),
        ("Either (A) or (B)", None),
        # texts of options
        ("blue", "E"),
        ("It is a Red Ball!", "A"),
        ("dark red ball", "B"),  # not A, which it holds
        ("red ball", "A"),
        ("nothing", "C"),
        ("he opens the door slowly", "D"),
        ("a red ball, then nothing", None),
        # a letter by itself
        ("I think B", "B"),
        ("A man walks in", None),
        ("I see E", "E"),
        ("B or C", None),
        ("A or B", None),
        ("A and B are both correct", None),
        ("A is right", "A"),
        ("Neither A nor C", None),
        ("It is not B.", None),
        ("I don't know", None),
        # nothing
        ("", None),
        ("F", None),
        ("yes", None),
        ("red", None),
        ("All of them", None),
    ],
)
def test_which_option(text, letter):
    number = choice_in(text, OPTIONS)
    assert (None if number is None else "ABCDE"[number]) == letter


def test_options_that_are_alike():
    assert choice_in("two", ["1", "2", "3"]) == 1
    assert choice_in("2", ["one", "two", "three"]) == 1
    assert choice_in("red", ["red", "red"]) is None
    assert choice_in("yes", ["yes", "no"]) == 0
    assert choice_in("No, it does not", ["yes", "no"]) == 1
    assert choice_in("not red", ["red", "not red"]) == 1
    assert choice_in("A", []) is None
    assert choice_in("I", ["x"] * 9) == 8  # it is a letter if it is all there is


@pytest.mark.parametrize(
    ("prompt", "letters"),
    [
        ("What?\nA. red\nB. blue\nAnswer with the letter.", "AB"),
        ("Question: What?\nOption:\n(A) red\n(B) blue\n(C) green\nOnly give the best option.", "ABC"),
        ("Example\nA. x\nB. y\n\nWhat?\nA) red\nB) blue\nC) green", "ABC"),
        ("What is in\nA. the left", ""),
        ("What?\nB. red\nC. blue", ""),
        ("What?\nA. red\nC. blue", ""),
        ("What does the man do?", ""),
        ("A man: what does he do?\nB", ""),
    ],
)
def test_letters_of_a_prompt(prompt, letters):
    assert letters_in(prompt) == list(letters)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4),
        ("four", 4),
        ("There are 12 of them.", 12),
        ("Three times, yes three", 3),
        ("twice", 2),
        ("none", 0),
        ("about 1,234 of them", 1234),
        ("10²", None),
        ("3 or 4", None),
        ("many", None),
        ("", None),
    ],
)
def test_which_number(text, number):
    assert number_in(text) == number


def test_open_answers():
    assert normalised("  The man's  DOG, a-barking!  two ") == "man dog barking 2"
    assert exact_match("A dog.", "dog") and not exact_match("dogs", "dog")
    assert contains("It is a small dog.", "small dog") and not contains("It is a smaller dog", "small dog")
    assert not contains("anything", "the")  # of which nothing is left
    assert token_f1("a small brown dog", "the dog") == pytest.approx(2 * 1 / (3 + 1))
    assert token_f1("cat", "dog") == 0.0 and token_f1("dog dog", "dog") == pytest.approx(2 / 3)
    assert token_f1("the", "a") == 1.0  # both empty
