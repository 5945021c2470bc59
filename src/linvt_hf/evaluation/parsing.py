"""
What an answer in a model's words says: which option, which number, which words.

The rules are written down with each function, and none of them guesses: an answer that says nothing clear is None,
counts as wrong, and is counted as unclear.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ARTICLES = {"a", "an", "the"}
_NO_NOUN = r"(?:is|was|are|would|must|should|seems|because|since|as|and|or|nor|but)"  # after A, which is a letter then
# "the answer is (B)", "Option B", "I choose b": what comes right after such a word is meant as a letter.
_NAMED = r"(?i:\b(?:answer|option|choice|choose|select|pick)\b(?:\s+(?:is|would be|must be|should be|option))*)"


def choice_in(text: str, options: Sequence[str]) -> int | None:
    """
    The option that an answer to a multiple-choice question chooses, by its number; None where that is unclear.

    Args:
        options: their texts, without letters, in the order of their letters A, B, C, ...

    The first of these rules that finds something decides; if it finds two options, the answer is unclear.

    1. The answer is a letter and nothing else, bare, in brackets or marked: `B`, `(b)`, `**B.**`.
    2. It begins with a letter that is marked as one: `B. a dog`, `(B) a dog`, `b) a dog`, `B: a dog`.
    3. It names a letter after "answer", "option", "choice", "choose", "select" or "pick", also with "is" between: the
       last that is so named, since a model that thinks aloud comes to its answer at the end. `A or B` is unclear.
    4. Letters in brackets, anywhere: `It must be (B)`.
    5. It is the text of an option, but for case, punctuation and articles; or holds such texts as whole words. Of
       two options of which one holds the other, the longer counts.
    6. A capital letter by itself, anywhere, that is no word, as `I` is, or `A` before a noun; nothing where one is
       denied, as in `not B`.
    """
    if not options:
        return None
    known = LETTERS[: len(options)]
    plain = text.strip().strip("*_`\"' \n")
    letter = rf"([{known}{known.lower()}])"
    another = rf"\s*[)\]]?\s*(?:/|\b(?:and|or)\b)\s*\**[(\[]?{letter}(?![\w'’])"  # beside the one before
    if match := re.fullmatch(rf"[(\[<]?\s*{letter}\s*[)\]>]?\s*[.:,;!)]*", plain):
        return known.index(match[1].upper())
    if match := re.match(rf"(?:[(\[]\s*{letter}\s*[)\]]|{letter}\s*[.:)](?=\s|\**\s|$))", plain):
        return None if re.match(another, plain[match.end() :]) else known.index((match[1] or match[2]).upper())
    if named := _named(plain, letter, another):
        return None if named[-1] is None else known.index(named[-1].upper())
    if found := {each.upper() for each in re.findall(rf"[(\[]{letter}[)\]]", plain)}:
        return known.index(found.pop()) if len(found) == 1 else None
    if found := _options_in(plain, options):
        return found.pop() if len(found) == 1 else None
    alone = set(re.findall(rf"(?<![\w'’])([{known}])(?![\w'’])", plain))
    if "A" in alone and re.search(rf"(?<![\w'’])A\s+(?!{_NO_NOUN}\b)\w", plain):
        alone.discard("A")
    if re.search(rf"(?i:\bnot|n['’]t|\bneither|\bnor)\s+(?i:option\s+)?[{known}](?![\w'’])", plain):
        return None
    alone.discard("I")
    return known.index(alone.pop()) if len(alone) == 1 else None


def _named(text: str, letter: str, another: str) -> list[str | None]:
    """Letters that are named as the answer; None where two are at once."""
    named = re.finditer(rf"{_NAMED}(\s*[:=]\s*|\s+)\**[(\[]?{letter}\b(?!['’])(?:{another}|(\s+\w))?", text)
    found = [match.groups() for match in named]
    # Not the article of "the answer is a dog" or "Answer: A dog"; but the letter of "the answer is A because ...".
    return [
        None if other else said
        for before, said, other, word in found
        if not (word and (said == "a" or (said == "A" and before.strip())))
    ]


def _options_in(text: str, options: Sequence[str]) -> set[int]:
    words = [normalised(option).split() for option in options]
    said = normalised(text).split()
    if equal := {number for number, option in enumerate(words) if option == said}:
        return equal
    found = {number for number, option in enumerate(words) if option and _holds(said, option)}
    return {
        number
        for number in found
        if not any(words[number] != words[other] and _holds(words[other], words[number]) for other in found)
    }


def _holds(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def letters_in(prompt: str) -> list[str]:
    """
    The letters of a prompt's options: of lines that begin with `A.`, `(A)`, `A)` or `A:`, if they are A, B, ... in
    order; [] where it has no such options. Of several such lists the last counts.
    """
    marked = re.findall(r"^\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*\S", prompt, flags=re.MULTILINE)
    letters = [first or second for first, second in marked]
    if "A" not in letters:
        return []
    last = letters[len(letters) - 1 - letters[::-1].index("A") :]
    return last if len(last) > 1 and last == list(LETTERS[: len(last)]) else []


def number_in(text: str) -> int | None:
    """
    The whole number that an answer says, in digits or, up to twelve, in words ("twice" is 2, "once" 1, "no" 0); None
    where it says none or two different ones.
    """
    words = normalised(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)).split()
    found = {int(word) for word in words if word.isdecimal()}
    found |= {{"once": 1, "twice": 2, "no": 0, "none": 0, "never": 0}[w] for w in words if w in _COUNTED}
    return found.pop() if len(found) == 1 else None


_COUNTED = {"once", "twice", "no", "none", "never"}


def normalised(text: str) -> str:
    """Lower case, numbers up to twelve in digits, without punctuation and articles, one space between words."""
    words = re.sub(r"[^\w\s]", " ", text.lower().replace("'s", "").replace("’s", "")).replace("_", " ").split()
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words if word not in _ARTICLES)


def exact_match(text: str, answer: str) -> bool:
    """Whether an open answer is the right one, but for what `normalised` takes away."""
    return normalised(text) == normalised(answer)


def contains(text: str, answer: str) -> bool:
    """Whether an open answer holds the right one as whole words: for models that answer in sentences."""
    right = normalised(answer).split()
    return bool(right) and _holds(normalised(text).split(), right)


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts it, of `normalised` texts; 0 to 1."""
    said, right = Counter(normalised(text).split()), Counter(normalised(answer).split())
    shared = sum((said & right).values())
    return 2 * shared / (sum(said.values()) + sum(right.values())) if shared else float(said == right)
