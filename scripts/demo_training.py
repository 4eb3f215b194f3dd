"""How the demo pair is trained: tokenizer, packed rows, one loop for the target and one for its drafters.

Knows what a conversation is and nothing of files that are shipped.   B rows   T tokens   N scored tokens   V vocabulary
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from demo_dialogues import Turn
from demo_facts import SYSTEM_PROMPTS
from inflation import Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3NextForCausalLM

CONTEXT = 2048
SHORT = 256
LONG_EVERY = 10  # every tenth batch has rows of the full context
DOCS_SHARE = 0.22
MATRIX_RATE, OTHER_RATE = 0.02, 4e-3
VOCABULARY = 4096
USER, ASSISTANT, SYSTEM, END = SPECIALS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
# Nothing is trimmed, so the rendering of a longer conversation starts with the tokens of the shorter one.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the demo knows the roles system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


Model = LlamaForCausalLM | Qwen3NextForCausalLM

HEAD = 32  # as wide in every model, so that the pair can be inflated to any Llama
TARGET = Shape(hidden=192, layers=5, heads=6, kv_heads=3, head_dim=HEAD, ff=512, tied=True)
DRAFTERS = {
    "drafter": Shape(hidden=64, layers=3, heads=2, kv_heads=1, head_dim=HEAD, ff=192, tied=True),
    "weak": Shape(hidden=32, layers=1, heads=1, kv_heads=1, head_dim=HEAD, ff=64, tied=True),
    "strong": Shape(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=HEAD, ff=384, tied=True),
}


class Batch(NamedTuple):
    """Rows of tokens and which of them are to be predicted."""

    ids_BT: Tensor
    scored_BT: Tensor


@dataclass(frozen=True)
class Trained:
    """What a training run left behind, for the manifest."""

    steps: int = 0
    tokens: int = 0
    loss: float = 0.0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stay alone, because sums are easier that way."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIALS[:3],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of this shape."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_docs(tokenizer: PreTrainedTokenizerFast, docs: list[str]) -> list[int]:
    """All documents as one row of tokens, each closed by its end."""
    encoded = tokenizer.backend_tokenizer.encode_batch(docs)
    return [token for encoding in encoded for token in [*encoding.ids, SPECIALS.index(END)]]


class Rows:
    """An endless, reproducible supply of batches: packed conversations and stretches of documentation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, docs: list[int], talks: Iterator[list[Turn]], seed: int
    ) -> None:
        self._fast = tokenizer.backend_tokenizer
        self._special = list(range(len(SPECIALS)))  # the trainer puts them first
        self._docs, self._talks = docs, talks
        self._rng = Random(seed + 1)

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Training batches of `tokens` tokens, or of one row where a row is longer."""
        step = 0
        while True:
            step += 1
            length = CONTEXT if step % LONG_EVERY == 0 else SHORT
            yield self.batch(max(tokens // length, 1), length)

    def batch(self, rows: int, length: int, docs_share: float = DOCS_SHARE) -> Batch:
        """`rows` rows of `length` + 1 tokens; whole rows are either conversation or documentation."""
        chance = (self._rng.random() for _ in range(rows))
        pairs = [self._doc(length + 1) if pick < docs_share else self._talk(length + 1) for pick in chance]
        return Batch(torch.tensor([ids for ids, _ in pairs]), torch.tensor([scored for _, scored in pairs]))

    def turn(self, turn: Turn) -> tuple[list[int], list[bool]]:
        """A turn as the chat template renders it; only the answer and its end are scored."""
        user, assistant, _, end = self._special
        question, answer = (self._fast.encode(text).ids for text in (turn.question, turn.answer))
        asked = [user, *question, end, assistant]
        return [*asked, *answer, end], [False] * len(asked) + [True] * (len(answer) + 1)

    def _doc(self, length: int) -> tuple[list[int], list[bool]]:
        start = self._rng.randrange(len(self._docs) - length)
        return self._docs[start : start + length], [True] * length

    def _talk(self, length: int) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        scored: list[bool] = []
        if self._rng.random() < 0.1:
            ids = [self._special[2], *self._fast.encode(self._rng.choice(SYSTEM_PROMPTS)).ids, self._special[3]]
            scored = [False] * len(ids)
        while len(ids) < length:
            for turn in next(self._talks):
                more, marks = self.turn(turn)
                ids, scored = ids + more, scored + marks
        return ids[:length], scored[:length]


def optimisers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (far fewer tokens to the same loss than AdamW), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, ns_steps=4)
    return [muon, torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.01)]


def rate(step: int, steps: int) -> float:
    """Warm up, stay, and fall to zero over the last two fifths; the plateau does not depend on `steps`."""
    return min((step + 1) / 30, 1.0, (steps - step) / (0.4 * steps))


def scored_hidden(model: Model, batch: Batch, device: str) -> Tensor:
    """Final hidden states of the positions whose next token is scored: the head is a quarter of the work."""
    ids_BT = batch.ids_BT[:, :-1].to(device)
    # float32 on CPU: without AVX-512 BF16 a bf16 step took 2.6 times as long.
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(ids_BT, use_cache=False).last_hidden_state
    picked: Tensor = hidden[batch.scored_BT[:, 1:].to(device)]
    return picked


def token_loss(model: Model, batch: Batch, device: str) -> Tensor:
    """Mean negative log-likelihood, in nats, of the scored tokens."""
    logits_NV = model.lm_head(scored_hidden(model, batch, device).float())
    return cross_entropy(logits_NV, batch.ids_BT[:, 1:][batch.scored_BT[:, 1:]].to(device))


def distillation_loss(student: Model, teacher: Model, batch: Batch, device: str) -> Tensor:
    """Mean KL(target, drafter) over the scored positions."""
    with torch.no_grad():
        wanted_NV = log_softmax(teacher.lm_head(scored_hidden(teacher, batch, device).float()), dim=-1)
    guessed_NV = log_softmax(student.lm_head(scored_hidden(student, batch, device).float()), dim=-1)
    return kl_div(guessed_NV, wanted_NV, reduction="batchmean", log_target=True)


def fit(
    model: Model,
    batches: Iterator[Batch],
    steps: int,
    device: str,
    checkpoint: Path,
    teacher: Model | None = None,
) -> Trained:
    """Train for exactly `steps` steps; an interrupted run continues from its last checkpoint, on the same batches."""
    opts = optimisers(model)
    done = Trained()
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(state)
        done = Trained(**saved["done"])
        for _ in range(done.steps):
            next(batches)
    model.train()
    with tqdm(total=steps, initial=done.steps, desc=checkpoint.stem, mininterval=5) as bar:
        while done.steps < steps:
            batch = next(batches)
            loss = distillation_loss(model, teacher, batch, device) if teacher else token_loss(model, batch, device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt, lr in zip(opts, (MATRIX_RATE, OTHER_RATE), strict=True):
                opt.param_groups[0]["lr"] = lr * rate(done.steps, steps)
                opt.step()
                opt.zero_grad()
            smooth = 0.98 if done.steps else 0.0
            average = smooth * done.loss + (1 - smooth) * loss.item()
            done = Trained(done.steps + 1, done.tokens + batch.ids_BT[:, 1:].numel(), average)
            bar.update()
            bar.set_postfix(loss=f"{done.loss:.3f}", refresh=False)
            if done.steps % 50 == 0 or done.steps == steps:
                save_checkpoint(model, opts, done, checkpoint)
    return done


def save_checkpoint(model: Model, opts: list[torch.optim.Optimizer], done: Trained, path: Path) -> None:
    """Replace the checkpoint in one move, so that it is never half written."""
    state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts], "done": vars(done)}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
