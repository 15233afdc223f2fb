"""What an export says of the cursor: measured in process, and by the real llama-server where it is installed."""

import shlex
from pathlib import Path

import pytest

from smelter.base.errors import UserError
from smelter.evaluation.middles import middle_bpb
from smelter.export.card import server_command
from smelter.export.cursor import PLACES, check_cursor, check_llama_server, cursor_places, objection
from smelter.export.gguf import write_gguf
from tests import tiny
from tests.export.real_llama_cpp import llama_cpp_folder


def test_four_ways_are_measured_at_the_same_places() -> None:
    model, texts = tiny.model(), [tiny.CODE]
    checks = check_cursor(model, tiny.tokenizer(), texts)
    places = [place for some in cursor_places(texts).values() for place in some]
    assert checks["cursor_places"] == len(places) == 2 * PLACES
    assert checks["cursor_bpb_psm"] == middle_bpb(model, tiny.tokenizer(), places, "psm")
    assert all(1.0 < checks[f"cursor_bpb_{asked}"] < 20.0 for asked in ("psm", "spm", "plain", "continued"))
    assert checks["cursor_bpb_continued"] == middle_bpb(model, tiny.tokenizer(), places, "plain", heal=False)
    assert checks["cursor_bpb_continued"] != checks["cursor_bpb_plain"]
    assert check_cursor(model, tiny.tokenizer(), ["\n\n"]) == {}


def test_prefix_first_worse_than_plain_is_said() -> None:
    warning = objection({"cursor_bpb_psm": 2.4, "cursor_bpb_plain": 1.2, "cursor_bpb_continued": 1.7})
    assert warning is not None
    assert "2.40 bits per byte, and 1.70 without the code behind it" in warning
    assert "data.fim_cursor_rate" in warning
    assert objection({"cursor_bpb_psm": 1.5, "cursor_bpb_plain": 1.2, "cursor_bpb_continued": 1.7}) is None
    assert objection({}) is None


@pytest.mark.real
def test_the_real_server_is_asked_by_the_line_that_export_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_folder()))
    file = tmp_path / "a model.gguf"
    model = tiny.model(max_seq_len=512)
    write_gguf(file, model, tiny.tokenizer(), name="tiny", gguf_type="F16", embedding_type="F32")
    checks = check_llama_server(server_command(file, model.config.max_seq_len), [tiny.CODE])
    assert checks["llama_server_places"] == PLACES
    assert all(0 <= checks[f"llama_server_{kind}_word"] <= 1 for kind in ("line_start", "in_word"))
    file.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"does not serve the file: .*try another llama.cpp"):
        check_llama_server(f"llama-server -m {shlex.quote(str(file))}", [tiny.CODE])
