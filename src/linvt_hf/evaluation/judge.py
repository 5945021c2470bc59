"""
Open-ended answers judged by a language model, by the protocol of Video-ChatGPT (arXiv 2306.05424): does the answer
mean what the right one means, yes or no, and how well from 0 to 5.

Its figures depend on the judge: the same answers got 35 and 44 % from two versions of one model (issue 28 of
Video-ChatGPT's repository). So a result names its judge, and results of different judges cannot be compared.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from openai import OpenAI, OpenAIError

GIVE_UP = 20  # ours
# What the protocol asks for, in words of our own.
_SYSTEM = (
    "You check answers to questions about videos. Compare a predicted answer with the correct one and decide whether "
    "they mean the same. Synonyms and paraphrases count as the same; what a predicted answer says beside the correct "
    "one counts only if it contradicts it."
)
_TASK = (
    "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n\n"
    'Reply with one JSON object and nothing else: {{"pred": "yes" or "no", "score": a whole number from 0 to 5}}. '
    '"pred" says whether the predicted answer is correct; "score" is 5 if it means exactly the same, 0 if it has '
    "nothing to do with it."
)


@dataclass(frozen=True)
class Verdict:
    """
    correct: what the judge said; None if it said nothing that can be read, and `error` tells what happened.
    score: 0 to 5.
    """

    correct: bool | None = None
    score: int | None = None
    error: str | None = None
    reply: str = ""


class Judge:
    """
    A chat model behind an OpenAI-compatible URL.

    Args:
        url: of the API, such as `http://localhost:8000/v1`.
        model: its name there.
        key: for a server that wants one; else the environment's OPENAI_API_KEY.
        at_once: requests that are under way together.
        tries: of a judge that says what cannot be read; 3 are ours, the protocol asks for ever. A server that does not
            answer is tried again as often by the client.
        timeout: seconds for one reply.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        at_once: int = 8,
        tries: int = 3,
        timeout: float = 60.0,
    ):
        key = key or os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own want none
        self.client = OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=tries - 1)
        self.model, self.at_once, self.tries = model, at_once, tries
        self._silent = 0  # requests in a row without a reply

    def verdicts(self, asked: Iterable[tuple[str, str, str]]) -> Iterator[Verdict]:
        """Of each (question, right answer, prediction), in order. An empty prediction is wrong without being asked."""
        with ThreadPoolExecutor(self.at_once) as pool:
            yield from pool.map(lambda one: self.verdict(*one), asked)

    def verdict(self, question: str, answer: str, prediction: str) -> Verdict:
        if not prediction.strip():
            return Verdict(correct=False, score=0)
        verdict = Verdict(error=f"The judge was given up: {GIVE_UP} requests in a row had no reply.")
        for _ in range(self.tries if self._silent < GIVE_UP else 0):
            verdict = self._ask(_TASK.format(question=question, answer=answer, prediction=prediction))
            if verdict.correct is not None or not verdict.reply:
                break
        return verdict

    def _ask(self, task: str) -> Verdict:
        try:
            response = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task}],
                temperature=0,
                max_tokens=64,
            )
            reply = response.choices[0].message.content or ""
        except (OpenAIError, IndexError, AttributeError, TypeError) as error:  # nothing, or what is no reply at all
            self._silent += 1
            return Verdict(error=f"The judge does not answer: {' '.join(str(error).split())}")
        self._silent = 0
        return read_verdict(reply)


def read_verdict(reply: str) -> Verdict:
    """
    Of a reply that holds a JSON object, or a Python dict, with `pred` "yes" or "no" and `score` 0 to 5, which may have
    decimals that are cut off, as in the protocol.
    """
    fields = dict(re.findall(r"""['"]?(pred|score)['"]?\s*:\s*['"]?\s*([A-Za-z]+|\d+(?:\.\d+)?)""", reply))
    said = fields.get("pred", "").lower()
    score = fields.get("score", "")
    if said not in ("yes", "no") or not re.fullmatch(r"[0-5](\.\d+)?", score) or float(score) > 5:
        return Verdict(error=f"The judge's reply cannot be read: {json.dumps(reply[:200])}", reply=reply or " ")
    return Verdict(correct=said == "yes", score=int(float(score)), reply=reply)


def judged(verdicts: list[Verdict]) -> dict[str, float | int]:
    """
    Accuracy (0 to 1, of those with a verdict, as the protocol has it), mean score (0 to 5) and how many had none.
    """
    counted = [verdict for verdict in verdicts if verdict.correct is not None]
    if not counted:
        return {"judged": 0, "unjudged": len(verdicts)}
    return {
        "judge_accuracy": sum(verdict.correct for verdict in counted) / len(counted),
        "judge_score": sum(verdict.score for verdict in counted) / len(counted),
        "judged": len(counted),
        "unjudged": len(verdicts) - len(counted),
    }
