"""The Hugging Face interface: our language models as models of transformers.

`import hope.hf` also registers them, so that AutoConfig, AutoModelForCausalLM and AutoTokenizer
read what `save_pretrained` has written. Needs transformers: `pip install 'hope_ext[hf]'`.
"""

from hope.extras import need

need("transformers", "hf", "hope.hf")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hope.hf.cache import HopeCache  # noqa: E402
from hope.hf.config import HopeLMConfig  # noqa: E402
from hope.hf.export import export, from_run  # noqa: E402
from hope.hf.model import HopeForCausalLM  # noqa: E402
from hope.hf.tokenizer import HopeByteTokenizer  # noqa: E402

AutoConfig.register(HopeLMConfig.model_type, HopeLMConfig, exist_ok=True)
AutoModelForCausalLM.register(HopeLMConfig, HopeForCausalLM, exist_ok=True)
AutoTokenizer.register(HopeLMConfig, tokenizer_class=HopeByteTokenizer, exist_ok=True)

__all__ = [
    "HopeByteTokenizer",
    "HopeCache",
    "HopeForCausalLM",
    "HopeLMConfig",
    "export",
    "from_run",
]
