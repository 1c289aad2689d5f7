"""The codecs of the output formats, by name."""

from collections.abc import Mapping
from typing import Any

from exlq.formats.codec import Codec
from exlq.formats.exl2_codec import Exl2Codec
from exlq.formats.gguf_codec import GgufCodec

CODECS: Mapping[str, Codec[Any]] = {"exl2": Exl2Codec(), "gguf": GgufCodec()}
