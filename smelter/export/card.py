"""What goes with the weights when they are published: a model card, a Modelfile for Ollama, a line for llama-server.

The card follows Hugging Face's form (YAML front matter, then Markdown) and says only what is known: data by licence and
teacher as the shards' index has it, the recipe, the results of `smelter evaluate`, and what export itself checked. What
is not known is said to be so.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smelter import __version__
from smelter.base import megabytes
from smelter.config import config_to_toml
from smelter.export.check import Source, infill_prompt
from smelter.export.cursor import objection
from smelter.run import Checkpoint, Results
from smelter.tokens import Tokenizer

CARD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags: [code, ternary, bitnet, fill-in-the-middle]
---

# {name}

A code model of {num_params:,} parameters whose body weights are ternary (each is -1, 0 or 1 times one scale per
matrix; [BitNet b1.58](https://arxiv.org/abs/2402.17764)), trained with Smelter {version} for {step:,} steps. Its
architecture is Qwen3's, so nothing of ours is needed to run it. Context: {context:,} tokens.

It completes code and fills in the middle.

## Use

{use}

## Infilling

Prefix, suffix, middle, each after its own token; the model then writes the middle and ends with `{eos}`:

```
{prompt}
```

As token ids: `{ids}`. llama-server's `/infill` and the template in the `Modelfile` make this prompt
themselves.{warning}

## Data

{data}

## Training

{training}

<details><summary>The whole recipe</summary>

```toml
{recipe}```

</details>

## Results

{results}

## Checked after writing

{checks}

## Limits

- A small model: it writes what is likely, not what is right. Read, run and test what it writes.
- It can repeat passages of its training data, whose licences may then apply to them.
- It was measured on held-out documents of its own kind of data, and on nothing else than what stands under Results.
- {activations}
"""

TRANSFORMERS = """### Transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = "{prefix}def add(a, b):\\n    return {suffix}\\n{middle}"
ids = tokenizer(prompt, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0, ids.shape[1] :], skip_special_tokens=True))
```"""

LLAMA_CPP = """### llama.cpp

    {command}

Editors' plugins for llama.cpp then use its `/infill`."""

OLLAMA = """### Ollama

    ollama create {name} -f Modelfile"""

PACKED = """### Smelter

The packed folder has two bits a weight and is read by Smelter itself:

    smelter complete {folder} --prefix 'def add(a, b):\\n    return ' --suffix '\\n'"""

MODELFILE = """# ollama create {name} -f Modelfile
FROM ./{file}
TEMPLATE \"\"\"{{{{- if .Suffix }}}}{fim}{{{{- else }}}}{{{{ .Prompt }}}}{{{{- end }}}}\"\"\"
PARAMETER num_ctx {context}
PARAMETER num_predict 64
PARAMETER temperature 0
PARAMETER stop {eos}
PARAMETER stop {prefix}
PARAMETER stop {suffix}
PARAMETER stop {middle}
"""


def modelfile(name: str, file: str, tokenizer: Tokenizer, context: int) -> str:
    """Ollama's Modelfile; its template takes the suffix that a client sends, in our order."""
    special = tokenizer.special
    return MODELFILE.format(
        name=name,
        file=file,
        context=context,
        fim=f"{special.fim_prefix}{{{{ .Prompt }}}}{special.fim_suffix}{{{{ .Suffix }}}}{special.fim_middle}",
        eos=special.eos,
        prefix=special.fim_prefix,
        suffix=special.fim_suffix,
        middle=special.fim_middle,
    )


def server_command(file: Path, context: int) -> str:
    """The line that starts llama-server.

    /infill fills a batch with the code around the cursor, three parts before it to one after it, and what is left but
    for twice `-n` tokens with other files: with a batch of half the context these and the answer have a quarter each.
    Four slots, as llama.vscode asks for three answers at once, that share their memory, so that each has the whole
    context. Attention in float32, as flash attention computes in f16, which int8 activations amplify.
    """
    batch, exact = max(1, context // 2), "-fa off -ctk f32 -ctv f32"
    slots = f"-c {4 * context} -np 4 -kvu -n {max(1, context // 8)}"
    return f"llama-server -m {shlex.quote(str(file))} {slots} -b {batch} -ub {batch} {exact} --port 8012"


def gguf_file(report: dict[str, Any]) -> str:
    """The name of the file that a GGUF export has written."""
    (file,) = (name for name in report["files"] if name.endswith(".gguf"))
    return str(file)


def _use(source: Source, report: dict[str, Any], folder: Path) -> str:
    """How to run one of the exports, which lies in `folder`."""
    special = source.tokenizer.special
    if report["format"] == "hf":
        return TRANSFORMERS.format(prefix=special.fim_prefix, suffix=special.fim_suffix, middle=special.fim_middle)
    if report["format"] == "gguf":
        llama_cpp = LLAMA_CPP.format(command=server_command(folder / gguf_file(report), source.context))
        return f"{llama_cpp}\n\n{OLLAMA.format(name=source.name)}"
    return PACKED.format(folder=folder)


def _share(counts: dict[str, int], missing: str) -> str:
    rows = [f"| {name or missing} | {count:,} |" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "\n".join(rows)


def data_section(shards: Path, teachers: Sequence[str]) -> str:
    """The training data by licence and by teacher, as far as the index of the shards says."""
    try:
        index = json.loads((shards / "index.json").read_text(encoding="utf-8"))
        split = index["splits"]["train"]
        sizes = f"{split['num_docs']:,} documents, {split['num_bytes']:,} bytes of text, {split['num_tokens']:,} tokens"
        inputs = [f"- `{Path(file['name']).name}` (sha256 {file['sha256'][:16]}…)" for file in index["inputs"]]
        licenses, answers = split.get("licenses"), split.get("teachers")
    except (OSError, ValueError, KeyError, TypeError):
        return f"The shards (`{shards}`) were not there when this card was written, so nothing is known of them here."
    parts = [f"Trained on {sizes}, from", "\n".join(inputs)]
    if licenses is None:
        parts.append("The index of these shards does not record licences.")
    else:
        parts.append(f"| licence | bytes |\n|---|---|\n{_share(licenses, 'not named by the records')}")
    if answers:
        parts.append(f"Of this, written by teacher models:\n\n| teacher | bytes |\n|---|---|\n{_share(answers, '?')}")
    if teachers:
        parts.append("Distilled from " + ", ".join(f"`{name}`" for name in teachers) + ".")
    if answers or teachers:
        parts.append("The terms under which the teachers' vendors and authors let their output be used apply.")
    elif answers is not None:
        parts.append("No teacher model's answers are among it.")
    return "\n\n".join(parts)


def _training(checkpoint: Checkpoint, results: Results | None) -> str:
    """Steps, tokens and time."""
    training = checkpoint.config.training
    tokens, seconds = (results.train_tokens, results.train_seconds) if results else (None, None)
    tokens = tokens or checkpoint.step * training.total_batch_size
    took = f", {seconds / 60:,.1f} minutes" if seconds else ""
    return (
        f"{checkpoint.step:,} steps of {training.total_batch_size:,} tokens ({tokens:,} in all{took}), "
        f"optimizer {training.optimizer}, seed {training.seed}."
    )


def _results(results: Results | None) -> str:
    """What `smelter evaluate` found, if it was asked."""
    if results is None:
        return "Not measured: `smelter evaluate` was not run."
    measures = {
        "bits per byte on held-out documents": results.val_bpb,
        "bits per byte of gzip on them": results.gzip_bpb,
        "bits per byte of xz on them": results.xz_bpb,
        "lines filled in exactly": results.infill_exact_match,
        "lines filled in exactly, prefix first": results.infill_exact_match_psm,
    }
    for way, row in (results.editor.rows if results.editor else {}).items():
        if "in_word" in row.places:
            measures[f"inside words, the word right, {way}"] = row.places["in_word"].word
    rows = [f"| {name} | {value:.3f} |" for name, value in measures.items() if value is not None]
    return "\n".join(["| measure | value |\n|---|---|", *rows, f"| lines asked for | {results.infill_cases:,} |"])


def check_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report of one format for people, as names and values."""
    size, part = megabytes(sum(report["files"].values())), report["format"]
    yield "written", f"{report['gguf_type'] or part}, {size}, checkpoint of step {report['step']:,}"
    yield "trits changed", f"{report['trits_changed']} of {report['trits']:,}"
    yield "scales changed", f"{report['scales_changed']} of {report['layers']}"
    if "tokenizer_texts" in report:
        texts = f"{report['tokenizer_differences']} of {report['tokenizer_texts']}"
        yield "texts tokenised differently, Transformers", texts
    elif part == "hf":
        yield "texts and logits", "not compared: pip install 'smelter-foundry[hf]'"
    if "llama_cpp_texts" in report:
        texts = f"{report['llama_cpp_tokenizer_differences']} of {report['llama_cpp_texts']}"
        yield "texts tokenised differently, llama.cpp", f"{texts}; the infilling prompt: the same ids"
    elif part == "gguf":
        yield "texts, llama.cpp", "not compared: no llama-tokenize on the PATH or in $LLAMA_CPP_DIR/bin"
    if part != "packed":
        yield "largest attention logit", _beside_cap(report["max_attention_logit"], report["attn_logit_soft_cap"])
        yield "largest output logit", _beside_cap(report["max_final_logit"], report["final_logit_soft_cap"])
        yield "KL of leaving the caps out", f"{report['caps_kl']:.1e} nats per token"
    if "kl_architecture" in report:
        yield "KL, Qwen3 written out against us", _kl(report, "architecture")
    if "kl_same_numerics" in report:
        yield "KL, Transformers against us", _kl(report, "same_numerics")
    if "kl_as_trained" in report:
        how = {"hf": "KL without 8-bit activations", "gguf": "KL with llama.cpp's rounding", "packed": "KL, read again"}
        yield how[part], _kl(report, "as_trained")
    yield "measured on", f"{report['probe_tokens']:,} tokens of {report['probe']}"
    if "cursor_places" in report:
        bits = (report[f"cursor_bpb_{asked}"] for asked in ("psm", "continued", "spm", "plain"))
        figures = "prefix first {:.3f}, no suffix {:.3f}; healed: suffix first {:.3f}, no suffix {:.3f}".format(*bits)
        yield f"bits per byte at {report['cursor_places']} cursors", figures
    if "llama_server_places" in report:
        for kind, where in (("line_start", "at line starts"), ("in_word", "inside words")):
            right = (f"{report[f'llama_server_{kind}_{what}']:.0%}" for what in ("character", "word"))
            figures = "first character right {}, first word {}".format(*right)
            yield f"llama-server, {report['llama_server_places']} places {where}", figures
    elif part == "gguf":
        yield "llama-server", "not asked: none on the PATH or in $LLAMA_CPP_DIR/bin"


def _beside_cap(value: float, cap: float) -> str:
    return f"{value:.1f}  (cap {cap:g})" if cap else f"{value:.1f}  (no cap)"


def _kl(report: dict[str, Any], which: str) -> str:
    return f"{report[f'kl_{which}']:.1e} nats per token, same first choice {report[f'top1_{which}']:.1%}"


def model_card(source: Source, reports: dict[str, dict[str, Any]], here: dict[str, Path]) -> str:
    """The whole card of the parts in `here`, each in its folder as seen from the card."""
    checkpoint, prompt = source.checkpoint, infill_prompt(source.tokenizer)
    config, checks = checkpoint.config, [row for part in here for row in check_rows(reports[part])]
    quant = config.model.activation_quant if config.model.use_ternary else "none"
    rounded = "llama.cpp rounds them in blocks of 256, Transformers does not: the table above has what that makes."
    return CARD.format(
        license=source.license,
        name=source.name,
        num_params=sum(parameter.numel() for parameter in source.model.parameters()),
        version=__version__,
        step=checkpoint.step,
        context=config.model.max_seq_len,
        use="\n\n".join(_use(source, reports[part], folder) for part, folder in here.items()),
        eos=source.tokenizer.special.eos,
        prompt=prompt["text"],
        ids=" ".join(map(str, prompt["ids"])),
        warning=f"\n\n**Warning**: {warning}." if (warning := objection(source.cursor)) else "",
        data=data_section(source.shards, config.distillation.teachers),
        training=_training(checkpoint, source.results),
        recipe=config_to_toml(config),
        results=_results(source.results),
        checks="| check | found |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in checks),
        activations=f"Training rounded activations to 8 bits ({quant}). {rounded}",
    )
