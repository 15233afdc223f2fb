"""Text as token ids, in memory and on the disk. No torch here."""

from smelter.tokens import alignment
from smelter.tokens.arrange import Arranger
from smelter.tokens.chat import TEMPLATE, ChatFormat, stop_ids
from smelter.tokens.shards import ShardSet, Split, open_shards, read_index
from smelter.tokens.tokenizer import QWEN2_SPLIT_PATTERN, Tokenizer
from smelter.tokens.windows import IGNORED, batches, eval_windows, spread_windows
