"""What scripts/same.sh needs beside a shell: asking the server, and comparing what two checkouts have made.

    same.py ask SERVER-OUTPUT FOLDER                              the answers to fixed requests, one file each
    same.py compare [--strict] OLD NEW OLD-CHECKOUT NEW-CHECKOUT  the verdict

Files are compared byte for byte. Where their bytes differ, what cannot be equal (the lists below, and nothing else) is
made equal first; what differs then is named as exactly as the kind of file allows.
"""

import json
import pickle
import re
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

IGNORED_KEYS = (
    # Times, speeds and memory in metrics.jsonl, results.json and the counters of a checkpoint.
    *("tok_per_sec", "mfu", "peak_memory_mib", "elapsed_seconds", "train_seconds"),
    # When the server answered, and llama.cpp's timings; its counts (prompt_n, predicted_n, cache_n) are compared.
    *("created", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"),
    *("predicted_ms", "predicted_per_token_ms", "predicted_per_second"),
)
"""Fields of JSON whose values are not compared; that they are there is."""

JSON, WORDS, PAGES = (".json", ".jsonl", ".txt"), (".out", ".err"), (".html", ".md")
IGNORED_TEXT = (
    (JSON, r'"({})": ?[-+.0-9e]+'.format("|".join(IGNORED_KEYS)), r'"\1": "IGNORED"'),
    # Random names of answers.
    (JSON, r'"id": ?"(cmpl|chatcmpl)-[0-9a-f]+"', r'"id": "\1-IGNORED"'),
    # The model card has the training time in it, and a checkpoint's state its seconds: their size, and its hash.
    (JSON, r'"README\.md": \d+', '"README.md": "IGNORED"'),
    (JSON, r'("state/state\.pt": \{\s*"bytes": \d+,\s*"sha256": )"\w+"', r'\1"IGNORED"'),
    (PAGES, r"in all, [\d.,]+ (seconds|minutes|hours)", r"in all, IGNORED \1"),
    # The report: when it was written, how fast training was, and the figure of that.
    (PAGES, r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "DATE"),
    (PAGES, r"[\d.,]+[kM]? tokens a second", "IGNORED tokens a second"),
    (PAGES, r"(<code>train_seconds</code></th><td[^>]*>)[\d.,]+", r"\1IGNORED"),
    (PAGES, r'(?s)(<dt>Training time.*?<dd>|data-chart="throughput").*?(</dd>|</figcaption>)', r"\1IGNORED\2"),
    (PAGES, r'"throughput": \{.*?\}\}\}', '"throughput": IGNORED'),
    (WORDS, r"report\.html \(\d+ KiB\)", "report.html (IGNORED KiB)"),
    # Speeds, times, free space and the free port in what commands say.
    (WORDS, r"[\d.,]+[kM]? tok/s \| mfu [\d.]+% ", "IGNORED tok/s | mfu IGNORED "),
    (WORDS, r"ETA \w+|\bin [\d.]+ ?s\b|\bin \d+[mhd]\d+[smh]", "IGNORED"),
    (WORDS, r"measured peak [\d.,]+ \w+/s", "measured peak IGNORED"),
    (WORDS, r"[\d.,]+ (\w+) at \d+% of the measured peak", r"IGNORED \1 of the measured peak"),
    (WORDS, r"[\d.,]+ MB are free", "IGNORED MB are free"),
    (WORDS, r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
    # Lines that come every few seconds: how many there are depends on the speed.
    (WORDS, r"(?m)^(.* (left|s to go)|  [\d,]+(/[\d,]+ seeds| files, ).*)\n", ""),
)
"""Kinds of files, a pattern that is not compared in them, and what stands in its place."""

MOST_LINES = 4
"""Differences that are shown of one group; the others are counted."""


# --- asking ----------------------------------------------------------------------------------------------

CODE = "def mean(values):\n    total = 0\n    for value in values:\n"
GREEDY = {"prompt": CODE, "max_tokens": 16, "temperature": 0}
SAMPLED = {"prompt": "def f(", "max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "top_k": 60, "seed": 5}
GAP = {"input_prefix": CODE, "input_suffix": "\n    return total\n", "n_predict": 12, "n_probs": 2, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "Add two numbers."}], "max_tokens": 16, "seed": 3}
REQUESTS: dict[str, tuple[str, Any]] = {
    "models": ("/v1/models", None),
    "props": ("/props", None),
    "health": ("/health", None),
    "page": ("/page.js", None),
    "openapi": ("/openapi.json", None),
    "greedy": ("/v1/completions", {**GREEDY, "logprobs": 3}),
    "seeded": ("/v1/completions", {**SAMPLED, "logprobs": 2, "n": 2}),
    "streamed": ("/v1/completions", {**SAMPLED, "stream": True, "stream_options": {"include_usage": True}}),
    "echoed": ("/v1/completions", {**GREEDY, "max_tokens": 4, "echo": True, "logprobs": 1}),
    "scored": ("/v1/completions", {**GREEDY, "max_tokens": 0, "echo": True, "logprobs": 1}),
    "suffix": ("/v1/completions", {**GREEDY, "suffix": "\n    return total\n", "stop": ["\n\n"]}),
    "chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    "chat-streamed": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "infill": ("/infill", GAP),
    "infill-extra": ("/infill", {**GAP, "input_extra": [{"filename": "a.py", "text": "x = 1\n"}], "stream": True}),
    "completion": ("/completion", {"prompt": CODE, "n_predict": 12, "n_probs": 2, "seed": 1}),
    "completion-seeded": ("/completion", {"prompt": CODE, "n_predict": 12, "temperature": 1.1, "seed": 9}),
    "tokenize": ("/tokenize", {"content": CODE + "naïve 東京"}),
    "no-prompt": ("/v1/completions", {"max_tokens": 4}),
    "no-temperature": ("/v1/completions", {**GREEDY, "temperature": -1}),
    "no-such-field": ("/v1/completions", {**GREEDY, "logit_bias": {"5": 1}}),
    "no-such-path": ("/v1/nothing", None),
    "no-json": ("/v1/completions", "{"),
}
"""Name of an answer: the path, and the body to post (text as it is)."""


def ask(said: Path, folder: Path) -> None:
    """Wait until the server says where it is, and keep its answer to each request."""
    for _ in range(600):
        if found := re.search(r"http://\S+", said.read_text(encoding="utf-8")):
            break
        time.sleep(0.1)
    else:
        return
    folder.mkdir()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name, (path, body) in REQUESTS.items():
        data = None if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        request = urllib.request.Request(found[0] + path, data, {"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=60) as response:
                answer = response.status, response.headers["Content-Type"], response.read()
        except urllib.error.HTTPError as error:
            answer = error.code, error.headers["Content-Type"], error.read()
        except OSError as error:
            answer = 0, "none", str(error).encode()
        text = f"{answer[0]} {answer[1]}\n{answer[2].decode('utf-8', 'replace')}\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


# --- comparing -------------------------------------------------------------------------------------------


def masked(data: bytes, suffix: str, folders: tuple[str, str]) -> str:
    """Text with what cannot be equal replaced: the patterns above, and where the two sides lie."""
    text = data.decode("utf-8", "backslashreplace")
    for folder, name in zip(folders, ("SIDE", "CHECKOUT"), strict=True):
        text = text.replace(folder, name)
    for suffixes, pattern, replacement in IGNORED_TEXT:
        if suffix in suffixes:
            text = re.sub(pattern, replacement, text)
    return text


def short(value: Any) -> str:
    """A value for one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 90 else f"{text[:87]}..."


def in_values(old: Any, new: Any, path: str = "") -> str | None:
    """The first difference between two nested values, without the ignored fields."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in old or key not in new:
                return f"{where} is in the {'old' if key in old else 'new'} one only"
            if key not in IGNORED_KEYS and (found := in_values(old[key], new[key], where)):
                return found
        return None if list(old) == list(new) else f"{path or 'object'}: its keys are in another order"
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for index, (one, other) in enumerate(zip(old, new, strict=False)):
            if found := in_values(one, other, f"{path}[{index}]"):
                return found
        return None if len(old) == len(new) else f"{path}: {len(old)} entries -> {len(new)}"
    if type(old) is type(new) and (old == new or (old != old and new != new)):
        return None
    if isinstance(old, str) and isinstance(new, str):
        return f"{path}: {in_text(old, new, '')}"
    return f"{path} {short(old)} -> {short(new)}"


def in_text(old: str, new: str, unit: str = "line ") -> str | None:
    """The first line that differs, from a little before the difference on."""
    ours, theirs = old.split("\n"), new.split("\n")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one != other:
            same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
            start = max(0, same - 30)
            where = f"{unit}{number}: " if unit else ""
            return f"{where}{short(repr(one[start:]))} -> {short(repr(other[start:]))}"
    return None if old == new else f"{len(ours)} lines -> {len(theirs)}"


def in_json(old: str, new: str, lines: bool) -> str | None:
    """The first field that differs, of one object or of an object on each line."""
    if not lines:
        return in_values(json.loads(old), json.loads(new)) or in_text(old, new)
    ours, theirs = old.splitlines(), new.splitlines()
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one != other:
            before, after = json.loads(one), json.loads(other)
            step = before.get("step") if isinstance(before, dict) else None
            if found := in_values(before, after):
                return f"{f'step {step}' if step is not None else f'line {number}'} {found}"
    return None if len(ours) == len(theirs) else f"{len(ours)} lines -> {len(theirs)}"


def in_array(old: bytes, new: bytes, dtype: str) -> str:
    """The first number that differs in two equally long blocks."""
    kind = np.dtype(dtype)
    ours, theirs = np.frombuffer(old, kind), np.frombuffer(new, kind)
    bits = f"u{kind.itemsize}"
    where = np.flatnonzero(ours.view(bits) != theirs.view(bits))
    if not len(where):
        return "nothing"
    return f"{len(where):,} of {len(ours):,} differ, [{where[0]}] {ours[where[0]]} -> {theirs[where[0]]}"


def in_bytes(old: bytes, new: bytes) -> str:
    """The first byte that differs."""
    if len(old) != len(new):
        return f"{len(old):,} bytes -> {len(new):,}"
    return f"bytes: {in_array(old, new, 'u1')}"


Parts = dict[str, tuple[str, bytes]]
"""Name of a part: the type of its numbers for numpy (empty: it has none) and its shape, and its bytes."""


def safetensors_parts(data: bytes) -> Parts:
    """Tensors, and the metadata."""
    kinds = {"F32": "f4", "F16": "f2", "F64": "f8", "I64": "i8", "I32": "i4", "U8": "u1", "I8": "i1", "BF16": "u2"}
    size = struct.unpack_from("<Q", data)[0]
    head = json.loads(data[8 : 8 + size])
    parts: Parts = {"metadata": ("", json.dumps(head.pop("__metadata__", None)).encode())}
    for name, entry in head.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        parts[name] = (f"{kinds.get(entry['dtype'], 'u1')} {entry['shape']}", data[start:end])
    return parts


def gguf_parts(data: bytes) -> Parts:
    """Tensors, and every key of the head, each with its bytes."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at = 8

    def number(form: str) -> int:
        nonlocal at
        value: int = struct.unpack_from(form, data, at)[0]
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = number("<Q")
        at += size
        return data[at - size : at].decode()

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number("<I"), number("<Q")
            for _ in range(count):
                skip(inner)
        else:
            at += sizes[kind]

    num_tensors, num_keys = number("<Q"), number("<Q")
    parts: Parts = {}
    for _ in range(num_keys):
        name, start = text(), at
        skip(number("<I"))
        parts[name] = ("u1", data[start:at])
    found = []
    for _ in range(num_tensors):
        name, dims = text(), number("<I")
        shape = [number("<Q") for _ in range(dims)]
        found.append((name, f"{'f4' if number('<I') == 0 else 'u1'} {shape}", number("<Q")))
    begin = -(-at // 32) * 32
    for (name, kind, offset), after in zip(found, [*(entry[2] for entry in found[1:]), len(data) - begin], strict=True):
        parts[name] = (kind, data[begin + offset : begin + after])
    return parts


class StateReader(pickle.Unpickler):
    """Reads the plan of a torch file without torch: every class and tensor becomes a list of what it is made of."""

    def find_class(self, module: str, name: str) -> Any:
        """Any class: a function that keeps its arguments."""
        return lambda *arguments: {f"{module}.{name}": list(arguments)}

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's memory, by its name."""
        return [entry if isinstance(entry, str | int) else str(type(entry)) for entry in pid]


def in_state(old: Path, new: Path) -> str | None:
    """What differs in two torch files: in the plan (data.pkl) or in a tensor's memory."""
    with zipfile.ZipFile(old) as ours, zipfile.ZipFile(new) as theirs:
        if ours.namelist() != theirs.namelist():
            return "other tensors"
        for name in ours.namelist():
            before, after = ours.read(name), theirs.read(name)
            # A number that torch draws from the whole file, times included.
            if before == after or name.endswith("serialization_id"):
                continue
            if not name.endswith("data.pkl"):
                return f"{name} {in_bytes(before, after)}"
            with ours.open(name) as one, theirs.open(name) as other:
                if found := in_values(StateReader(one).load(), StateReader(other).load()):
                    return found
    return None


def in_parts(old: Parts, new: Parts, old_bytes: bytes, new_bytes: bytes) -> str:
    """The parts that differ by name, and the first number in the first of them."""
    if list(old) != list(new):
        lost, won = [name for name in old if name not in new], [name for name in new if name not in old]
        return f"tensors or keys: without {short(lost)}, with {short(won)}, or in another order"
    names = [name for name in old if old[name] != new[name]]
    if not names:
        return in_bytes(old_bytes, new_bytes)
    (kind, before), (other, after) = old[names[0]], new[names[0]]
    if kind != other or len(before) != len(after) or not kind:
        found = f"{kind}, {len(before)} bytes -> {other}, {len(after)} bytes"
    else:
        found = in_array(before, after, kind.split()[0])
    return f"{names[0]}: {found}" + (f"; and {len(names) - 1} more: {short(', '.join(names[1:]))}" * (len(names) > 1))


def difference(old: Path, new: Path, folders: tuple[tuple[str, str], tuple[str, str]]) -> str | None:
    """What differs in a file, or None."""
    if not (old.is_file() and new.is_file()):
        return "only the old one is there" if old.is_file() else "only the new one is there"
    ours, theirs = old.read_bytes(), new.read_bytes()
    if ours == theirs:
        return None
    try:
        match old.suffix:
            case ".safetensors":
                return in_parts(safetensors_parts(ours), safetensors_parts(theirs), ours, theirs)
            case ".gguf":
                return in_parts(gguf_parts(ours), gguf_parts(theirs), ours, theirs)
            case ".pt":
                return in_state(old, new)
            case ".bin" | ".npy" | ".f16":
                return in_bytes(ours, theirs)
        one, other = masked(ours, old.suffix, folders[0]), masked(theirs, old.suffix, folders[1])
        if one == other:
            return None
        found = in_json(one, other, old.suffix == ".jsonl") if old.suffix in (".json", ".jsonl") else None
        return found or in_text(one, other)
    except (ValueError, LookupError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        return f"differs, and cannot be read as what its name says: {error}"


def group_of(path: Path) -> str:
    """The artefact that a file belongs to: its line in the verdict."""
    if path.parts[0] == "commands":
        return {".err": "standard error", ".code": "exit codes"}.get(path.suffix, "standard output")
    return "/".join(path.parts[:2]) if path.parts[0] in ("runs", "export", "data") else path.parts[0]


def files(side: Path) -> Iterator[Path]:
    """Every file that was made, by its path within the side."""
    for path in sorted(side.rglob("*")):
        if path.is_file() and path.relative_to(side).parts[0] not in ("source", "recipes"):
            yield path.relative_to(side)


def compare(old: Path, new: Path, checkouts: tuple[str, str], strict: bool) -> int:
    """Print a line for each group, and the verdict."""
    failed = [
        path for path in sorted((old / "commands").glob("*.code")) if len(set(path.read_text().split()[::2])) != 1
    ]
    for path in failed:
        words = path.with_suffix(".err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = path.read_text().strip()
        print(f"same: the old {path.stem} ended with {code}: {words[-1] if words else 'no words'}", file=sys.stderr)
    if failed or not (old / "answers").is_dir():
        print("same: the old checkout does not do what it should, so nothing is shown", file=sys.stderr)
        return 2
    groups: dict[str, dict[Path, str | None]] = {}
    folders = (str(old), checkouts[0]), (str(new), checkouts[1])
    for path in sorted({*files(old), *files(new)}):
        groups.setdefault(group_of(path), {})[path] = difference(old / path, new / path, folders)
    count = 0
    for group, found in groups.items():
        differing = [(path, text) for path, text in found.items() if text]
        # Where training went another way, its metrics tell from which step on.
        differing.sort(key=lambda entry: entry[0].name != "metrics.jsonl")
        soft = group == "standard error" and not strict
        if not differing:
            print(f"same     {group}  ({len(found)} {'file' if len(found) == 1 else 'files'})")
        for path, text in differing[:MOST_LINES]:
            print(f"{'words  ' if soft else 'DIFFERS'}  {path}: {text}")
        if len(differing) > MOST_LINES:
            print(f"         and {len(differing) - MOST_LINES} more of {group}")
        count += 0 if soft else len(differing)
    print(f"same: {f'{count} differ' if count else 'nothing differs'}")
    return 1 if count else 0


def main(arguments: list[str]) -> int:
    """`ask` or `compare`; see the module."""
    match arguments:
        case ["ask", said, folder]:
            ask(Path(said), Path(folder))
            return 0
        case ["compare", *strict, old, new, old_checkout, new_checkout] if strict in ([], ["--strict"]):
            return compare(Path(old), Path(new), (old_checkout, new_checkout), bool(strict))
    print("same.py: ask SERVER-OUTPUT FOLDER, or compare [--strict] OLD NEW OLD-CHECKOUT NEW-CHECKOUT", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
