from exlq.api import convert as convert
from exlq.api import evaluate as evaluate
from exlq.api import load_measurement as load_measurement
from exlq.api import measure as measure
from exlq.api import open_exl2 as open_exl2
from exlq.api import open_gguf as open_gguf
from exlq.evaluation.run import Settings as Settings
from exlq.pipeline.config import ConvertConfig as ConvertConfig
from exlq.recipes.solve import Targets as Targets
from exlq.recipes.solve import solve as solve

__version__: str
EXPORTS: dict[str, str]
