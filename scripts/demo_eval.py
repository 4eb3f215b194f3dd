"""What the demo model can do, in numbers: held-out loss, copying of unseen names, and the golden prompts."""

from random import Random

import torch
from demo_dialogues import Turn
from demo_facts import DAYS, FACTS, LISTS, MONTHS
from demo_training import Batch, Model, distillation_loss, token_loss
from demo_words import invented, series
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def fact(question: str) -> Turn:
    """The fixed answer to one of the FAQ's phrasings."""
    return Turn(question, next(answer for phrasings, answer in FACTS if question in phrasings))


def golden_candidates() -> list[Turn]:
    """Prompts fit for READMEs and tests; those that the model answers word for word become golden.json."""
    asked = [
        *["How does specexec work?", "What is specexec?", "What is a drafter?", "What is a tree?", "What is a sweep?"],
        *["What is offloading?", "What is speculative decoding?", "Is the output exact?", "What is a token?"],
        *["Do I need a GPU?", "What are you?", "What can you do?", "How do I use a real model?"],
        *["Why is a large model slow?", "Can I trust you?", "Hello"],
    ]
    named = {names[0]: f"{lead} {series(items)}." for names, items, lead in LISTS}
    return [
        *[fact(question) for question in asked],
        *[Turn(f"List {name}.", answer) for name, answer in named.items()],
        Turn("Count to 10.", ", ".join(map(str, range(1, 11))) + "."),
        Turn("Count down from 5.", "5, 4, 3, 2, 1."),
        Turn("Repeat after me: apple river stone", "apple river stone"),
        Turn("Repeat after me: silver dragon Torvik magnet", "silver dragon Torvik magnet"),
        Turn("Say lemon three times.", "lemon, lemon, lemon."),
        Turn("Reverse these words: apple river stone", "stone river apple"),
        Turn("Spell lemon.", "lemon is spelled L-E-M-O-N."),
        Turn("What is 2 + 3?", "2 + 3 = 5."),
        Turn("What is 7 + 12?", "7 + 12 = 19."),
        Turn("What is 6 times 8?", "6 times 8 is 48."),
        Turn("What day comes after Tuesday?", f"{DAYS[2]} comes after Tuesday."),
        Turn("What month comes before May?", f"{MONTHS[3]} comes before May."),
    ]


def copying_candidates(count: int = 200) -> list[Turn]:
    """Copies of invented names that training never showed."""
    rng = Random(7)
    turns = []
    for index in range(count):
        name, other = invented(rng, unseen=True), invented(rng, unseen=True)
        turns += [
            [Turn(f"Repeat after me: {name} {other}", f"{name} {other}")],
            [Turn(f"My name is {name}.", f"Hello, {name}! Nice to meet you.")],
            [Turn(f"What is the last word of: {other} {name}", f"The last word is {name}.")],
            [Turn(f"Say {other} twice.", f"{other}, {other}.")],
        ][index % 4]
    return turns


def small_sums(count: int) -> list[Turn]:
    """Small sums, most of them seen in training: this measures memory, not arithmetic."""
    rng = Random(8)
    pairs = [(rng.randint(0, 20), rng.randint(0, 20)) for _ in range(count)]
    return [Turn(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.") for a, b in pairs]


def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    sample: bool = False,
    limit: int = 120,
) -> list[str]:
    """What the model says to each question, through the chat template; greedy unless asked to sample."""
    said: list[str] = []
    for start in range(0, len(questions), 50):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + 50]]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        asked = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            # Temperature 1: the drafter must know what the target says when chance has a hand in it.
            out: Tensor = model.generate(  # type: ignore[misc, assignment]  # typed for another self
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                max_new_tokens=limit,
                do_sample=sample,
                temperature=1.0 if sample else None,
                top_k=0 if sample else None,
            )
        said += tokenizer.batch_decode(out[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def word_for_word(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: list[Turn], limit: int = 120
) -> list[bool]:
    """Which turns the model answers exactly as we want, greedily."""
    said = answers(model, tokenizer, [turn.question for turn in turns], limit=limit)
    return [text == turn.answer for text, turn in zip(said, turns, strict=True)]


@torch.no_grad()
def mean_loss(model: Model, batches: list[Batch], device: str, teacher: Model | None = None) -> float:
    """Nats per token over these batches: against the text, or the KL to a teacher."""
    losses = [
        distillation_loss(model, teacher, batch, device) if teacher else token_loss(model, batch, device)
        for batch in batches
    ]
    return round(float(torch.stack(losses).mean()), 4)
