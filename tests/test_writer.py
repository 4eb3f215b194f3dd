"""The tiny models that other tests take for a family's own: they write their text whatever was asked before."""

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import real
from tests.writer import ROWS, writer


def test_a_writer_says_its_text_after_any_prompt_and_then_ends() -> None:
    said = '<tool_call>\n{"name": "look", "arguments": {"at": "Oslo"}}\n</tool_call>'
    template = real.templates()["llama_cpp/Qwen-Qwen3-0.6B"]
    folder = writer("qwen3", said, "<|im_start|>assistant\n", template)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == ROWS["qwen3"] > len(tokenizer)
    for asked in ("hi", f"{said} once more! " * 30):
        messages = [{"role": "user", "content": asked}]
        prompt: Tensor = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        written = model.generate(prompt, max_new_tokens=99, do_sample=False)
        assert tokenizer.decode(written[0, prompt.shape[1] :]) == f"{said}<|im_end|>"
