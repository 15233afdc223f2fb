"""Text as token ids, in memory and on the disk. No torch here."""

from smelter.tokens.alignment import (
    Chunks,
    Ids,
    Spelling,
    TeacherTokenizer,
    check_vocabulary,
    chunk_log_probs,
    chunks_of_slice,
    read_as_written,
    student_ends,
)
from smelter.tokens.chat import TEMPLATE, ChatFormat, stop_ids
from smelter.tokens.fim import fit_fim
from smelter.tokens.shards import ShardSet, Split, open_shards
from smelter.tokens.tokenizer import QWEN2_SPLIT_PATTERN, Tokenizer
from smelter.tokens.windows import IGNORED, batches, eval_windows, spread_windows
