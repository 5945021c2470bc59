"""The folder a LinVT model is saved to and loaded from: weights, config, the code to run them, a model card."""

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.quantizers import AutoQuantizationConfig

from .image_llm import check_loaded
from .model_card import model_card

_MODEL = "modeling_linvt.LinVTForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_linvt.LinVTConfig",
    "AutoModel": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoProcessor": "processing_linvt.LinVTProcessor",
}
CUSTOM_PIPELINES = {
    "video-question-answering": {
        "impl": "pipeline_linvt.VideoQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
    }
}
# What transformers' quantization configs call the modules that stay as they are.
_SPARING = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
_UPLOAD_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description")


class HubFolderMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of complete folders; stands before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        `PreTrainedModel.from_pretrained`, except that a checkpoint which does not fit is an error.

        A `quantization_config` is for the image-LLM: LinVT is small, chooses what the language model reads, and stays
        as it is.

        Raises `ValueError` with the names of missing or unexpected tensors: a model that runs on weights nobody
        trained must not look like one that was loaded.
        """
        if (Path(pretrained_model_name_or_path or "") / "linvt_adapter.json").is_file():
            raise ValueError(
                f"{pretrained_model_name_or_path} holds adapters without their base; load it with "
                "linvt_hf.training.load_adapter, or make a whole model of it with `linvt merge`."
            )
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _sparing_linvt(kwargs["quantization_config"])
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, processor=None, **kwargs):
        """
        Saves a complete Hub folder: weights, config, all code a process without this package needs, a model card, and
        the processor if it is given.
        """
        if hasattr(self.base, "peft_config"):
            raise ValueError(
                "The model has a LoRA on it, which a whole model's folder cannot hold: fold it in first with "
                "linvt_hf.training.merge(model), or save it alone with linvt_hf.training.save_adapter(model, folder)."
            )
        if getattr(self.base, "hf_quantizer", None) is not None and getattr(self, "hf_quantizer", None) is None:
            raise ValueError(
                "The image-LLM was quantized before it was wrapped, which a folder cannot say: wrap it whole, save "
                "that, and give quantization_config to LinVTForConditionalGeneration.from_pretrained."
            )
        # The config's maps may name the repo a model came from; the new folder brings its own code.
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = deepcopy(CUSTOM_PIPELINES)
        push = kwargs.pop("push_to_hub", False)
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            self._complete_folder(Path(save_directory), processor)
            if push:  # only now is the folder whole
                upload.setdefault("repo_id", Path(save_directory).name)
                return _upload(save_directory, token=kwargs.get("token"), **upload)

    def push_to_hub(self, repo_id: str, processor=None, token=None, **kwargs):
        """
        Uploads a complete folder, with the processor if it is given. Of kwargs, `private`, `revision`,
        `commit_message` and their like go to the Hub, the rest to `save_pretrained`.
        """
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, processor=processor, **kwargs)
            return _upload(folder, repo_id=repo_id, token=token, **upload)

    def _complete_folder(self, folder: Path, processor) -> None:
        copy_code(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        card = folder / "README.md"
        if not card.exists():
            card.write_text(model_card(self.config, self.training_text), encoding="utf-8")


def _sparing_linvt(quantization):
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = deepcopy(quantization)
    for name in _SPARING:
        if hasattr(quantization, name):
            # Who names no module leaves it to transformers, which spares the output head.
            spared = getattr(quantization, name) or ["lm_head"]
            setattr(quantization, name, [*spared, "video_tokenizer"])
    return quantization


def copy_code(folder: Path, module: str = _MODEL.partition(".")[0]) -> None:
    """Writes into a folder what a process without this package needs: a model's file and all it imports."""
    main = Path(__file__).with_name(f"{module}.py")
    for source in map(Path, (main, *get_relative_import_files(main))):
        if source.resolve() != (folder / source.name).resolve():
            shutil.copy(source, folder)


def _upload(folder, repo_id: str, token=None, private: bool | None = None, **kwargs):
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


__all__ = ["AUTO_MAP", "CUSTOM_PIPELINES", "HubFolderMixin", "copy_code"]
