"""The names known without loading anything are those of the tables."""

from __future__ import annotations

import pytest

from exlq import names
from exlq.calibration.rows import STARTS
from exlq.cli.commands import COMMANDS, GROUPS
from exlq.evaluation.run import RUNNERS
from exlq.formats.codecs import CODECS
from exlq.formats.exl2_options import HEAD_OPTIONS
from exlq.formats.gguf import types
from exlq.formats.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, TYPES
from exlq.formats.gguf_blocks.fit import SEARCHES
from exlq.pipeline.passes import STATE_DTYPES


def test_every_name_stands_for_an_entry_of_its_table() -> None:
    assert tuple(STARTS) == names.ROW_MODES
    assert tuple(CODECS) == names.FORMATS
    assert tuple(HEAD_OPTIONS) == names.HEAD_BITS
    assert tuple(SEARCHES) == names.SEARCHES
    assert tuple(RUNNERS) == names.RUNTIMES
    assert tuple(STATE_DTYPES) == names.STATES
    assert {command.group for command in COMMANDS.values()} <= set(GROUPS)


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_the_block_that_its_codec_writes(name: str) -> None:
    assert types.BLOCKS[name] == (TYPES[name].block_size, TYPES[name].type_size)
    assert (name in types.FLOATS, name in types.QUANTIZED) == (name in FLOAT_TYPES, name in BLOCK_TYPES)
