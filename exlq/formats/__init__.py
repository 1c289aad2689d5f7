"""Output formats, by name."""

from exlq.formats.exl2_codec import Exl2Codec

CODECS = {"exl2": Exl2Codec()}
