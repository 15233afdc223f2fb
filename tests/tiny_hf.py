"""Folders with tiny models of Hugging Face: random weights, or weights that spell.

A spelling model is a real Llama whose weights make each token lead to one other, so a test can say what the teacher
answers; its tokenizer has one token for each ASCII character.
"""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from foundry.settings import TeacherSettings
from foundry.teacher import Answer, Question
from foundry.teachers.transformers import TransformersTeacher

SPECIAL = ["<end>", "<think>", "</think>"]
CHARACTERS = [*"\n", *map(chr, range(32, 127))]
IDS = {token: number for number, token in enumerate(SPECIAL + CHARACTERS)}
CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if thinking %}<think>\n{% endif %}{% endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 6},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def save_tokenizer(folder: Path, template: str = "", **options: Any) -> None:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {name if name in SPECIAL else byte_level.pre_tokenize_str(name)[0][0]: i for name, i in IDS.items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in SPECIAL[1:]])
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **options)
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)


def save_random(folder: Path, kind: str = "Llama", *, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512} if kind != "GPT2" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(IDS), bos_token_id=None, eos_token_id=IDS["<end>"], initializer_range=0.3,
        **({} if kind == "GPT2" else sizes), **KINDS[kind] | options,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_spelling(folder: Path, *tokens: str, template: str = "", context: int = 512, **options: Any) -> Path:
    """A model that after tokens[0] says tokens[1], then tokens[2] and so on; after any other token, tokens[1]."""
    size = len(IDS) + len(IDS) % 2
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=IDS["<end>"], max_position_embeddings=context, head_dim=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    follows = dict.fromkeys(range(size), IDS[tokens[1]])
    follows |= {IDS[a]: IDS[b] for a, b in itertools.pairwise(tokens)}
    with torch.no_grad():
        for parameter in (*model.model.layers[0].self_attn.parameters(), *model.model.layers[0].mlp.parameters()):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for current, following in follows.items():
            model.lm_head.weight[following, current] = 4.0
    model.save_pretrained(folder)
    save_tokenizer(folder, template, **options)
    return folder


def make_teacher(folder: Path, **options: Any) -> TransformersTeacher:
    return TransformersTeacher(TeacherSettings(name="hf/tiny", backend="transformers", model=str(folder), **options))


def run(teacher: TransformersTeacher, *questions: Question) -> list[Answer]:
    """All at once."""

    async def main() -> list[Answer]:
        try:
            return await asyncio.gather(*map(teacher.ask, questions))
        finally:
            await teacher.close()

    return asyncio.run(main())


def ask(folder: Path, prompt: str = "Q", **options: Any) -> Answer:
    fields = {"system", "max_tokens", "temperature", "top_p", "seed"}
    question = Question(prompt=prompt, **{"temperature": 0.0} | {k: v for k, v in options.items() if k in fields})
    return run(make_teacher(folder, **{k: v for k, v in options.items() if k not in fields}), question)[0]
