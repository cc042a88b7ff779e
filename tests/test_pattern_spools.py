"""Patterns on disk while prompts run: what was written, whatever the chunks, also after tokens were taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tlcapture.errors import StorageError
from tlcapture.generation.recording import pattern_spools
from tlcapture.generation.recording.pattern_spools import SpooledPatterns

LENGTHS, N_NEW, N_PLACES, N_HEADS = (7, 4, 2), 9, 3, 2
WIDTH = max(LENGTHS)


def patterns(n_columns: int, n_keys: int) -> list[Tensor]:
    return [torch.rand(len(LENGTHS), N_HEADS, n_columns, n_keys) for _ in range(N_PLACES)]


@pytest.mark.parametrize("chunk", [1, 3, 4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triangles_are_those_of_the_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(pattern_spools, "CHUNK", chunk)
    n_columns = WIDTH + N_NEW
    whole = [each.to(dtype) for each in patterns(n_columns, n_columns)]
    spooled = SpooledPatterns(tmp_path, whole[0], N_PLACES, LENGTHS)
    spooled.write(range(3), [each[:, :, :WIDTH, :WIDTH] for each in whole], WIDTH, WIDTH)
    for stop in range(WIDTH + 1, n_columns + 1):
        spooled.write(range(3), [each[:, :, stop - 1 : stop, :stop] for each in whole], stop, 1)
        if stop == WIDTH + 4:  # three tokens of prompt 1 are taken back and written again
            spooled.rewind(1, LENGTHS[1] + 1)
            for again in range(WIDTH + 2, stop + 1):
                spooled.write([1], [each[1:2, :, again - 1 : again, :again] for each in whole], again, 1)
    for index, length in enumerate(LENGTHS):
        n_tokens, first = length + N_NEW, WIDTH - length
        spool = spooled.take(index, n_tokens)
        assert spool.n_tokens == n_tokens
        for place in range(N_PLACES):
            expected = whole[place][index, :, first:, first:].tril()
            assert torch.equal(spool.pattern(place), expected)
            query, key = torch.tril_indices(n_tokens, n_tokens)
            assert torch.equal(torch.cat(list(spool.triangle(place))), expected[:, query, key].T)
    assert not list(tmp_path.iterdir()), "a file with a name would stay when the process is killed"


def test_what_waits_for_its_chunk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pattern_spools._MOST_PENDING, "cpu", 500)
    spooled = SpooledPatterns(tmp_path, patterns(1, 1)[0], N_PLACES, LENGTHS)
    spooled.write(range(3), patterns(WIDTH, WIDTH), WIDTH, WIDTH)
    for stop in range(WIDTH + 1, WIDTH + 40):
        spooled.write(range(3), patterns(1, stop), stop, 1)
        assert spooled._n_pending < 500


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    spooled = SpooledPatterns(path, patterns(1, 1)[0], N_PLACES, LENGTHS)
    with pytest.raises(StorageError, match=f"{path}: attention patterns cannot be kept there"):
        spooled.write(range(3), patterns(WIDTH, WIDTH), WIDTH, WIDTH)
