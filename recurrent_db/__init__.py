"""recurrent_db: recurrent-depth language models, trained unrolled or one denoising step at a time.

>>> import recurrent_db
>>> model, tokenizer = recurrent_db.load("runs/demo/denoise")          # doctest: +SKIP
>>> recurrent_db.generate(model, tokenizer, "def main(", k=4)          # doctest: +SKIP
"""

from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import generate, generate_texts
from recurrent_db.store.loading import load

__all__ = ["Config", "UserError", "generate", "generate_texts", "load", "load_config"]
__version__ = "0.1.0"
