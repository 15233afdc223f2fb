"""Source trees on this machine -> records: the corpus that needs no network, no key and no licence talk.

`foundry corpus --source stdlib` reads the running Python's own standard library (PSF-2.0), some 10 MB of
careful code that every machine has; any other folder works the same. What cannot teach a small model
anything is left out and counted: tests (long, repetitive, little logic), generated files (codec tables,
Sphinx's topics), minified or data files, exact duplicates. So is what its owner keeps to himself: files that
`.gitignore` names (`ignored`), hidden ones, files of keys and files with a credential in them (`credentials`).

One pass over the files in sorted order and one file in memory at a time. A file's split follows from the
hash of its name alone, so growing the corpus never moves a file from validation to training.
"""

import hashlib
import io
import os
import re
import stat
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

import tyro
from annotated_types import Ge, Interval

from foundry.credentials import is_key_file, secret
from foundry.ignored import Ignored
from smelter.base import ConfigError, DataError, Progress, Record, megabytes, nearest, parse, write_records

LANGUAGES = {
    "assembly": "s asm",
    "c": "c h",
    "c++": "cc cpp cxx hh hpp hxx",
    "c#": "cs",
    "css": "css",
    "cuda": "cu cuh",
    "go": "go",
    "haskell": "hs",
    "html": "html htm",
    "java": "java",
    "javascript": "js mjs cjs jsx",
    "julia": "jl",
    "kotlin": "kt kts",
    "lua": "lua",
    "markdown": "md",
    "ocaml": "ml mli",
    "perl": "pl pm",
    "php": "php",
    "python": "py pyi pyw",
    "r": "r",
    "ruby": "rb",
    "rust": "rs",
    "scala": "scala",
    "shell": "sh bash",
    "sql": "sql",
    "swift": "swift",
    "typescript": "ts tsx mts",
    "zig": "zig",
}
"""Language -> extensions. A file of any other kind is not looked at."""

_BY_EXTENSION = {f".{ext}": language for language, exts in LANGUAGES.items() for ext in exts.split()}
_FOREIGN = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TESTS = {"test", "tests", "idle_test", "testdata", "__tests__"}
_TEST_FILE = re.compile(r"test_.*|.*_test|conftest")
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|\bfile (?:is|was) generated|do not edit|generated from .+ (?:by|with) ",
    re.IGNORECASE,
)
_GENERATED_HEAD = 1_000
"""Characters at a file's start in which it says that a program wrote it."""
_MAX_MEAN_LINE = 200
"""Mean characters a line above which a file is minified or data."""


@dataclass(frozen=True)
class Options:
    """Turn source trees on this machine into records."""

    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """stdlib (the running Python's own library) or a folder, PATH or NAME=PATH; repeat for more."""
    out: Path = Path("data/corpus.jsonl")
    """File of records to write."""
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    """Share of the files held out for validation, chosen by the hash of their names."""
    include_tests: bool = False
    """Keep tests too."""
    max_file_kb: Annotated[int, Ge(1)] = 256
    """Leave out larger files."""
    license: str = "unknown"
    """Licence of the folders (SPDX identifier); the standard library's own is PSF-2.0."""
    language: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Keep only this language; repeat for more. Default: all that are known by their extension,
    and of the standard library Python alone."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("--source is missing: give --source stdlib or --source FOLDER")
        for language in self.language:
            if language not in LANGUAGES:
                raise ConfigError(f"--language {language}: unknown: {nearest(language, LANGUAGES)}")


@dataclass(frozen=True)
class Tree:
    """A folder of sources: `name` begins the `source` of its records."""

    name: str
    root: Path
    license: str
    languages: tuple[str, ...]
    is_published: bool = False
    """Whether everybody has it: a file that is named for secrets (the standard library has one) then holds none."""


@dataclass
class Summary:
    """What came of the files: kept ones by split, left-out ones by reason."""

    files: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        """The counts as lines of text; every file that was looked at is in one of them."""
        lines = [f"{'':8} {'files':>8} {'MB':>8}"]
        for name in ("train", "val"):
            lines.append(f"{name:8} {self.files[name]:8,} {self.num_bytes[name] / 1e6:8.2f}")
        lines.append(f"{'total':8} {self.files.total():8,} {self.num_bytes.total() / 1e6:8.2f}")
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
            lines.append(f"left out {self.left_out.total():,}: {reasons}")
        return "\n".join(lines)


def find_trees(options: Options) -> list[Tree]:
    """The folders that `--source` names. Raises ConfigError for a missing folder or a name used twice."""
    trees: dict[str, Tree] = {}
    for source in options.source:
        if source == "stdlib":
            tree = Tree("stdlib", Path(sysconfig.get_path("stdlib")), "PSF-2.0", options.language or ("python",), True)
        else:
            match = re.fullmatch(r"([\w.-]+)=(.+)", source)
            path = Path(match[2] if match and not Path(source).exists() else source).expanduser()
            if not path.is_dir():
                raise ConfigError(f"--source {source}: no such folder: give stdlib or a folder's path")
            name = match[1] if match and not Path(source).exists() else path.resolve().name
            tree = Tree(name or "root", path, options.license, options.language or tuple(LANGUAGES))
        if tree.name in trees:
            raise ConfigError(f"--source {source}: {tree.name} is taken: name this one, OTHERNAME={tree.root}")
        trees[tree.name] = tree
    return list(trees.values())


def split_of(source: str, val_fraction: float) -> str:
    """ "val" for the given share of all names, "train" for the rest; the same for ever."""
    share = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return "val" if share < val_fraction else "train"


def corpus_records(trees: Iterable[Tree], options: Options, summary: Summary) -> Iterator[Record]:
    """Records of the trees' files in sorted order, counted in `summary` as they come.

    Raises DataError if there is none, and OSError where the disk fails.
    """
    seen: set[str] = set()
    progress = Progress("reading", "files")
    for tree in trees:
        for path in _files(tree, options, summary):
            source = f"{tree.name}/{path.relative_to(tree.root).as_posix()}"
            language = _BY_EXTENSION[path.suffix.lower()]
            text = _read(path, source, language, options, summary)
            if text is None:
                continue
            split = split_of(source, options.val_fraction)
            record = Record(
                kind="text",
                text=text,
                language=language,
                source=source,
                license=tree.license,
                split="val" if split == "val" else "train",
            )
            if record.id in seen:
                summary.left_out["exact duplicates"] += 1
                continue
            seen.add(record.id)
            summary.files[split] += 1
            summary.num_bytes[split] += len(text.encode())
            progress(summary.files.total(), megabytes(summary.num_bytes.total()), f"at {source}")
            yield record
    if not seen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.left_out.most_common())
        raise DataError(
            f"no usable source file in {', '.join(str(tree.root) for tree in trees)} "
            f"(left out: {reasons or 'nothing'}): choose another --source"
        )


def _files(tree: Tree, options: Options, summary: Summary) -> list[Path]:
    """Candidate files of a tree, sorted by path; what is private, tests and links are counted as left out."""
    root, ignored = tree.root, Ignored(tree.root)

    def fail(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error
        summary.left_out["folders without permission"] += 1

    wanted = {ext for ext, language in _BY_EXTENSION.items() if language in tree.languages}
    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        below = PurePosixPath(Path(folder).relative_to(root))
        is_ignored = ignored.in_folder(below)
        folders[:] = [
            name
            for name in folders
            if name not in _FOREIGN
            and not name.startswith(".")
            # A virtual environment holds other people's code, under other licences.
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        ]
        num_folders = len(folders)
        folders[:] = [name for name in folders if not is_ignored(name, True)]
        if len(folders) < num_folders:
            summary.left_out["folders that .gitignore names"] += num_folders - len(folders)
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() not in wanted:
                continue
            if is_ignored(name, False):
                summary.left_out["named by .gitignore"] += 1
            elif name.startswith("."):
                summary.left_out["hidden"] += 1
            elif is_key_file(name) and not tree.is_published:
                summary.left_out["files of keys"] += 1
            elif not options.include_tests and (_TESTS & set(below.parts) or _TEST_FILE.fullmatch(path.stem)):
                summary.left_out["tests"] += 1
            elif not stat.S_ISREG(path.lstat().st_mode):
                summary.left_out["links and special files"] += 1
            else:
                paths.append(path)
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path, source: str, language: str, options: Options, summary: Summary) -> str | None:
    """A file's text, or None with the reason counted."""
    if path.stat().st_size > options.max_file_kb * 1_024:
        summary.left_out[f"larger than {options.max_file_kb} KB"] += 1
        return None
    try:
        source.encode()
        text = decode_source(path.read_bytes(), language)
    except UnicodeError:
        summary.left_out["undecodable"] += 1
        return None
    except PermissionError:
        summary.left_out["without permission"] += 1
        return None
    reason = unfit(text) or ("with a credential" if secret(text) else None)
    if reason:
        summary.left_out[reason] += 1
        return None
    return text


def decode_source(data: bytes, language: str) -> str:
    r"""A source file as text with "\n" line ends, without a byte-order mark.

    Python files are decoded as Python does it (PEP 263: `# -*- coding: latin-1 -*-`), all others as
    UTF-8. Raises UnicodeError where that fails, for an unknown encoding too.
    """
    encoding = "utf-8-sig"
    if language == "python":
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        except SyntaxError as error:  # an unknown encoding, or a first line that is not in it
            raise UnicodeError(str(error)) from None
    try:
        text = data.decode(encoding)
    except LookupError as error:  # an encoding from bytes to bytes, e.g. rot13
        raise UnicodeError(str(error)) from None
    if "\0" in text:
        raise UnicodeError("a NUL character: not a text file")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text.encode()  # some codecs (e.g. unicode_escape) make half surrogate pairs, which no JSON file holds
    return text


def unfit(text: str) -> str | None:
    """Why a text cannot teach anything, or None if it can."""
    if not text.strip():
        return "empty"
    if _GENERATED.search(text[:_GENERATED_HEAD]):
        return "generated"
    if len(text) / (text.count("\n") + 1) > _MAX_MEAN_LINE:
        return "minified or data"
    return None


def main(argv: list[str]) -> int:
    """`foundry corpus`: write the records and print what became of every file."""
    options = parse(Options, argv, "foundry corpus")
    trees = find_trees(options)
    for tree in trees:
        print(f"reading {tree.root} as {tree.name} ({tree.license})")
    summary = Summary()
    write_records(options.out, corpus_records(trees, options, summary))
    print(summary.table())
    if options.val_fraction and not summary.files["val"]:
        print(f"no file fell to validation: raise --val-fraction above {options.val_fraction} for so few files")
    print(f"wrote {options.out}")
    return 0
