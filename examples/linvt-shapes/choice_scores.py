"""How likely a model finds each of some answers to a prompt."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Inputs of which a sample has one row.
_ROW_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "video_embeds"}


def score_choices(model, tokenizer, features: dict, options: list[str]) -> list[dict]:
    """
    The options of one input, best first: dicts with `answer`, `log_likelihood` and `score`, a softmax over these. Its
    videos are condensed once; its options run as one batch.
    """
    nested = any(one != other and other.startswith(one) for one in options for other in options)
    features.pop("labels", None)  # some bases' processors add them
    videos = model.take_video_inputs(features)
    if videos:
        features["video_embeds"] = model.get_video_features(**videos).pooler_output
    if features.keys() <= _ROW_INPUTS:
        scores = log_likelihoods(model, tokenizer, features, options, nested)
    else:  # an image is no row of the batch, and cannot be repeated for each option like one
        each = [log_likelihoods(model, tokenizer, dict(features), [option], nested) for option in options]
        scores = torch.cat(each)
    rows = zip(options, scores.softmax(dim=0).tolist(), scores.tolist(), strict=True)
    answers = [{"answer": option, "score": share, "log_likelihood": score} for option, share, score in rows]
    return sorted(answers, key=lambda answer: answer["score"], reverse=True)


def log_likelihoods(model, tokenizer, features: dict, options: list[str], to_the_end: bool = False) -> Tensor:
    """Mean log-probability of each option's tokens after the prompt, and of the answer's end if asked for, [K]."""
    input_ids = features.pop("input_ids")  # [1, S]
    # An option stands after the prompt as it would in running text.
    space = "" if tokenizer.decode(input_ids[0, -1:])[-1:].isspace() else " "
    rows = [tokenizer(space + option, add_special_tokens=False)["input_ids"] for option in options]
    if not all(option.strip() for option in options):
        raise ValueError(f"A choice has no words: {options}.")
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(input_ids.device)  # [K, L]
    real = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).to(input_ids.device)

    input_ids, inputs = model._expand_inputs_for_generation(len(rows), input_ids=input_ids, **features)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            answer_type = torch.full_like(ids, model.image_llm.answer_token_type)
            inputs[name] = torch.cat([inputs[name], answer_type], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real.to(inputs["attention_mask"])], dim=1)
    logits = model(torch.cat([input_ids, ids], dim=1), **inputs, logits_to_keep=ids.shape[1] + 1).logits
    log_probability = logits.float().log_softmax(dim=-1)  # [K, L + 1, vocabulary]
    chosen = log_probability[:, :-1].gather(2, ids[..., None])[..., 0]  # [K, L]
    total, count = (chosen * real).sum(dim=1), real.sum(dim=1)
    stops = model.generation_config.eos_token_id
    if to_the_end and stops is not None:
        after = log_probability[torch.arange(len(ids), device=ids.device), count.long()]  # [K, vocabulary]
        total, count = total + after[:, torch.tensor(stops).reshape(-1)].logsumexp(dim=1), count + 1
    return total / count


__all__ = ["log_likelihoods", "score_choices"]
