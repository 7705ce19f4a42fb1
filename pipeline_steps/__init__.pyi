from pipeline_steps.api import Audio2ImagePipeline as Audio2ImagePipeline
from pipeline_steps.api import embed_sounds as embed_sounds
from pipeline_steps.api import find_sounds as find_sounds
from pipeline_steps.api import load_pairs as load_pairs

__version__: str
