"""The cards in `model_cards/`: what they say of checkpoints is what the writers of the tests know of them."""

import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_originals import CASES

CARDS = Path(__file__).parent.parent / "model_cards"
ROWS = {
    cells[0].strip("` "): (card, [cell.strip() for cell in cells[1:]])
    for card in sorted(CARDS.glob("*.md"))
    for line in card.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
    for cells in [line.strip("|").split("|")]
}


@pytest.mark.parametrize(
    "card", [card for card in CARDS.glob("*.md") if card.name != "README.md"], ids=lambda c: c.stem
)
def test_what_the_hub_reads(card):
    data = ModelCard.load(card).data
    assert data.library_name == "transformers" and data.pipeline_tag == "video-text-to-text"
    assert data.base_model == [base for base, (its_card, _) in ROWS.items() if its_card == card]
    licences = {licence for its_card, (*_, licence) in ROWS.values() if its_card == card}
    assert data.license in licences


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_licence_of_a_checkpoint(name):
    facts = CASES[name].CHECKPOINTS[name]
    _, (_, parameters, licence) = ROWS[facts.repo]
    counted = sum(map(math.prod, CASES[name].shapes(CASES[name].published_config(name)).values()))
    assert parameters == f"{counted:,}" and licence == facts.licence
