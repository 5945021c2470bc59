"""linvt_hf: the Linear Video Tokenizer (arXiv 2412.05185) for image-LLMs, native to Hugging Face transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_linvt import LinVTConfig
from .conversion import wrap
from .encoded_video import EncodedVideo
from .modeling_linvt import LinVTForConditionalGeneration
from .pipeline_linvt import VideoQuestionAnsweringPipeline
from .processing_linvt import LinVTProcessor
from .video_tokenizer import LinearVideoTokenizer

__version__ = "0.1.0"

# With the package there, the Auto classes know its own; a model's folder brings the same through its `auto_map`.
AutoConfig.register(LinVTConfig.model_type, LinVTConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    _auto_class.register(LinVTConfig, LinVTForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LinVTConfig, LinVTProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "video-question-answering",
    pipeline_class=VideoQuestionAnsweringPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)

__all__ = [
    "EncodedVideo",
    "LinVTConfig",
    "LinVTForConditionalGeneration",
    "LinVTProcessor",
    "LinearVideoTokenizer",
    "VideoQuestionAnsweringPipeline",
    "wrap",
]
